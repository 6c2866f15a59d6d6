"""Watching a run: its progress line, a cluster on which nothing moves, an actor that hangs, and what an error of Ray's means."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from lib import telemetry
from lib.blocks import ScoreJob
from lib.cost import Meter
from lib.errors import IncompleteError, UsageError, raise_if_stopped
from lib.outcome import Outcome
from lib.progress import Counts, read_progress, take_hung
from lib.runtime import Layout
from lib.score_config import LimitsSection

AGAIN = "finished chunks are kept, run the same command again"

Show = Callable[[Outcome], None]
"""Called about once a second, and after every chunk."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """A run that is going on."""

    job: ScoreJob
    layout: Layout
    limits: LimitsSection
    tokenizer: Any
    """reference to the run's tokenizer, see `lib.tasks.share_tokenizer`"""
    progress: Any
    """handle of the `Progress` actor"""
    outcome: Outcome
    show: Show
    meter: Meter | None = None
    """what the run costs; none: nobody counts"""
    run_id: str | None = None
    """None: this is no run, only its plan, and no metric tells of it"""

    def add(self, result: dict[str, Any]) -> None:
        """Note and count a chunk's object, given what it says of itself."""
        if self.outcome.add(result):
            telemetry.count_chunk(self.job.version, result)


class Watch:
    """Looked through about once a second while work goes on."""

    def __init__(self, run: Running) -> None:
        self.run = run
        self.moved_at, self.batches = time.monotonic(), -1

    def moved(self) -> None:
        """A chunk was finished."""
        self.moved_at = time.monotonic()
        self.show()

    def look(self) -> Counts | None:
        """Show the progress line, end actors that hang, and raise `IncompleteError` if nothing has moved for too long."""
        counts = self.show()
        if counts and counts.batches != self.batches:
            self.moved_at, self.batches = time.monotonic(), counts.batches
        for actor, chunks in take_hung(self.run.progress, self.run.limits.hang_seconds):
            print(
                f"WARNING: no micro-batch for {self.run.limits.hang_seconds:g} s (limits.hang_seconds) at {', '.join(chunks)}:"
                " the actor is ended and its work tried again",
                flush=True,
            )
            ray.kill(actor, no_restart=False)
        if time.monotonic() - self.moved_at > self.run.limits.stall_seconds:
            raise IncompleteError(describe_stall(self.run, counts))
        return counts

    def show(self) -> Counts | None:
        """Show the progress line, note the run's course, set its metrics, and count what it costs.

        Raises `StoppedError` if the process was asked to stop, `BudgetError` if the budget is spent.
        """
        raise_if_stopped()
        counts = read_progress(self.run.progress)
        outcome = self.run.outcome
        outcome.counts = counts or outcome.counts
        outcome.course.note(outcome.counts)
        if self.run.run_id is not None:
            version = self.run.job.version
            telemetry.RUN_INFO.record(1, version=version, run=self.run.run_id)
            telemetry.PLANNED_ROWS.record(outcome.planned_rows, version=version)
            telemetry.BAD_SHARDS.record(len(outcome.bad_shards), version=version)
        self.run.show(outcome)
        if self.run.meter is not None:
            self.run.meter.look()
        return counts


def explain_ray_error(error: ray.exceptions.RayError, counts: Counts) -> Exception:
    """Turn what Ray raises when a run cannot go on into our error; Ray keeps causes as text only, so tasks report theirs.

    A bug comes back as it is, with its traceback.
    """
    if counts.mistake is not None:
        return UsageError(counts.mistake)
    if isinstance(error, ray.exceptions.RayTaskError) and (counts.has_bug or not counts.failures):
        return error
    if counts.failures:
        return IncompleteError(f"{'; '.join(counts.failures)}; {AGAIN}")
    return IncompleteError(f"Ray gave up: {type(error).__name__}: {str(error).strip()[-500:]}; {AGAIN}")


def describe_stall(run: Running, counts: Counts | None) -> str:
    """Say what the run sees when nothing moves, the likeliest cause first."""
    free, total = ray.available_resources(), ray.cluster_resources()
    started = counts.num_actors if counts else 0
    causes = [
        f"only {started} of {run.layout.num_actors} actors have started" if started < run.layout.num_actors else "",
        "no CPU is free" if free.get("CPU", 0) < run.layout.task_cpus else "",
        f"reported: {'; '.join(counts.failures)}" if counts and counts.failures else "",
        f"at work: {', '.join(counts.busy)}" if counts and counts.busy else "",
    ]
    seen = f"{free.get('CPU', 0):g} of {total.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} of {total.get('GPU', 0):g} GPUs are free"
    return (
        f"no micro-batch was finished for {run.limits.stall_seconds:g} s (limits.stall_seconds): "
        f"{'; '.join([*filter(None, causes), seen])}; {AGAIN}"
    )
