"""What a run planned and did, added up wave by wave, so that a run over a million shards stays small in memory."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lib.blocks import LENGTH_EDGES, SCORE_BINS
from lib.course import Course
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

SHOWN_EXAMPLES = 5
"""Rows that a report names for each reason of an error."""

SLOWEST_SHARDS = 20
"""Shards that a report names; the others' times are only summed up."""


@dataclass
class Tally:
    """What some objects hold, added up from what each says of itself."""

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
    length_bins: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(LENGTH_EDGES) + 1, np.int64))

    def count(self, said: Mapping[str, Any]) -> None:
        """Add one object, given what stands in its footer; one that was written before lengths were counted has none."""
        self.finished_rows += said["rows"]
        self.truncated += said["truncated"]
        self.tokens += said["tokens"]
        self.errors.update(said["errors"])
        self.labels.update(said["labels"])
        self.abstained += said["abstained"]
        self.score_bins += np.array(said["score_bins"], np.int64)
        if "length_bins" in said:
            self.length_bins += np.array(said["length_bins"], np.int64)

    def plus(self, other: "Tally") -> "Tally":
        """Both together."""
        return Tally(
            self.finished_rows + other.finished_rows,
            self.truncated + other.truncated,
            self.tokens + other.tokens,
            self.errors + other.errors,
            self.labels + other.labels,
            self.abstained + other.abstained,
            self.score_bins + other.score_bins,
            self.length_bins + other.length_bins,
        )

    def record(self) -> dict[str, Any]:
        """The tally as plain JSON values."""
        return {
            "rows": self.finished_rows,
            "errors": dict(self.errors.most_common()),
            "truncated": self.truncated,
            "tokens": self.tokens,
            "labels": dict(self.labels.most_common()),
            "abstained": self.abstained,
            "score_bins": self.score_bins.tolist(),
            "length_bins": self.length_bins.tolist(),
        }


@dataclass(slots=True)
class Spent:
    """What one shard took."""

    seconds: float = 0.0
    """of reading, predicting and writing, one after the other"""
    rows: int = 0
    tokens: int = 0


@dataclass
class Outcome(Tally):
    """A run's plan and results, kept up to date while it goes on."""

    planned_chunks: int = 0
    planned_rows: int = 0
    finished_chunks: int = 0
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
    course: Course = field(default_factory=Course)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """of all chunks: reading with tokenizing, predicting, writing"""
    error_rows: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    """by reason a few rows: shard, row"""
    slowest: dict[str, Spent] = field(default_factory=dict)
    """shards of earlier waves, the slowest ones"""
    finished: set[str] = field(default_factory=set)
    """names of this wave's objects that are there"""
    found: Tally = field(default_factory=Tally)
    """what objects hold that an earlier run left, and none has published"""
    records: list[pa.Table] = field(default_factory=list)
    """what earlier waves' objects say, as `RECORD_SCHEMA`"""
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _spent: dict[str, Spent] = field(default_factory=dict)

    def plan(self, chunk: Chunk) -> None:
        """Note a chunk that this run sets out to do."""
        self.planned_chunks += 1
        self.planned_rows += chunk.num_scored

    def give_up(self, chunk: Chunk, why: str) -> None:
        """Take a planned chunk back: its shard cannot be read."""
        self.planned_chunks -= 1
        self.planned_rows -= chunk.num_scored
        self.bad_shards[chunk.shard] = why

    def add(self, result: dict[str, Any]) -> bool:
        """Note what an object says of itself (see `blocks.write_chunk`); False if that is noted already: it is left as it is."""
        if result["name"] in self.finished:
            return False
        self.finished.add(result["name"])
        self.finished_chunks += 1
        self.count(result)
        for reason, rows in result.get("error_rows", {}).items():
            known = self.error_rows.setdefault(reason, [])
            known.extend((result["shard"], row) for row in rows[: SHOWN_EXAMPLES - len(known)])
        for stage, seconds in result.get("seconds", {}).items():
            self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds
        spent = self._spent.setdefault(result["shard"], Spent())
        spent.seconds += sum(result.get("seconds", {}).values())
        spent.rows, spent.tokens = spent.rows + result["rows"], spent.tokens + result["tokens"]
        counted = {name: result[name] for name in ("start", "rows", "bytes")}
        self._rows.append({"path": result["name"], "errors": sum(result["errors"].values()), **counted})
        return True

    def close_wave(self) -> None:
        """Put the wave's records away; its names are not asked for again."""
        if self._rows:
            self.records.append(pa.Table.from_pylist(self._rows, schema=RECORD_SCHEMA))
        for shard, spent in self.slowest.items():  # a shard can lie in two waves; what is big is kept of both
            mine = self._spent.setdefault(shard, Spent())
            mine.seconds, mine.rows = mine.seconds + spent.seconds, mine.rows + spent.rows
            mine.tokens += spent.tokens
        ranked = sorted(self._spent.items(), key=lambda one: (-one[1].seconds, one[0]))
        self.slowest = {shard: spent for shard, spent in ranked[:SLOWEST_SHARDS] if spent.seconds}
        self._rows, self._spent, self.finished = [], {}, set()
        self.course.closed_at = self.course.now()

    def written(self) -> pa.Table:
        """All records of this run, as `RECORD_SCHEMA`."""
        self.close_wave()
        return pa.concat_tables([RECORD_SCHEMA.empty_table(), *self.records])
