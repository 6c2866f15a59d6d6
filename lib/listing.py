"""What is known of a file without opening it: what its URL says, its description, listings of many. Knows no file system."""

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

LISTING_SCHEMA = pa.schema(
    [("path", pa.string()), ("size", pa.int64()), ("etag", pa.string()), ("mtime_ns", pa.int64())]
)
"""One row a file: path relative to the store's root, bytes, ETag (null where there is none), modification time (null if unknown)."""

PROBES = "_probe-"
"""How files and folders begin with which a run tries what its storage does; none stays but those of runs that were killed."""


@dataclass(frozen=True)
class FileInfo:
    """One file: path relative to the store's root, size in bytes, and what tells two contents apart."""

    path: str
    size: int
    etag: str | None
    mtime_ns: int | None


def describe(info: dict[str, Any], path: str) -> FileInfo:
    """Turn fsspec's description of a file into ours."""
    etag = info.get("ETag") or info.get("etag")
    if "ino" in info:
        mtime_ns: int | None = Path(info["name"]).stat().st_mtime_ns
    else:
        stamp: Any = info.get("mtime") or info.get("LastModified") or info.get("last_modified")
        mtime_ns = int(stamp.timestamp() * 1e9) if hasattr(stamp, "timestamp") else None
    return FileInfo(path, int(info["size"]), str(etag).strip('"') if etag else None, mtime_ns)


def to_listing(infos: Iterable[FileInfo]) -> pa.Table:
    """Put descriptions of files into one Arrow table."""
    rows = list(infos)
    columns = [
        [row.path for row in rows],
        [row.size for row in rows],
        [row.etag for row in rows],
        [row.mtime_ns for row in rows],
    ]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, LISTING_SCHEMA, strict=True)],
        schema=LISTING_SCHEMA,
    )


def is_temporary(path: str) -> bool:
    """Whether a local path is one of our unfinished writes."""
    return path.endswith(".tmp") and path.rpartition("/")[2].startswith(".")


def split_pattern(url: str) -> tuple[str, str]:
    """Split an archive's URL into its root (the longest folder before a wildcard, or the file's folder) and the rest ('' for a folder)."""
    url = url.rstrip("/")
    if not glob.has_magic(url):
        head, _, name = url.rpartition("/")
        return (head or ".", name) if name.endswith((".parquet", ".pq")) else (url, "")
    before = url[: next(i for i, letter in enumerate(url) if letter in "*?[")]
    root = before.rpartition("/")[0]
    return (root, url[len(root) + 1 :]) if root else (".", url)


def protocol_of(url: str) -> str:
    """The fsspec protocol of a URL: 's3', 'file', 'hf', ..."""
    head, sign, _ = url.partition("://")
    return {"s3a": "s3", "local": "file"}.get(head, head) if sign else "file"
