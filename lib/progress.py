"""Progress of a run across its actors: rows and tokens of finished micro-batches, and what tasks report as failing.

The progress actor also keeps the metrics of all that (`lib.telemetry`): one process, whose time series are one each.
"""

import contextlib
import gc
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lib import telemetry
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
    """chunks that actors are at"""
    throughput: tuple[Throughput, ...] = ()
    """what actors did, by what they compute with; blocks that are not done yet are left out"""
    num_busy: int = 0
    """actors that have a block"""
    actor_seconds: dict[str, float] = field(default_factory=dict)
    """of all actors together, by state: starting, idle, busy"""
    padding: int = 0
    """tokens computed for nothing"""


@dataclass
class Busy:
    """An actor that is at work."""

    chunks: list[str]
    heard_at: float
    """when it began, or finished its last micro-batch"""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Progress:
    """Counts finished micro-batches of all actors, for the line that people watch, the stall check and the watchdog.

    If its process dies a new one counts from zero, which may cost some attempts more: nothing that is written or published
    rests on what it holds.
    """

    def __init__(self, version: str = "") -> None:
        self.version = version
        self.counts = Counts()
        self.failures: Counter[str] = Counter()
        self.actors: dict[str, Any] = {}
        self.starting: set[str] = set()
        self.busy: dict[str, Busy] = {}
        self.budgets: dict[str, int] = {}
        self.reads: Counter[str] = Counter()
        self.done: dict[str, Throughput] = {}
        self.waiting: set[str] = set()
        self.seen_at = time.monotonic()

    def enlist(self, actor: str, handle: Any) -> None:
        """Note an actor that predicts, so that the run can end it; one that restarted has nothing to do yet."""
        self.measure()
        self.actors[actor] = handle
        self.starting.add(actor)
        self.busy.pop(actor, None)
        self.counts.num_actors += 1

    def ready(self, actor: str, budget: int) -> None:
        """Its model is loaded."""
        self.measure()
        self.starting.discard(actor)
        self.budgets[actor] = budget

    def dismiss(self) -> list[Any]:
        """All actors enlisted since the last call."""
        self.measure()
        dismissed = list(self.actors.values())
        self.actors, self.busy, self.budgets = {}, {}, {}
        self.starting, self.waiting = set(), set()
        return dismissed

    def queue(self, block: str) -> None:
        """A block is tokenized and waits for an actor."""
        self.waiting.add(block)

    def begin(self, actor: str, handle: Any, chunks: list[str], block: str = "") -> None:
        self.measure()
        self.actors[actor] = handle
        self.starting.discard(actor)
        self.waiting.discard(block)
        self.busy[actor] = Busy(chunks, time.monotonic())

    def end(
        self, actor: str, life: str = "", done: Throughput | None = None, padding: int = 0, budget: int = 0
    ) -> None:
        """A block is done; `done` is all that the actor did in this life, one that restarts has several."""
        self.measure()
        self.busy.pop(actor, None)
        if done is not None:
            self.done[life] = done
        self.counts.padding += padding
        telemetry.PADDING.record(padding, version=self.version)
        if budget:
            self.budgets[actor] = budget

    def add(self, actor: str, rows: int, tokens: int, batches: int) -> None:
        self.counts.rows += rows
        self.counts.tokens += tokens
        self.counts.batches += batches
        telemetry.SCORED_ROWS.record(rows, version=self.version)
        telemetry.TOKENS.record(tokens, version=self.version)
        if actor in self.busy:
            self.busy[actor].heard_at = time.monotonic()

    def measure(self) -> None:
        """Give the time since the last call to the states that actors were in, before one of them changes."""
        now = time.monotonic()
        states = {"starting": len(self.starting), "busy": len(self.busy)}
        states["idle"] = max(0, len(self.actors) - sum(states.values()))
        for state, number in states.items():
            seconds = number * (now - self.seen_at)
            self.counts.actor_seconds[state] = self.counts.actor_seconds.get(state, 0.0) + seconds
            telemetry.ACTOR_SECONDS.record(seconds, version=self.version, state=state)
            telemetry.ACTORS.record(number, version=self.version, state=state)
        self.seen_at = now

    def count_read(self, block: str) -> int:
        """How often a block's reading has begun, this time included."""
        self.reads[block] += 1
        return self.reads[block]

    def fail(self, reason: str, is_mistake: bool, is_bug: bool) -> None:
        """A task ended with an error."""
        self.failures[reason] += 1
        kind = "mistake" if is_mistake else "bug" if is_bug else "trouble"
        telemetry.FAILURES.record(1, version=self.version, kind=kind)
        self.counts.num_failures += 1
        self.counts.has_bug |= is_bug
        if is_mistake and self.counts.mistake is None:
            self.counts.mistake = reason

    def note(self, reason: str) -> None:
        """Something that ends no task: a shard that changed or vanished."""
        self.failures[reason] += 1

    def read(self) -> Counts:
        """What there is to know; asked about once a second, which keeps the gauges fresh."""
        self.measure()
        telemetry.WAITING.record(len(self.waiting), version=self.version)
        if self.budgets:
            telemetry.BUDGET.record(min(self.budgets.values()), version=self.version)
        self.counts.num_busy = len(self.busy)
        self.counts.failures = tuple(
            f"{reason} ({times}x)" if times > 1 else reason
            for reason, times in self.failures.most_common(SHOWN_FAILURES)
        )
        self.counts.busy = tuple(sorted({chunk for busy in self.busy.values() for chunk in busy.chunks}))[
            :SHOWN_FAILURES
        ]
        self.counts.throughput = add_up(list(self.done.values()))
        return self.counts

    def take_hung(self, seconds: float) -> list[tuple[Any, list[str]]]:
        """Actors, and the chunks they are at, that began but finished no micro-batch for `seconds`; each is given once."""
        hung = [actor for actor, busy in self.busy.items() if time.monotonic() - busy.heard_at > seconds]
        return [(self.actors[actor], self.busy.pop(actor).chunks) for actor in hung if actor in self.actors]


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

    def ready(self, budget: int, device: Device) -> None:
        """The model is loaded; `budget`: tokens of one forward pass."""
        self.device = device
        self.progress.ready.remote(self.actor, budget)

    def begin(self, chunks: list[str], block: str = "") -> None:
        """A block of these chunks is begun; it is called by its first chunk's name."""
        self.progress.begin.remote(self.actor, self.handle, chunks, block)
        self.begun_at = time.monotonic()
        self.first_at = self.first_at or self.begun_at

    def end(self, tokens: int, padding: int = 0, budget: int = 0) -> None:
        """The block is done; it had so many tokens, and so many of padding."""
        self.flush()
        now = time.monotonic()
        self.done_tokens, self.busy_seconds = self.done_tokens + tokens, self.busy_seconds + now - self.begun_at
        done = None
        if self.device is not None:
            seconds = {"seconds": now - self.first_at, "busy_seconds": self.busy_seconds}
            done = Throughput(device=self.device, lives=1, tokens=self.done_tokens, **seconds)
        self.progress.end.remote(self.actor, self.life, done, padding, budget)

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


def start_progress(version: str = "") -> Any:
    """Start the progress actor of a run that scores a version beside the driver, so that no other node's end takes it along."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Progress.options(scheduling_strategy=here).remote(version)  # type: ignore[attr-defined]


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
