"""A few rows of a shard, tokenized: enough of it is read for them, and no more."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.archive import BadShardError, Columns, is_below, open_parquet
from lib.blocks import ERROR, IDS, ScoreJob, pick, tokenize
from lib.planning import identity
from lib.reading import read_group
from lib.schema import RowError
from lib.storage import explained
from lib.tokenization import Tokenizer

STEP_BYTES = 2**20
"""Read of a column at a time: a page of most writers. Otherwise PyArrow fetches all of a row group's column at once."""

SKIPPED_BYTES = 4 * 2**20
"""Text that may be read before a window. One that lies deeper in its row group is taken from the group's beginning instead."""


@dataclass(frozen=True, slots=True)
class Window:
    """Neighbouring rows that are read as a sample."""

    number: int
    """by which the sample is told from others"""
    first: int
    """counted in the shard"""
    rows: int


@dataclass(frozen=True)
class Sampled:
    """What some windows of a shard hold."""

    counts: tuple[tuple[int, int, int, int], ...]
    """for each window, or part of one, its number, rows, tokens, rows with an error"""
    tokens: pa.Table | None
    """the rows as they travel to the predictor; None if none could be read"""


def sample_shard(
    job: ScoreJob, shard: str, shard_identity: str, windows: Sequence[Window], tokenizer: Tokenizer, whole: bool
) -> Sampled:
    """Read and tokenize windows of one shard. One that changed, or cannot be read any more, gives nothing.

    `whole`: just the rows of the windows are read, wherever they lie, and with them what stands before them. Otherwise a window ends with its row group, and may be moved.
    """
    columns = Columns(text=job.columns.text, keys=pa.schema([]))
    counts: list[tuple[int, int, int, int]] = []
    tables = []
    try:
        with explained(f"{job.archive.url}/{shard}", "read"):
            parquet, watched = open_parquet(job.archive, shard, step_bytes=STEP_BYTES)
            with watched:
                info, footer = watched.info, parquet.metadata
                if identity(info.size, info.etag, info.mtime_ns, job.chunk_bytes) != shard_identity:
                    return Sampled((), None)
                names = [footer.schema.column(index).path for index in range(footer.num_columns)]
                texts = [index for index, name in enumerate(names) if is_below(name, columns.text)]
                groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
                for index, inside in by_group(windows, [group.num_rows for group in groups], whole).items():
                    size = sum(max(0, groups[index].column(text).total_uncompressed_size) for text in texts)
                    row_bytes = max(1, size // max(1, groups[index].num_rows))
                    placed = inside if whole else [move_up(window, SKIPPED_BYTES // row_bytes) for window in inside]
                    wanted = np.unique(np.concatenate([np.arange(one.first, one.first + one.rows) for one in placed]))
                    table, at = [], 0
                    for rows in read_group(parquet, watched, index, 0, int(wanted[-1]) + 1, row_bytes, columns):
                        table.append(tokenize(tokenizer, pick(rows, at, wanted.tolist())))
                        at += len(rows.errors)
                    found = pa.concat_tables(table)
                    counts.extend(count(window, wanted, found) for window in placed)
                    tables.append(found)
    except (BadShardError, FileNotFoundError):
        return Sampled((), None)
    return Sampled(tuple(counts), pa.concat_tables(tables).combine_chunks() if tables else None)


def by_group(windows: Sequence[Window], group_rows: Sequence[int], whole: bool) -> dict[int, list[Window]]:
    """Windows by the row group that they lie in, counted there; what lies in a next one is left out, or with `whole` another window."""
    starts = [0, *accumulate(group_rows)]
    found: dict[int, list[Window]] = {}
    for window in windows:
        first, last = window.first, window.first + window.rows
        while first < min(last, starts[-1]):
            index = bisect_right(starts, first) - 1
            rows = min(last, starts[index + 1]) - first
            found.setdefault(index, []).append(Window(window.number, first - starts[index], rows))
            first = first + rows if whole else last
    return found


def move_up(window: Window, most: int) -> Window:
    """A window that begins at row `most` of its group at the latest."""
    return window if window.first <= most else Window(window.number, window.first % (most + 1), window.rows)


def count(window: Window, wanted: np.ndarray, table: pa.Table) -> tuple[int, int, int, int]:
    """A window's number, rows, tokens, and rows with an error; `table` holds the rows `wanted`."""
    part = table.slice(int(np.searchsorted(wanted, window.first)), window.rows)
    tokens = pc.sum(pc.list_value_length(part[IDS])).as_py() or 0
    errors = pc.sum(pc.not_equal(part[ERROR], RowError.NONE)).as_py() or 0
    return window.number, part.num_rows, int(tokens), int(errors)
