"""Progress of a run across its actors: rows and tokens of finished micro-batches, and what tasks report as failing."""

import contextlib
import gc
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray

SHOWN_FAILURES = 3


@dataclass
class Counts:
    """What has been scored so far, and what went wrong on the way."""

    rows: int = 0
    tokens: int = 0
    batches: int = 0
    failures: tuple[str, ...] = ()
    """the most frequent reasons that tasks gave"""
    mistake: str | None = None
    """the first reason that no further attempt would change: the model, not the infrastructure"""


@ray.remote(num_cpus=0)
class Progress:
    """Counts finished micro-batches of all actors, for the line that people watch and the stall check."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.failures: Counter[str] = Counter()
        self.actors: list[Any] = []

    def enlist(self, actor: Any) -> None:
        """Note an actor that predicts, so that the run can end it."""
        self.actors.append(actor)

    def dismiss(self) -> list[Any]:
        """All actors enlisted since the last call."""
        dismissed, self.actors = self.actors, []
        return dismissed

    def add(self, rows: int, tokens: int, batches: int) -> None:
        self.counts.rows += rows
        self.counts.tokens += tokens
        self.counts.batches += batches

    def fail(self, reason: str, is_mistake: bool = False) -> None:
        self.failures[reason] += 1
        if is_mistake and self.counts.mistake is None:
            self.counts.mistake = reason

    def read(self) -> Counts:
        self.counts.failures = tuple(
            f"{reason} ({times}x)" if times > 1 else reason
            for reason, times in self.failures.most_common(SHOWN_FAILURES)
        )
        return self.counts


class Reporter:
    """Sends an actor's progress at most twice a second."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress
        self.rows = self.tokens = self.batches = 0
        self.sent_at = time.monotonic()

    def __call__(self, rows: int, tokens: int) -> None:
        self.rows, self.tokens, self.batches = self.rows + rows, self.tokens + tokens, self.batches + 1
        if time.monotonic() - self.sent_at > 0.5:
            self.flush()

    def flush(self) -> None:
        self.progress.add.remote(self.rows, self.tokens, self.batches)
        self.rows = self.tokens = self.batches = 0
        self.sent_at = time.monotonic()


def read_progress(progress: Any) -> Counts | None:
    """Ask the progress actor; None if it does not answer."""
    try:
        counts: Counts = ray.get(progress.read.remote(), timeout=5)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
        return None
    return counts


def end_actors(progress: Any) -> None:
    """Kill every actor that enlisted.

    Ray Data 2.60 only drops its references to actors at the end of a pipeline. The traceback of a failed block, or a log
    record of it, keeps them alive, and with them the CPUs that the next pipeline waits for: seen as a wait without end.
    """
    with contextlib.suppress(ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
        for actor in ray.get(progress.dismiss.remote(), timeout=5):
            ray.kill(actor)
    gc.collect()  # actors that had not started yet, and so are not enlisted, hang on cycles of the same tracebacks
