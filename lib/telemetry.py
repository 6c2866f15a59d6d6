"""Metrics of scoring runs for Prometheus, through Ray: every node's Ray agent exports them, with `ray_` before each name.

All names stand here, and nowhere else. Nothing is recorded a row at a time: the driver counts each finished chunk, the progress
actor what actors tell it twice a second. Shares (padding, idle actors) are left to queries: `rate` of one counter by that of others.
Without an agent, or without Ray, recording does nothing.

Labels have few values: a version of a model, reasons and states named in this program. A run's name is on `textsweep_run_info` alone.
"""

import functools
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ray.util import metrics

EXPORTED_PREFIX = "ray_"
"""What Ray 2.60 puts before the names of an application's metrics."""

CHUNK_SECONDS_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1_000)
"""A chunk takes seconds by design; a tiny one a hundredth, one that waits for a sick store minutes."""


class Kind(StrEnum):
    """Prometheus' types of metrics."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """One metric: what it is called, what it means, and which labels it has."""

    name: str
    """without Ray's prefix; counters end in `_total`, and a unit stands at the end of the rest"""
    kind: Kind
    help: str
    labels: tuple[str, ...] = ("version",)

    @property
    def series(self) -> tuple[str, ...]:
        """The names that a query can ask for."""
        full = EXPORTED_PREFIX + self.name
        return tuple(full + end for end in ("_bucket", "_sum", "_count")) if self.kind is Kind.HISTOGRAM else (full,)

    def record(self, value: float, **labels: str) -> None:
        """Add to a counter, set a gauge, or observe a value."""
        made = instrument(self)
        if self.kind is Kind.GAUGE:
            made.set(value, tags=labels)
        elif self.kind is Kind.HISTOGRAM:
            made.observe(value, tags=labels)
        elif value > 0:  # Ray refuses to add nothing
            made.inc(value, tags=labels)


@functools.cache
def instrument(metric: Metric) -> Any:
    """Ray's object for a metric, one a process."""
    if metric.kind is Kind.HISTOGRAM:
        return metrics.Histogram(metric.name, metric.help, list(CHUNK_SECONDS_BOUNDS), metric.labels)
    made = metrics.Counter if metric.kind is Kind.COUNTER else metrics.Gauge
    return made(metric.name, metric.help, metric.labels)


ROWS = Metric("textsweep_rows_total", Kind.COUNTER, "Rows in finished objects, those with an error included")
CHUNKS = Metric("textsweep_chunks_total", Kind.COUNTER, "Finished objects")
BYTES = Metric("textsweep_written_bytes_total", Kind.COUNTER, "Bytes of finished objects")
TRUNCATED = Metric("textsweep_truncated_rows_total", Kind.COUNTER, "Rows whose text was cut at the length limit")
ERRORS = Metric(
    "textsweep_errors_total", Kind.COUNTER, "Rows with an error in finished objects, by reason", ("version", "reason")
)
CHUNK_SECONDS = Metric(
    "textsweep_chunk_seconds",
    Kind.HISTOGRAM,
    "Seconds that a chunk took to be read and tokenized, predicted, or written; a block's time is shared out by tokens",
    ("version", "stage"),
)
PLANNED_ROWS = Metric("textsweep_planned_rows", Kind.GAUGE, "Rows that this run has found to do so far")
BAD_SHARDS = Metric("textsweep_bad_shards", Kind.GAUGE, "Shards of this run that cannot be read")
RUN_INFO = Metric("textsweep_run_info", Kind.GAUGE, "1 while a run goes on", ("version", "run"))

SCORED_ROWS = Metric(
    "textsweep_scored_rows_total", Kind.COUNTER, "Rows of finished micro-batches; what is tried again counts again"
)
TOKENS = Metric("textsweep_tokens_total", Kind.COUNTER, "Tokens of finished micro-batches, padding not included")
PADDING = Metric(
    "textsweep_padding_tokens_total", Kind.COUNTER, "Padding of micro-batches, told at the end of each block"
)
BUDGET = Metric(
    "textsweep_budget_tokens", Kind.GAUGE, "Tokens of one forward pass, padding included: the smallest of all actors"
)
ACTORS = Metric("textsweep_actors", Kind.GAUGE, "Actors that load the model, wait, or score", ("version", "state"))
ACTOR_SECONDS = Metric(
    "textsweep_actor_seconds_total", Kind.COUNTER, "Time of all actors in each state", ("version", "state")
)
WAITING = Metric("textsweep_waiting_blocks", Kind.GAUGE, "Blocks that are tokenized and wait for an actor")
FAILURES = Metric(
    "textsweep_task_failures_total", Kind.COUNTER, "Tasks that ended with an error: trouble, mistake or bug",
    ("version", "kind"),
)  # fmt: skip

METRICS = (ROWS, CHUNKS, BYTES, TRUNCATED, ERRORS, CHUNK_SECONDS, PLANNED_ROWS, BAD_SHARDS, RUN_INFO, SCORED_ROWS, TOKENS, PADDING,
           BUDGET, ACTORS, ACTOR_SECONDS, WAITING, FAILURES)  # fmt: skip


def count_chunk(version: str, result: dict[str, Any]) -> None:
    """Count a finished chunk, given what its object says of itself (see `blocks.write_chunk`)."""
    ROWS.record(result["rows"], version=version)
    CHUNKS.record(1, version=version)
    BYTES.record(result["bytes"], version=version)
    TRUNCATED.record(result["truncated"], version=version)
    for reason, rows in result["errors"].items():
        ERRORS.record(rows, version=version, reason=reason)
    for stage, seconds in result.get("seconds", {}).items():
        CHUNK_SECONDS.record(seconds, version=version, stage=stage)
