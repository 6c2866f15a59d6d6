"""Publishing: what a version holds, the manifest that readers use, and the pointer that names it.

Objects are immutable and carry their own counts; nothing a reader can see changes until the pointer is swapped.
"""

import base64
import io
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from lib.errors import IncompleteError, UsageError
from lib.listing import PROBES
from lib.storage import Store

POINTER_NAME = "_published.json"
ARCHIVE_NAME = "_archive.json"
DELETING = "deleting_since"
"""In the place of what `_archive.json` said: this version is being deleted, nobody scores or publishes it any more."""

MAX_SWAPS = 20

CLOCK_TOLERANCE = timedelta(seconds=30)
"""A smaller difference is not told from the whole seconds of S3's times; and plans so close together are of one age."""

FOOTER_KEY = b"textsweep"
"""Key-value metadata of every object: version, shard, identity, row range, label order and counts, as JSON."""

FOOTER_READERS = 16
"""Threads that read footers of finished objects which no record holds."""

PART_ROWS = 8_192
"""Of a manifest that is read in parts: joins of 65,536 took 32 MB more (`tests.benchmarks.planning`)."""

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


STALE_NAME = "stale.parquet"
"""In a run's folder: shards and identities whose objects are in no manifest any more, and since when."""

STALE_SCHEMA = pa.schema([("shard", pa.string()), ("identity", pa.string()), ("since_ns", pa.int64())])


class Pointer(BaseModel):
    """`_published.json`: which manifest readers use."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: str
    run: str
    manifest: str
    """path of the manifest, relative to the output folder"""
    planned_at: str
    """when that run listed the archive (UTC, ISO 8601, the store's clock): an older plan never replaces a newer one of its version"""
    turn_planned_at: str = ""
    """when the first run of this version, since another one was published, was planned: no older plan of any version replaces it"""
    guard: str = ""
    """changed by who deletes another version, so that a publication under way looks again"""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What readers see now, or a version's latest successful run."""

    pointer: Pointer
    raw: bytes
    """the manifest's Parquet file: a table of it takes several times as much memory, 217 MB for a million shards"""

    @cached_property
    def manifest(self) -> pa.Table:
        """All of the manifest."""
        return self.read()

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The manifest, or some columns of it."""
        return pq.read_table(pa.BufferReader(self.raw), columns=columns, use_threads=False)

    @property
    def shards(self) -> pa.Table:
        """What the manifest names: shard, identity."""
        return self.read(["shard", "identity"])

    def shards_in_parts(self) -> Iterator[pa.Table]:
        """The same, some of it at a time."""
        file = pq.ParquetFile(pa.BufferReader(self.raw))
        for part in file.iter_batches(PART_ROWS, columns=["shard", "identity"], use_threads=False):
            yield pa.table(part)

    @property
    def metadata(self) -> dict[bytes, bytes]:
        """The manifest's key-value metadata."""
        return pq.read_schema(pa.BufferReader(self.raw)).metadata or {}


def read_published(output: Store) -> Published | None:
    """Read the pointer and its manifest, if anything is published."""
    raw = output.read(POINTER_NAME)
    while (pointer := parse_pointer(output, raw)) is not None:
        manifest = output.read(pointer.manifest)
        if manifest is not None:
            return Published(pointer=pointer, raw=manifest)
        seen, raw = raw, output.read(POINTER_NAME)
        if raw == seen:  # else it was moved, and the old version deleted, between our two reads
            raise IncompleteError(
                f"{output.url}/{POINTER_NAME} names {pointer.manifest}, which is not there; roll back to another run (jobs.publish)"
            )
    return None


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
    if DELETING in record:
        raise UsageError(
            f"{version.url} is being deleted since {record[DELETING]}; finish that first: jobs.publish delete --version"
            f" {version.url.rpartition('/')[2]} --yes"
        )
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


def latest_success(output: Store, version: str, published: Published | None) -> Published | None:
    """A version's latest successful run with its manifest, if there is one.

    The pointer names it, unless it names another version (after a rollback, or when two models take turns): then the
    marks of this version's successful runs are read.
    """
    if published and published.pointer.version == version:
        return published
    names = [path for path in output.list(f"{version}/_runs")["path"].to_pylist() if path.endswith("/_SUCCESS")]
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        marks = [Pointer.model_validate_json(raw) for raw in pool.map(output.read, names) if raw]
    for mark in sorted(marks, key=lambda mark: mark.planned_at, reverse=True):
        raw = output.read(mark.manifest)
        if raw is not None:
            return Published(pointer=mark, raw=raw)
    return None


def build_manifest(
    version: str,
    run_id: str,
    current: pa.Table,
    written: pa.Table,
    before: pa.Table,
    output: Store,
    on_footer: Callable[[dict[str, Any]], None],
) -> pa.Table:
    """Make the manifest of the current objects (columns shard, identity, chunk, chunks, path in the version's folder).

    Counts come from the manifest `before`, from what this run wrote (`outcome.RECORD_SCHEMA`), and from the footers of
    objects that neither holds; `on_footer` is told what stands in those.
    """
    strip = len(version) + 1
    counts = ["path", "start", "rows", "errors", "bytes", "run"]
    old = before.select(counts).set_column(0, "path", pc.utf8_slice_codeunits(before["path"], strip))
    known = pa.concat_tables([old, with_run(written.join(old, "path", join_type="left anti"), run_id).select(counts)])
    unknown = current.join(known, "path", join_type="left anti")["path"].to_pylist()
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        found = list(pool.map(lambda name: read_record(output.at(version), name), unknown))
    for record in found:
        on_footer(record)
    footers = [
        {
            "path": name,
            **{key: record[key] for key in ("start", "rows", "bytes")},
            "errors": sum(record["errors"].values()),
            "run": run_id,
        }
        for name, record in zip(unknown, found, strict=True)
    ]
    known = pa.concat_tables([known, pa.Table.from_pylist(footers, schema=known.schema)])
    rows = current.join(known, "path", join_type="inner").sort_by([("shard", "ascending"), ("chunk", "ascending")])
    assert rows.num_rows == current.num_rows, f"{current.num_rows} current objects, {rows.num_rows} have counts"
    paths = pc.binary_join_element_wise(version, rows["path"], "/")
    rows = rows.set_column(rows.column_names.index("path"), "path", paths)
    return (
        rows.append_column("version", pa.repeat(pa.scalar(version), rows.num_rows))
        .select(MANIFEST_SCHEMA.names)
        .cast(MANIFEST_SCHEMA)
    )


def with_run(records: pa.Table, run_id: str) -> pa.Table:
    """Add the column `run`."""
    return records.append_column("run", pa.repeat(pa.scalar(run_id), records.num_rows))


def read_record(version: Store, name: str) -> dict[str, Any]:
    """Read what an object says of itself in its footer, and its size in bytes."""
    handle, info = version.open_described(name)
    with handle:
        return {**json.loads(pq.read_metadata(handle).metadata[FOOTER_KEY]), "bytes": info.size}


def totals(manifest: pa.Table) -> dict[str, int]:
    """Shards, objects, rows, rows with an error and bytes of a manifest."""
    counts = {name: int(pc.sum(manifest[name]).as_py() or 0) for name in ("rows", "errors", "bytes")}
    return {"shards": pc.count_distinct(manifest["shard"]).as_py(), "objects": manifest.num_rows, **counts}


def write_table(folder: Store, name: str, table: pa.Table) -> None:
    """Write a small Parquet file, over the one that is there."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    folder.replace(name, sink.getvalue())


def read_stale(output: Store, published: Published | None, version: str) -> pa.Table:
    """What the run that the pointer names (before this one moved it) recorded as stale: shard, identity, since_ns."""
    raw = None
    if published and published.pointer.version == version:
        raw = output.read(f"{published.pointer.manifest.rpartition('/')[0]}/{STALE_NAME}")
    return pq.read_table(io.BytesIO(raw)) if raw else STALE_SCHEMA.empty_table()


def write_manifest(run: Store, manifest: pa.Table) -> str:
    """Write the manifest of a run that succeeded, and return its name.

    Never over another one: a run that is executed again under its id may find that readers use the manifest that is there.
    """
    sink = io.BytesIO()
    pq.write_table(manifest, sink, compression="zstd", write_page_checksum=True)
    data = sink.getvalue()
    for number in count(1):
        name = "manifest.parquet" if number == 1 else f"manifest-{number}.parquet"
        if run.create(name, data) or run.read(name) == data:
            return name
    raise AssertionError("there is always a next number")


def publish(
    output: Store,
    version: str,
    run_id: str,
    planned_at: datetime,
    manifest: str = "manifest.parquet",
    *,
    single_writer: bool = False,
) -> bool:
    """Mark the run as a success and move the pointer to its manifest, unless it shows what was planned later.

    Returns whether readers now see this run. A lost race is settled by reading again and trying again.
    """
    refuse_deleted(output.at(version))
    folder = f"{version}/_runs/{run_id}"
    planned = planned_at.astimezone(UTC) + clock_difference(output)
    mine = Pointer(version=version, run=run_id, manifest=f"{folder}/{manifest}", planned_at=stamp(planned))
    output.replace(f"{folder}/_SUCCESS", mine.model_dump_json(indent=2).encode())
    for _ in range(MAX_SWAPS):
        raw = output.read(POINTER_NAME)
        theirs = parse_pointer(output, raw)
        # After the pointer was read: whoever deletes a version marks it first, and then changes the pointer.
        refuse_deleted(output.at(version))
        if theirs and not may_follow(mine, theirs):
            return False
        if theirs and theirs.manifest == mine.manifest and theirs.planned_at == mine.planned_at:
            return True
        turn = theirs.turn_planned_at if theirs and theirs.version == version else mine.planned_at
        data = mine.model_copy(update={"turn_planned_at": turn}).model_dump_json(indent=2).encode()
        if single_writer:
            output.replace(POINTER_NAME, data)
            return True
        if output.swap(POINTER_NAME, raw, data):
            return True
    raise IncompleteError(
        f"{output.url}/{POINTER_NAME}: {MAX_SWAPS} others changed it while this run tried to; run the same command again"
    )


def may_follow(mine: Pointer, theirs: Pointer) -> bool:
    """Whether a run may take the place of the one that readers see.

    Within a version it must not be planned earlier. Another version's must not be planned before the present version's
    turn was: a big rescore that took days replaces the nightly runs published meanwhile, and a slow run of the old model
    does not undo the new one that was started after it.
    """
    return mine.planned_at >= (theirs.planned_at if mine.version == theirs.version else theirs.turn_planned_at)


def refuse_deleted(version: Store) -> None:
    """Raise `IncompleteError` if a version's folder is being deleted, or was, while a run of it was under way."""
    raw = version.read(ARCHIVE_NAME)
    if raw is None:
        raise IncompleteError(
            f"{version.url} was deleted while this run was under way ({ARCHIVE_NAME} is gone); not published; run the same command again"
        )
    if DELETING in json.loads(raw):
        raise IncompleteError(f"{version.url} is being deleted; not published")


def clock_difference(output: Store) -> timedelta:
    """How far the store's clock is ahead of ours; zero if they agree to `CLOCK_TOLERANCE`.

    Plans are put in order by the time of one clock, the store's: a driver whose clock is a year ahead would otherwise
    keep all later runs from being published.
    """
    probe = f"{PROBES}{secrets.token_hex(8)}"
    before = now()
    output.create(probe, b"")
    info, after = output.info(probe), now()
    output.delete(probe)
    if info is None or info.mtime_ns is None:
        return timedelta(0)
    theirs = datetime.fromtimestamp(info.mtime_ns / 1e9, UTC)
    difference = min(theirs - before, timedelta(0)) + max(theirs - after, timedelta(0))
    return difference if abs(difference) > CLOCK_TOLERANCE else timedelta(0)


def now() -> datetime:
    """The time by this machine's clock."""
    return datetime.now(UTC)


def stamp(moment: datetime) -> str:
    """A UTC time as text that sorts like the time."""
    return moment.isoformat(timespec="microseconds")


def parse_pointer(output: Store, raw: bytes | None) -> Pointer | None:
    """Turn the pointer's bytes into its record."""
    try:
        return None if raw is None else Pointer.model_validate_json(raw)
    except ValidationError as error:
        raise UsageError(
            f"{output.url}/{POINTER_NAME} is not a pointer: {error.errors()[0]['msg']}; it was not written by this program"
        ) from None
