"""Publishing: what a version holds, the manifest that readers use, and the pointer that names it.

Objects are immutable and carry their own counts; nothing a reader can see changes until the pointer is swapped.
"""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from lib.errors import IncompleteError, UsageError
from lib.storage import Store

POINTER_NAME = "_published.json"
ARCHIVE_NAME = "_archive.json"
FOOTER_KEY = b"textsweep"
"""Key-value metadata of every object: version, shard, identity, row range, label order and counts, as JSON."""

FOOTER_READERS = 16
"""Threads that read footers of finished objects which no record holds."""

MANIFEST_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("identity", pa.string()),
        ("chunk", pa.int64()),
        ("chunks", pa.int64()),
        ("start", pa.int64()),
        ("rows", pa.int64()),
        ("errors", pa.int64()),
        ("bytes", pa.int64()),
        ("version", pa.string()),
        ("run", pa.string()),
        ("path", pa.string()),
    ]
)
"""One row for each current object; `path` is relative to the output folder, `run` the run that first recorded it."""


class Pointer(BaseModel):
    """`_published.json`: which manifest readers use."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: str
    run: str
    manifest: str
    """path of the manifest, relative to the output folder"""
    planned_at: str
    """when that run listed the archive (UTC, ISO 8601): an older plan never replaces a newer one within a version"""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What readers see now."""

    pointer: Pointer
    manifest: pa.Table

    def covers(self, version: str, finished: pa.Table) -> bool:
        """Whether the published manifest already holds exactly these finished shards (columns path, identity, chunks)."""
        if self.pointer.version != version:
            return False
        mine = set(zip(*(self.manifest[name].to_pylist() for name in ("shard", "identity")), strict=True))
        return mine == set(zip(*(finished[name].to_pylist() for name in ("path", "identity")), strict=True))


def read_published(output: Store) -> Published | None:
    """Read the pointer and its manifest, if anything is published."""
    raw = output.read(POINTER_NAME)
    if raw is None:
        return None
    pointer = Pointer.model_validate_json(raw)
    manifest = output.read(pointer.manifest)
    if manifest is None:
        raise IncompleteError(
            f"{output.url}/{POINTER_NAME} names {pointer.manifest}, which is not there; roll back to another run"
        )
    return Published(pointer=pointer, manifest=pq.read_table(io.BytesIO(manifest)))


def fix_archive(version: Store, root: str, keys: pa.Schema) -> pa.Schema:
    """Write `_archive.json` once, or hold this run to it: same root, and key columns in the types of the first run.

    Returns the key columns to use. Raises `UsageError` for another archive.
    """
    kept = read_archive(version, root, keys)
    if kept is not None:
        return kept
    record = {
        "root": root,
        "key_columns": {field.name: str(field.type) for field in keys},
        "key_schema": base64.b64encode(keys.serialize().to_pybytes()).decode(),
    }
    version.create(ARCHIVE_NAME, json.dumps(record, indent=2).encode())
    kept = read_archive(version, root, keys)
    assert kept is not None
    return kept


def read_archive(version: Store, root: str, keys: pa.Schema) -> pa.Schema | None:
    """Read `_archive.json`, if the first run has written it. Raises `UsageError` for another archive."""
    raw = version.read(ARCHIVE_NAME)
    if raw is None:
        return None
    record = json.loads(raw)
    if record["root"] != root:
        raise UsageError(
            f"{version.url} holds scores of the archive {record['root']}, this run reads {root}: give each archive its own output.path"
        )
    kept = pa.ipc.read_schema(pa.BufferReader(base64.b64decode(record["key_schema"])))
    if kept.names != keys.names:
        raise UsageError(
            f"{version.url} has the key columns {kept.names}, this archive gives {keys.names}: give it its own output.path"
        )
    return kept


def build_manifest(
    version: str,
    run_id: str,
    finished: pa.Table,
    objects: pa.Table,
    written: dict[str, dict[str, Any]],
    published: Published | None,
    output: Store,
) -> pa.Table:
    """Make the manifest of all finished shards' objects.

    Counts come from the published manifest, from this run's results, and from the footers of objects that neither holds.
    `objects` is the listing of the version's objects (shard, identity, chunk, chunks, path).
    """
    keep = finished.select(["path", "identity"]).rename_columns(["shard", "identity"])
    current = objects.join(keep, ["shard", "identity"], join_type="inner").sort_by(
        [("shard", "ascending"), ("chunk", "ascending")]
    )
    known = dict(written)
    if published and published.pointer.version == version:
        strip = len(version) + 1
        known.update({row["path"][strip:]: row for row in published.manifest.to_pylist()})
    missing = [name for name in current["path"].to_pylist() if name not in known]
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        known.update(zip(missing, pool.map(lambda name: read_record(output.at(version), name), missing), strict=True))
    rows = []
    for row in current.to_pylist():
        counts = known[row["path"]]
        identified = {name: row[name] for name in ("shard", "identity", "chunk", "chunks")}
        counted = {"errors": count_errors(counts), **{name: counts[name] for name in ("start", "rows", "bytes")}}
        rows.append(
            {
                **identified,
                **counted,
                "version": version,
                "run": counts.get("run", run_id),
                "path": f"{version}/{row['path']}",
            }
        )
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def read_record(version: Store, name: str) -> dict[str, Any]:
    """Read what an object says of itself in its footer, and its size in bytes."""
    handle, info = version.open_described(name)
    with handle:
        return {**json.loads(pq.read_metadata(handle).metadata[FOOTER_KEY]), "bytes": info.size}


def count_errors(record: dict[str, Any]) -> int:
    """Rows with an error, from an object's own counts by reason or from a manifest's row."""
    errors = record["errors"]
    return sum(errors.values()) if isinstance(errors, dict) else int(errors)


def totals(manifest: pa.Table) -> dict[str, int]:
    """Shards, objects, rows, rows with an error and bytes of a manifest."""
    counts = {name: int(pc.sum(manifest[name]).as_py() or 0) for name in ("rows", "errors", "bytes")}
    return {"shards": pc.count_distinct(manifest["shard"]).as_py(), "objects": manifest.num_rows, **counts}


def write_manifest(run: Store, manifest: pa.Table) -> None:
    """Write a run's manifest."""
    sink = io.BytesIO()
    pq.write_table(manifest, sink, compression="zstd", write_page_checksum=True)
    run.replace("manifest.parquet", sink.getvalue())


def publish(output: Store, version: str, run_id: str, planned_at: datetime) -> bool:
    """Mark the run as a success and move the pointer to its manifest, unless a later plan of the same version is there.

    Returns whether readers now see this run. A lost race is settled by reading again and trying again.
    """
    folder = f"{version}/_runs/{run_id}"
    mine = Pointer(
        version=version,
        run=run_id,
        manifest=f"{folder}/manifest.parquet",
        planned_at=planned_at.astimezone(UTC).isoformat(),
    )
    output.replace(f"{folder}/_SUCCESS", b"")
    for _ in range(20):
        seen = output.info(POINTER_NAME)
        raw = output.read(POINTER_NAME) if seen else None
        theirs = Pointer.model_validate_json(raw) if raw else None
        if theirs and theirs.version == version and theirs.run != run_id and theirs.planned_at > mine.planned_at:
            return False
        if theirs == mine or output.swap(POINTER_NAME, seen, mine.model_dump_json(indent=2).encode()):
            return True
    raise IncompleteError(
        f"{output.url}/{POINTER_NAME}: 20 others changed it while this run tried to; run the same command again"
    )
