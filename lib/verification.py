"""Reopening everything that a manifest names: is it all there, whole, and what the manifest says?

Every object is read to its last page, checksums included; its schema, its footer and its counts are held against the
manifest's row. What is wrong is collected, not raised: the person on call wants all of it.
"""

import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lib.errors import raise_if_stopped
from lib.planning import Chunk
from lib.publishing import FOOTER_KEY
from lib.storage import Store

READERS = 8
"""Threads that each hold one object, a few MB of predictions."""

WINDOW = 4 * READERS
"""Objects asked for ahead of the one that is looked at."""

CLAIMS = ("version", "shard", "identity", "chunk", "chunks", "start", "rows")
"""What footer and manifest both say."""


@dataclass(frozen=True, kw_only=True)
class Violation:
    """Something that is not as the manifest says."""

    path: str
    """relative to the output folder; of a shard as a whole, its name"""
    problem: str


@dataclass(frozen=True, kw_only=True)
class Opened:
    """One object, read."""

    problems: tuple[str, ...]
    schema: pa.Schema | None
    """without metadata; None if it cannot be read"""


OnProgress = Callable[[int, int, int], None]
"""Told how many of how many objects were read, and the violations so far."""


def verify(output: Store, manifest: pa.Table, on_progress: OnProgress) -> list[Violation]:
    """Hold every object of a manifest against it. Returns what is wrong, in the manifest's order; nothing if all is well."""
    rows = manifest.to_pylist()
    found = [Violation(path=shard, problem=problem) for shard, problem in check_shards(rows)]
    reference: tuple[str, pa.Schema] | None = None
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(rows), WINDOW):
            window = rows[start : start + WINDOW]
            for row, opened in zip(window, pool.map(lambda row: open_object(output, row), window), strict=True):
                found += [Violation(path=row["path"], problem=problem) for problem in opened.problems]
                if opened.schema is None:
                    continue
                if reference is None:
                    reference = row["path"], opened.schema
                elif opened.schema != reference[1]:
                    difference = describe_difference(opened.schema, reference[1])
                    found.append(Violation(path=row["path"], problem=f"{difference} (as in {reference[0]})"))
            on_progress(start + len(window), len(rows), len(found))
            raise_if_stopped()
    return found


def check_shards(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Whether the chunks of each shard are of one identity, each there once, and follow one another without a gap."""
    ordered = sorted(rows, key=lambda row: (row["shard"], row["chunk"]))
    for shard, group in groupby(ordered, key=lambda row: row["shard"]):
        members = list(group)
        identities = sorted({row["identity"] for row in members})
        if len(identities) > 1:
            yield shard, f"{len(identities)} identities in one manifest ({', '.join(identities)}), expected one"
            continue
        numbers, expected = [row["chunk"] for row in members], list(range(members[0]["chunks"]))
        if numbers != expected:
            yield shard, f"its chunks are {summary(numbers)}, expected {summary(expected)}"
            continue
        start = 0
        for row in members:
            if row["start"] != start:
                yield shard, f"chunk {row['chunk']} starts at row {row['start']:,}, expected {start:,}"
            start = row["start"] + row["rows"]


def open_object(output: Store, row: dict[str, Any]) -> Opened:
    """Read one object whole and hold it against its row of the manifest."""
    data = output.read(row["path"])
    if data is None:
        return Opened(problems=("it is not there",), schema=None)
    problems = [] if len(data) == row["bytes"] else [f"it has {len(data):,} bytes, the manifest says {row['bytes']:,}"]
    try:
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True, use_threads=False)
        footer = json.loads(table.schema.metadata[FOOTER_KEY])
    except (pa.ArrowException, OSError) as error:
        return Opened(problems=(*problems, f"it cannot be read: {first_line(error)}"), schema=None)
    except (KeyError, TypeError, ValueError):
        return Opened(problems=(*problems, f"its footer has no {FOOTER_KEY.decode()} record"), schema=None)
    chunk = Chunk(row["shard"], row["identity"], row["chunk"], row["chunks"], row["start"], row["rows"], 0)
    if row["path"] != f"{row['version']}/{chunk.name}":
        problems.append(f"its name does not fit the manifest, expected {row['version']}/{chunk.name}")
    problems += [
        f"its footer says {name} {footer.get(name)!r}, the manifest {row[name]!r}"
        for name in CLAIMS
        if footer.get(name) != row[name]
    ]
    if table.num_rows != row["rows"]:
        problems.append(f"it has {table.num_rows:,} rows, the manifest says {row['rows']:,}")
    errors = table.num_rows - table.column(table.num_columns - 1).null_count
    if errors != row["errors"]:
        problems.append(f"{errors:,} of its rows have an error, the manifest says {row['errors']:,}")
    return Opened(problems=tuple(problems), schema=table.schema.remove_metadata())


def describe_difference(found: pa.Schema, expected: pa.Schema) -> str:
    """Say where two schemas part."""
    mine, theirs = ({field.name: str(field.type) for field in schema} for schema in (found, expected))
    for name in [*theirs, *mine]:
        if mine.get(name) != theirs.get(name):
            return f"its column {name!r} is {mine.get(name, 'missing')}, expected {theirs.get(name, 'none')}"
    return f"its columns are in the order {found.names}, expected {expected.names}"


def summary(numbers: list[int]) -> str:
    """A list of numbers, cut short."""
    return f"{numbers[:8]}{f' and {len(numbers) - 8} more' if len(numbers) > 8 else ''}"


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return str(error).partition("\n")[0][:300]
