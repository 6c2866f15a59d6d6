"""Planning: how shards are cut into chunks, what objects are called, and which of them are still to do.

Pure functions of listings and footers; nothing here opens a file. What is done is known from object names alone.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

PLANNING_REVISION = 1
"""Raised by hand when the cutting into chunks changes: part of every identity."""

MAX_CHUNK_ROWS = 262_144
"""Footers can lie about bytes (dictionary pages: 1,004 MB of repeated text is 0.1 MB in the footer), not about rows."""

WHOLE_ROW_GROUP_CHUNKS = 8
"""A row group is cut only above so many chunks' text (512 MB by default): a part of it costs decoding all before it."""

OPENING_COST_BYTES = 256 * 1024
"""What opening one more shard counts in a block, so that tiny shards are bundled by the hundred, not by the thousand."""

MAX_WAVE_BLOCKS = 10_000
"""Blocks of one Ray Data execution: the driver grows by 22 kB a block."""

OBJECT_NAME = r"^(?s:(?P<shard>.+))-(?P<identity>[0-9a-f]{12})-(?P<chunk>\d{5,12})-of-(?P<chunks>\d{5,12})\.parquet$"
"""Any character may stand in a shard's name, a line break too."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A contiguous row range of one shard: the unit of reading, writing, retrying and counting."""

    shard: str
    identity: str
    index: int
    count: int
    """chunks of the shard"""
    start: int
    """first row, counted in the shard"""
    rows: int
    text_bytes: int
    """what the footer says; it can be too low"""

    @property
    def name(self) -> str:
        """The one object that holds this chunk's predictions, relative to the version's folder."""
        return f"{self.shard}-{self.identity}-{self.index:05d}-of-{self.count:05d}.parquet"


Block = tuple[Chunk, ...]
"""What one task reads and one call of the predictor scores: one or more whole chunks."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group's size, from the footer."""

    rows: int
    text_bytes: int


def identity(size: int, etag: str | None, mtime_ns: int | None, chunk_bytes: int) -> str:
    """Name a shard's content and its cutting in 12 hex digits; the same path with other bytes gets another name."""
    stamp = etag if etag is not None else f"mtime:{mtime_ns}"
    return hashlib.sha256(f"{size}|{stamp}|{chunk_bytes}|{PLANNING_REVISION}".encode()).hexdigest()[:12]


def with_identities(listing: pa.Table, chunk_bytes: int) -> pa.Table:
    """Add the column `identity` to a listing of shards (columns path, size, etag, mtime_ns)."""
    rows = zip(*(listing[name].to_pylist() for name in ("size", "etag", "mtime_ns")), strict=True)
    identities = pa.array((identity(size, etag, mtime, chunk_bytes) for size, etag, mtime in rows), pa.string())
    return listing.append_column("identity", identities)


def cut(row_groups: Sequence[RowGroup], chunk_bytes: int) -> list[tuple[int, int, int]]:
    """Cut a shard into chunks: `(start, rows, text_bytes)`, contiguous, in order, covering every row once.

    Whole row groups are put together up to `chunk_bytes`; one that is too large by far is cut into equal row ranges.
    A shard without rows has one empty chunk.
    """
    chunks: list[tuple[int, int, int]] = []
    start = rows = size = 0

    def close() -> None:
        nonlocal start, rows, size
        if rows:
            chunks.append((start, rows, size))
        start, rows, size = start + rows, 0, 0

    for group in row_groups:
        if not group.rows:
            continue
        if group.text_bytes > WHOLE_ROW_GROUP_CHUNKS * chunk_bytes or group.rows > MAX_CHUNK_ROWS:
            close()
            # Never more parts than rows: a footer that claims petabytes must not fill the driver's memory.
            parts = min(group.rows, max(-(-group.text_bytes // chunk_bytes), -(-group.rows // MAX_CHUNK_ROWS)))
            bounds = [group.rows * part // parts for part in range(parts + 1)]
            for first, last in pairwise(bounds):
                rows, size = last - first, group.text_bytes * (last - first) // group.rows
                close()
            continue
        if rows and (size + group.text_bytes > chunk_bytes or rows + group.rows > MAX_CHUNK_ROWS):
            close()
        rows, size = rows + group.rows, size + group.text_bytes
    close()
    return chunks or [(0, 0, 0)]


def chunks_of(shard: str, shard_identity: str, row_groups: Sequence[RowGroup], chunk_bytes: int) -> list[Chunk]:
    """Cut one shard into its chunks."""
    ranges = cut(row_groups, chunk_bytes)
    return [Chunk(shard, shard_identity, index, len(ranges), *bounds) for index, bounds in enumerate(ranges)]


def parse_objects(paths: pa.ChunkedArray) -> pa.Table:
    """Split object names into columns shard, identity, chunk, chunks (int64) and path; other names are left out."""
    parts = pc.extract_regex(paths, OBJECT_NAME)
    table = pa.table({"path": paths, "parts": parts}).filter(pc.is_valid(parts))
    fields = {name: pc.struct_field(table["parts"], name) for name in ("shard", "identity", "chunk", "chunks")}
    numbers = {name: fields[name].cast(pa.int64()) for name in ("chunk", "chunks")}
    return pa.table({**fields, **numbers, "path": table["path"]})


def split_finished(shards: pa.Table, objects: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Split shards (with identities) into finished and unfinished ones: finished means every one of its chunks has an object.

    Returns `(finished, unfinished)`; the finished ones have the column `chunks`.
    """
    counted = objects.group_by(["shard", "identity", "chunks"]).aggregate([("chunk", "count_distinct")])
    whole = counted.filter(pc.equal(counted["chunks"], counted["chunk_count_distinct"])).select(
        ["shard", "identity", "chunks"]
    )
    joined = shards.join(whole, ["path", "identity"], ["shard", "identity"], join_type="left outer").sort_by("path")
    done = pc.is_valid(joined["chunks"])
    return joined.filter(done), joined.filter(pc.invert(done)).drop_columns(["chunks"])


def bundle(chunks: Iterable[Chunk], chunk_bytes: int) -> Iterator[Block]:
    """Put neighbouring chunks together into blocks of about one chunk's size. Empty chunks must be left out before."""
    block: list[Chunk] = []
    size = rows = 0
    for chunk in chunks:
        cost = max(chunk.text_bytes, OPENING_COST_BYTES)
        if block and (size + cost > chunk_bytes or rows + chunk.rows > MAX_CHUNK_ROWS):
            yield tuple(block)
            block, size, rows = [], 0, 0
        block.append(chunk)
        size, rows = size + cost, rows + chunk.rows
    if block:
        yield tuple(block)


def over_limit(bad: int, total: int, limit: int | float) -> bool:
    """Whether `bad` of `total` breaks a limit: a count if it is a whole number, else a fraction."""
    return bad > (limit if isinstance(limit, int) else int(np.floor(limit * total)))
