"""Planning: how shards are cut into chunks, what objects are called, and which of them are still to do.

Pure functions of listings and footers; nothing here opens a file. What is done is known from object names alone.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
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

OBJECTS_SCHEMA = pa.schema(
    [("shard", pa.string()), ("identity", pa.string()), ("chunk", pa.int64()), ("chunks", pa.int64())]
)

STALE_NAME = r"^(?s:(?:_dead_letter/)?(?P<shard>.+?))-(?P<identity>[0-9a-f]{12})(?:-\d{5,12}-of-\d{5,12})?\.parquet$"
"""An object, its dead letters, or the dead letter of a whole shard."""


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
    excluded: tuple[tuple[int, int], ...] = ()
    """row ranges [first, last) of the shard that get an error instead of a score: they kill the process that scores them"""
    only: tuple[int, ...] | None = None
    """the rows of the shard, in order, that are scored and written; None: all of the chunk"""

    @property
    def num_scored(self) -> int:
        """Rows of the chunk's object."""
        return self.rows if self.only is None else len(self.only)

    @property
    def name(self) -> str:
        """The one object that holds this chunk's predictions, relative to the version's folder."""
        return f"{self.shard}-{self.identity}-{self.index:05d}-of-{self.count:05d}.parquet"

    def __str__(self) -> str:
        """What a person calls it."""
        return f"{self.shard} rows {self.start:,} to {self.start + self.rows - 1:,}"


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
    """Turn a listing of shards (columns path, size, etag, mtime_ns) into what planning needs: path, size, identity."""
    identities = []
    for part in listing.to_batches(max_chunksize=65_536):  # Python values of a part at a time, not of a million shards
        rows = zip(*(part[name].to_pylist() for name in ("size", "etag", "mtime_ns")), strict=True)
        found = [identity(size, etag, mtime, chunk_bytes) for size, etag, mtime in rows]
        identities.append(pa.array(found, pa.string()))
    column = pa.chunked_array(identities, pa.string())
    return listing.select(["path", "size"]).append_column("identity", column)


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


def select_rows(chunks: Sequence[Chunk], rows: npt.NDArray[np.int64]) -> list[Chunk]:
    """Keep what holds some of `rows` (of the shard, sorted), each chunk with its own; one without rows if none is there."""
    kept = []
    for chunk in chunks:
        first, last = np.searchsorted(rows, (chunk.start, chunk.start + chunk.rows))
        if first < last:
            kept.append(replace(chunk, only=tuple(rows[first:last].tolist())))
    kept = kept or [replace(chunks[0], start=0, rows=0, only=())]
    return [replace(chunk, index=index, count=len(kept)) for index, chunk in enumerate(kept)]


def parse_objects(paths: pa.ChunkedArray) -> pa.Table:
    """Split object names into columns shard, identity, chunk and chunks (int64); other names are left out."""
    tables = []
    for batch in pa.table({"path": paths}).to_batches(
        max_chunksize=65_536
    ):  # what lies between is as large as the names
        parts = pc.extract_regex(batch["path"], OBJECT_NAME)
        parts = parts.filter(pc.is_valid(parts))
        fields = {name: pc.struct_field(parts, name) for name in ("shard", "identity", "chunk", "chunks")}
        numbers = {name: fields[name].cast(pa.int64()) for name in ("chunk", "chunks")}
        tables.append(pa.table({**fields, **numbers}))
    return pa.concat_tables([OBJECTS_SCHEMA.empty_table(), *tables])


def with_names(objects: pa.Table) -> pa.Table:
    """Add the column `path`: the names that `parse_objects` took apart."""
    numbers = {name: pc.utf8_lpad(objects[name].cast(pa.string()), 5, "0") for name in ("chunk", "chunks")}
    ending = pc.binary_join_element_wise(numbers["chunk"], "of", numbers["chunks"], "-")
    name = pc.binary_join_element_wise(objects["shard"], objects["identity"], ending, "-")
    return objects.append_column("path", pc.binary_join_element_wise(name, ".parquet", ""))


def split_finished(shards: pa.Table, objects: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Split shards (with identities) into finished and unfinished ones: finished means every one of its chunks has an object.

    Done for a sixteenth of all identities at a time, by one thread, and given back: joins and groups need several times the
    memory of what they work on, on each of their threads.
    """
    numbered = shards.select(["path", "identity"]).append_column("number", pa.array(np.arange(shards.num_rows)))
    digits = [pc.utf8_slice_codeunits(table["identity"], 0, 1) for table in (numbered, objects)]
    finished = np.zeros(shards.num_rows, np.bool_)
    for digit in "0123456789abcdef":
        some, made = (
            table.filter(pc.equal(first, digit)) for table, first in zip((numbered, objects), digits, strict=True)
        )
        by_shard = made.group_by(["shard", "identity", "chunks"], use_threads=False)
        counted = by_shard.aggregate([("chunk", "count_distinct")])
        whole = counted.filter(pc.equal(counted["chunks"], counted["chunk_count_distinct"]))
        joined = some.join(whole, ["path", "identity"], ["shard", "identity"], "left semi", use_threads=False)
        finished[joined["number"].to_numpy()] = True
        del some, made, by_shard, counted, whole, joined
        pa.default_memory_pool().release_unused()
    if finished.all():  # without a copy
        return shards, shards.slice(0, 0)
    return shards.filter(pa.array(finished)), shards.filter(pa.array(~finished))


def find_kept(manifest: pa.Table, shards: pa.Table, objects: pa.Table) -> pa.Table:
    """The objects of a manifest whose shards are not in the archive any more: columns shard, identity, chunk, chunks.

    `objects` is the listing of the version (the same columns): what it does not hold cannot be kept.
    """
    named = manifest.group_by(["shard", "identity"], use_threads=False).aggregate([])
    # A join keeps a table of its right side: the one that can be small. The archive never is.
    gone = shards.select(["path"]).join(named, ["path"], ["shard"], "right anti", use_threads=False)
    return objects.join(gone, ["shard", "identity"], join_type="inner", use_threads=False)


def names_exactly(
    manifest: Iterable[pa.Table], finished: pa.Table, shards: pa.Table, objects: pa.Table, keep_deleted: bool
) -> bool:
    """Whether a manifest (columns shard, identity; in parts) names every finished shard and nothing else but what is kept.

    By one thread and a part at a time, for the reason that `split_finished` gives.
    """
    numbered = finished.select(["path", "identity"]).append_column("number", pa.array(np.arange(finished.num_rows)))
    is_named = np.zeros(finished.num_rows, np.bool_)
    others = [pa.table({"shard": pa.array([], pa.string()), "identity": pa.array([], pa.string())})]
    for part in manifest:
        found = numbered.join(part, ["path", "identity"], ["shard", "identity"], "inner", use_threads=False)
        is_named[found["number"].to_numpy()] = True
        both = found.select(["path", "identity"])
        others.append(part.join(both, ["shard", "identity"], ["path", "identity"], "left anti", use_threads=False))
        del found, both
        pa.default_memory_pool().release_unused()
    if not is_named.all():
        return False
    beside = pa.concat_tables(others).group_by(["shard", "identity"], use_threads=False).aggregate([])
    kept = find_kept(beside, shards, objects) if keep_deleted else objects.slice(0, 0)
    return beside.num_rows == kept.group_by(["shard", "identity"], use_threads=False).aggregate([]).num_rows


def find_stale(objects: pa.Table, current: pa.Table, before: pa.Table, now_ns: int) -> pa.Table:
    """Find the objects and dead letters that nothing current names, and since when: columns path, shard, identity, since_ns.

    `objects` is the listing of the version (path, ...), `current` every shard and identity that a manifest or a listing
    of the archive names, `before` what this function found in the run before (shard, identity, since_ns). What is new in
    it is stale from now on.
    """
    parts = pc.extract_regex(objects["path"], STALE_NAME)
    named = pa.table({"path": objects["path"], "parts": parts}).filter(pc.is_valid(parts))
    names = {name: pc.struct_field(named["parts"], name) for name in ("shard", "identity")}
    stale = pa.table({"path": named["path"], **names}).join(current, ["shard", "identity"], join_type="left anti")
    since = (
        before.group_by(["shard", "identity"])
        .aggregate([("since_ns", "min")])
        .rename_columns(["shard", "identity", "since_ns"])
    )
    found = stale.join(since, ["shard", "identity"], join_type="left outer")
    stamps = pc.min_element_wise(pc.fill_null(found["since_ns"], now_ns), pa.scalar(now_ns, pa.int64()))
    return found.set_column(found.column_names.index("since_ns"), "since_ns", stamps).sort_by("path")


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
