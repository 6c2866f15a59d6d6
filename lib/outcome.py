"""What a run planned and did, added up wave by wave, so that a run over a million shards stays small in memory."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lib.blocks import SCORE_BINS
from lib.errors import BudgetError
from lib.planning import Chunk
from lib.progress import Counts

RECORD_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("start", pa.int64()),
        ("rows", pa.int64()),
        ("errors", pa.int64()),
        ("bytes", pa.int64()),
    ]
)
"""One row for each object that this run wrote or found: its name in the version's folder, and what its footer says."""


@dataclass
class Outcome:
    """A run's plan and results, kept up to date while it goes on."""

    planned_chunks: int = 0
    planned_rows: int = 0
    finished_chunks: int = 0
    finished_rows: int = 0
    """in objects that are there"""
    truncated: int = 0
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """rows by reason"""
    labels: Counter[str] = field(default_factory=Counter)
    abstained: int = 0
    """rows without an error that get no label, since the model is not sure enough"""
    score_bins: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(SCORE_BINS, np.int64))
    bad_shards: dict[str, str] = field(default_factory=dict)
    """shards without a readable footer or the right columns, and why"""
    changed: set[str] = field(default_factory=set)
    """shards whose content was not the planned one any more"""
    missing: list[str] = field(default_factory=list)
    """objects that are not there after every attempt"""
    guilty: dict[str, list[int]] = field(default_factory=dict)
    """rows that killed the process that scored them, by shard"""
    counts: Counts = field(default_factory=Counts)
    over_budget: BudgetError | None = None
    """why the run ended before its work did"""
    marks: dict[str, float] = field(default_factory=dict)
    """when what first happened, by `time.monotonic`: planned (the first wave), begun (the first block), ended"""
    finished: set[str] = field(default_factory=set)
    """names of this wave's objects that are there"""
    records: list[pa.Table] = field(default_factory=list)
    """what earlier waves' objects say, as `RECORD_SCHEMA`"""
    _rows: list[dict[str, Any]] = field(default_factory=list)

    def mark(self, event: str) -> None:
        """Note that something happened, if it is the first time."""
        self.marks.setdefault(event, time.monotonic())

    def plan(self, chunk: Chunk) -> None:
        """Note a chunk that this run sets out to do."""
        self.planned_chunks += 1
        self.planned_rows += chunk.num_scored

    def give_up(self, chunk: Chunk, why: str) -> None:
        """Take a planned chunk back: its shard cannot be read."""
        self.planned_chunks -= 1
        self.planned_rows -= chunk.num_scored
        self.bad_shards[chunk.shard] = why

    def add(self, result: dict[str, Any]) -> None:
        """Note what an object says of itself (see `blocks.write_chunk`); one that is noted already is left as it is."""
        if result["name"] in self.finished:
            return
        self.finished.add(result["name"])
        self.finished_chunks += 1
        self.finished_rows += result["rows"]
        self.truncated += result["truncated"]
        self.tokens += result["tokens"]
        self.errors.update(result["errors"])
        self.labels.update(result["labels"])
        self.abstained += result["abstained"]
        self.score_bins += np.array(result["score_bins"], np.int64)
        counted = {name: result[name] for name in ("start", "rows", "bytes")}
        self._rows.append({"path": result["name"], "errors": sum(result["errors"].values()), **counted})

    def close_wave(self) -> None:
        """Put the wave's records away; its names are not asked for again."""
        if self._rows:
            self.records.append(pa.Table.from_pylist(self._rows, schema=RECORD_SCHEMA))
        self._rows, self.finished = [], set()

    def written(self) -> pa.Table:
        """All records of this run, as `RECORD_SCHEMA`."""
        self.close_wave()
        return pa.concat_tables([RECORD_SCHEMA.empty_table(), *self.records])
