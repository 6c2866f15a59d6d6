"""Progress of a run across its actors: rows and tokens of finished micro-batches, and what tasks report as failing."""

import contextlib
import gc
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lib.errors import DeniedError, TextsweepError, UsageError
from lib.throughput import Device, Throughput, add_up

SHOWN_FAILURES = 3


@dataclass
class Counts:
    """What has been scored so far, and what went wrong on the way."""

    rows: int = 0
    tokens: int = 0
    batches: int = 0
    num_actors: int = 0
    """that have started, dead ones included"""
    failures: tuple[str, ...] = ()
    """the most frequent reasons that tasks gave"""
    num_failures: int = 0
    mistake: str | None = None
    """the first reason that no further attempt would change: the model, not the infrastructure"""
    has_bug: bool = False
    """whether a task failed with an error that is not one of ours"""
    busy: tuple[str, ...] = ()
    """shards that actors are at"""
    throughput: tuple[Throughput, ...] = ()
    """what actors did, by what they compute with; blocks that are not done yet are left out"""


@dataclass
class Busy:
    """An actor that is at work."""

    shards: list[str]
    heard_at: float
    """when it began, or finished its last micro-batch"""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Progress:
    """Counts finished micro-batches of all actors, for the line that people watch, the stall check and the watchdog.

    If its process dies a new one counts from zero, which may cost some attempts more: nothing that is written or published
    rests on what it holds.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self.failures: Counter[str] = Counter()
        self.actors: dict[str, Any] = {}
        self.busy: dict[str, Busy] = {}
        self.reads: Counter[str] = Counter()
        self.done: dict[str, Throughput] = {}

    def enlist(self, actor: str, handle: Any) -> None:
        """Note an actor that predicts, so that the run can end it; one that restarted has nothing to do yet."""
        self.actors[actor] = handle
        self.busy.pop(actor, None)
        self.counts.num_actors += 1

    def dismiss(self) -> list[Any]:
        """All actors enlisted since the last call."""
        dismissed = list(self.actors.values())
        self.actors, self.busy = {}, {}
        return dismissed

    def begin(self, actor: str, handle: Any, shards: list[str]) -> None:
        self.actors[actor] = handle
        self.busy[actor] = Busy(shards, time.monotonic())

    def end(self, actor: str, life: str, done: Throughput | None) -> None:
        """A block is done; `done` is all that the actor did in this life, one that restarts has several."""
        self.busy.pop(actor, None)
        if done is not None:
            self.done[life] = done

    def add(self, actor: str, rows: int, tokens: int, batches: int) -> None:
        self.counts.rows += rows
        self.counts.tokens += tokens
        self.counts.batches += batches
        if actor in self.busy:
            self.busy[actor].heard_at = time.monotonic()

    def count_read(self, block: str) -> int:
        """How often a block's reading has begun, this time included."""
        self.reads[block] += 1
        return self.reads[block]

    def fail(self, reason: str, is_mistake: bool, is_bug: bool) -> None:
        """A task ended with an error."""
        self.failures[reason] += 1
        self.counts.num_failures += 1
        self.counts.has_bug |= is_bug
        if is_mistake and self.counts.mistake is None:
            self.counts.mistake = reason

    def note(self, reason: str) -> None:
        """Something that ends no task: a shard that changed or vanished."""
        self.failures[reason] += 1

    def read(self) -> Counts:
        self.counts.failures = tuple(
            f"{reason} ({times}x)" if times > 1 else reason
            for reason, times in self.failures.most_common(SHOWN_FAILURES)
        )
        self.counts.busy = tuple(sorted({shard for busy in self.busy.values() for shard in busy.shards}))[
            :SHOWN_FAILURES
        ]
        self.counts.throughput = add_up(list(self.done.values()))
        return self.counts

    def take_hung(self, seconds: float) -> list[tuple[Any, list[str]]]:
        """Actors, and the shards they are at, that began but finished no micro-batch for `seconds`; each is given once."""
        hung = [actor for actor, busy in self.busy.items() if time.monotonic() - busy.heard_at > seconds]
        return [(self.actors[actor], self.busy.pop(actor).shards) for actor in hung if actor in self.actors]


class Reporter:
    """Sends an actor's progress at most twice a second."""

    def __init__(self, progress: Any) -> None:
        context = ray.get_runtime_context()
        self.progress, self.actor, self.handle = progress, context.get_actor_id() or "", context.current_actor
        ray.get(progress.enlist.remote(self.actor, self.handle))
        self.rows = self.tokens = self.batches = 0
        self.sent_at = time.monotonic()
        self.life = secrets.token_hex(8)
        self.device: Device | None = None
        """what the actor computes with, once its model is loaded"""
        self.first_at = self.begun_at = self.busy_seconds = 0.0
        self.done_tokens = 0

    def begin(self, shards: list[str]) -> None:
        """A block is begun."""
        self.progress.begin.remote(self.actor, self.handle, shards)
        self.begun_at = time.monotonic()
        self.first_at = self.first_at or self.begun_at

    def end(self, tokens: int) -> None:
        """The block is done; it had so many tokens."""
        self.flush()
        now = time.monotonic()
        self.done_tokens, self.busy_seconds = self.done_tokens + tokens, self.busy_seconds + now - self.begun_at
        done = None
        if self.device is not None:
            seconds = {"seconds": now - self.first_at, "busy_seconds": self.busy_seconds}
            done = Throughput(device=self.device, actors=1, tokens=self.done_tokens, **seconds)
        self.progress.end.remote(self.actor, self.life, done)

    def __call__(self, rows: int, tokens: int) -> None:
        self.rows, self.tokens, self.batches = self.rows + rows, self.tokens + tokens, self.batches + 1
        if time.monotonic() - self.sent_at > 0.5:
            self.flush()

    def flush(self) -> None:
        self.progress.add.remote(self.actor, self.rows, self.tokens, self.batches)
        self.rows = self.tokens = self.batches = 0
        self.sent_at = time.monotonic()


@contextlib.contextmanager
def reported(progress: Any) -> Iterator[None]:
    """Tell the progress actor of every exception on its way out: Ray keeps causes as text only, and not for all blocks."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, TextsweepError)
        reason = str(error) if known else f"{type(error).__name__}: {str(error)[:300]}"
        mistake = isinstance(error, UsageError) and not isinstance(error, DeniedError)
        ray.get(progress.fail.remote(reason, mistake, not known))
        raise


def start_progress() -> Any:
    """Start the progress actor beside the driver, so that no other node's end takes it along."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Progress.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


SILENT = (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
"""What asking a progress actor that is dead, or starting again, can raise."""


def read_progress(progress: Any) -> Counts | None:
    """Ask the progress actor; None if it does not answer."""
    try:
        counts: Counts = ray.get(progress.read.remote(), timeout=5)
    except SILENT:
        return None
    return counts


def take_hung(progress: Any, seconds: float) -> list[tuple[Any, list[str]]]:
    """Ask for the actors that hang (see `Progress.take_hung`); none if the progress actor does not answer."""
    try:
        hung: list[tuple[Any, list[str]]] = ray.get(progress.take_hung.remote(seconds), timeout=5)
    except SILENT:
        return []
    return hung


def end_actors(progress: Any) -> None:
    """Kill every actor that enlisted.

    Ray Data 2.60 only drops its references to actors at the end of a pipeline. The traceback of a failed block, or a log
    record of it, keeps them alive, and with them the CPUs that the next pipeline waits for: seen as a wait without end.
    """
    with contextlib.suppress(*SILENT):
        for actor in ray.get(progress.dismiss.remote(), timeout=5):
            ray.kill(actor)
    gc.collect()  # actors that had not started yet, and so are not enlisted, hang on cycles of the same tracebacks
