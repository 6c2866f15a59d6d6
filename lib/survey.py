"""What jobs.score would do, found out without doing it: footers, a sample of the rows, and how fast they are scored."""

import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from lib import pipeline
from lib.actors import LoneWorker
from lib.blocks import IDS
from lib.errors import IncompleteError, TextsweepError, raise_if_stopped, say
from lib.estimate import Draws, Estimate, draw, estimate, guess_tokens
from lib.forecast import Speed, earlier_speed, given_speed
from lib.history import latest_records, records_by_version
from lib.outcome import Outcome
from lib.planning import Chunk, bundle
from lib.runtime import Layout
from lib.sampling import Sampled, Window
from lib.score_config import ForecastSection
from lib.scoring import Run
from lib.tasks import sample_shards
from lib.watch import Running

SHARDS_PER_TASK = 8

RECENT_RUNS = 20
"""Of one version that are asked how fast they were."""

MEASURED_TEXTS = 64
"""Rows that a measurement begins with."""

Object = tuple[str, str, int, int]
"""Shard, identity, chunk, chunks."""


@dataclass
class Tally:
    """The chunks of all unfinished shards, as numbers: a million of them must not become a million Python objects."""

    there: frozenset[Object] = frozenset()
    """objects of unfinished shards that are there"""
    shard: array = field(default_factory=lambda: array("l"))  # type: ignore[type-arg]
    """for each chunk with rows that is still to score: its shard's number"""
    start: array = field(default_factory=lambda: array("q"))  # type: ignore[type-arg]
    rows: array = field(default_factory=lambda: array("q"))  # type: ignore[type-arg]
    """to score"""
    text_bytes: array = field(default_factory=lambda: array("q"))  # type: ignore[type-arg]
    block: array = field(default_factory=lambda: array("l"))  # type: ignore[type-arg]
    """its block's number"""
    only: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """by the number of a chunk of which not all rows are scored: those that are, counted in the shard"""
    shards: list[tuple[str, str]] = field(default_factory=list)
    """name and identity of each shard that has a chunk to score"""
    num_blocks: int = 0
    """that jobs.score would run, also those that are there already"""

    def add(self, block: tuple[Chunk, ...]) -> None:
        """Take a block apart."""
        for chunk in block:
            if (chunk.shard, chunk.identity, chunk.index, chunk.count) in self.there:
                continue
            if not self.shards or self.shards[-1][0] != chunk.shard:
                self.shards.append((chunk.shard, chunk.identity))
            if chunk.only is not None:
                self.only[len(self.rows)] = chunk.only
            self.shard.append(len(self.shards) - 1)
            self.start.append(chunk.start)
            self.rows.append(chunk.num_scored)
            self.text_bytes.append(chunk.text_bytes * chunk.num_scored // chunk.rows)
            self.block.append(self.num_blocks)
        self.num_blocks += 1

    def numbers(self, name: str) -> npt.NDArray[np.int64]:
        """A column as an array."""
        return np.array(getattr(self, name), np.int64)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was found out."""

    tally: Tally
    outcome: Outcome
    """planned chunks and rows, and bad shards, as run.json of the next run will have them"""
    tokens: Estimate | None
    """of the rows that are still to score; None if no row could be read"""
    sampled_rows: int
    sampled_errors: int
    block_guesses: npt.NDArray[np.float64]
    """(blocks,), how the tokens are spread"""
    sample: pa.Table | None
    """the sampled rows, tokenized"""
    sampling_seconds: float
    """that a run does not need"""


def count_shards(run: Run) -> dict[str, int]:
    """Shards by what a run would do with them; those that turn out to be bad are among those to do."""
    names = ["path", "identity"]
    todo = run.unfinished.select(names)
    begun = run.objects.group_by(["shard", "identity"]).aggregate([])
    known = pa.concat_tables([begun.select(["shard", "identity"]), run.before.select(["shard", "identity"])])
    is_begun = todo.join(begun, names, ["shard", "identity"], join_type="left semi")
    fresh = todo.join(begun, names, ["shard", "identity"], join_type="left anti")
    others = known.join(todo, ["shard", "identity"], names, join_type="left anti")
    changed = fresh.join(others.group_by("shard").aggregate([]), "path", "shard", join_type="left semi")
    gone = run.before.select(["shard"]).group_by("shard").aggregate([])
    gone = gone.join(run.shards.select(["path"]), "shard", "path", join_type="left anti")
    return {
        "all": run.shards.num_rows,
        "finished": run.finished.num_rows,
        "to_do": todo.num_rows,
        "new": fresh.num_rows - changed.num_rows,
        "changed": changed.num_rows,
        "begun": is_begun.num_rows,
        "deleted": 0 if run.selection is not None else gone.num_rows,
    }


def objects_there(run: Run) -> frozenset[Object]:
    """The objects of shards that are not finished."""
    todo = run.unfinished.select(["path", "identity"]).rename_columns(["shard", "identity"])
    found = run.objects.join(todo, ["shard", "identity"], join_type="left semi")
    return frozenset(zip(*(found[name].to_pylist() for name in run.objects.column_names), strict=True))


def tally_chunks(chunks: Iterable[Chunk], there: frozenset[Object], chunk_bytes: int) -> Tally:
    """Count the chunks of unfinished shards, in the blocks that jobs.score would make of them."""
    tally = Tally(there)
    for block in bundle((chunk for chunk in chunks if chunk.rows), chunk_bytes):
        tally.add(block)
    return tally


def take_survey(run: Run, layout: Layout, seed: int = 0) -> tuple[Survey, Running]:
    """Read the footers of all unfinished shards, and a few of their rows. Writes nothing; returns what the tasks shared, too."""
    running = pipeline.start(run.job, layout, run.config.limits, show_footers())
    selected = run.selection.rows if run.selection else None
    tally = tally_chunks(
        pipeline.plan_chunks(running, run.unfinished, selected), objects_there(run), run.job.chunk_bytes
    )
    rows, texts = tally.numbers("rows"), tally.numbers("text_bytes")
    most = run.job.max_length * (run.job.windows.most if run.job.windows else 1)
    guesses = guess_tokens(rows, texts, most)
    blocks = np.bincount(tally.numbers("block"), weights=guesses, minlength=tally.num_blocks).astype(np.float64)
    if not len(rows):
        nothing = Estimate(value=0.0, low=0.0, high=0.0)
        return Survey(
            tally=tally,
            outcome=running.outcome,
            tokens=nothing,
            sampled_rows=0,
            sampled_errors=0,
            block_guesses=blocks,
            sample=None,
            sampling_seconds=0.0,
        ), running
    begun = time.monotonic()
    chance, wanted = np.random.default_rng(seed), run.config.forecast.sample_rows
    draws = draw(rows, guesses, chance, wanted, may_be_census=selected is None)
    counts, tables = np.zeros((len(draws.unit), 3), np.int64), []
    for sampled in read_sample(running, tally, draws):
        for number, *found in sampled.counts:
            counts[number] += found
        tables += [] if sampled.tokens is None else [sampled.tokens]
    unread = int((counts[:, 0] == 0).sum())
    if unread:
        say(f"WARNING: {unread:,} of {len(counts):,} parts of the sample could not be read, and are left out")
    return Survey(
        tally=tally,
        outcome=running.outcome,
        tokens=estimate(draws, counts[:, 1], counts[:, 0]),
        sampled_rows=int(counts[:, 0].sum()),
        sampled_errors=int(counts[:, 2].sum()),
        block_guesses=blocks,
        sample=pa.concat_tables(tables) if tables else None,
        sampling_seconds=time.monotonic() - begun,
    ), running


def windows_of(tally: Tally, draws: Draws) -> dict[tuple[str, str], list[Window]]:
    """The windows of a sample by the shard, with its identity, that they lie in; a row that stands alone is one of its own."""
    found: dict[tuple[str, str], list[Window]] = {}
    for number, unit in enumerate(draws.unit.tolist()):
        first, rows = int(draws.first[number]), int(draws.rows[number])
        places = [(tally.start[unit] + first, rows)]
        if unit in tally.only:
            places = [(row, 1) for row in tally.only[unit][first : first + rows]]
        windows = found.setdefault(tally.shards[tally.shard[unit]], [])
        windows += [Window(number, *place) for place in places]
    return found


def read_sample(running: Running, tally: Tally, draws: Draws) -> Iterator[Sampled]:
    """Read the windows of a sample, those of a few shards in each task.

    Raises `IncompleteError` if the cluster fails, or has read nothing for `limits.stall_seconds`.
    """
    wanted = windows_of(tally, draws)
    names = list(wanted)
    tasks = [
        sample_shards.remote(
            running.job,
            {name: wanted[name] for name in names[start : start + SHARDS_PER_TASK]},
            [running.tokenizer],
            draws.is_census or bool(tally.only),
        )
        for start in range(0, len(names), SHARDS_PER_TASK)
    ]
    for task in tasks:
        try:
            found = wait(task, running.limits.stall_seconds)
        except ray.exceptions.WorkerCrashedError:  # a page that PyArrow does not survive: the run finds out which
            continue
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, TextsweepError) else error from error
        except ray.exceptions.RayError as error:
            raise IncompleteError(
                f"a sample could not be read: {explained(error)}; run the same command again"
            ) from error
        yield from found


def show_footers() -> Any:
    """A line now and then while footers are read."""
    shown = time.monotonic()

    def show(outcome: Outcome) -> None:
        nonlocal shown
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            say(f"planning: {outcome.planned_chunks:,} chunks, {outcome.planned_rows:,} rows so far")

    return show


def find_speed(run: Run, survey: Survey, running: Running, is_gpu: bool, is_here: bool) -> tuple[Speed | None, str]:
    """How fast it will be: as the configuration says, as an earlier run was, as is measured now; or None, and why nobody knows.

    `is_here`: whether there is a device of the kind to measure.
    """
    if (speed := known_speed(run, is_gpu)) is not None:
        return speed, ""
    if not is_here:
        return None, "there is none here to measure"
    if not run.config.forecast.measure_seconds:
        return None, "forecast.measure_seconds = 0 keeps it from being measured"
    rows = (
        None if survey.sample is None else survey.sample.filter(pc.greater(pc.list_value_length(survey.sample[IDS]), 0))
    )
    if rows is None or not rows.num_rows:
        return None, "not one of the sampled rows is good enough to measure with"
    try:
        return measure(running, rows, run.config.forecast), ""
    except ray.exceptions.RayError as error:
        return None, f"measuring it failed ({explained(error)})"


def known_speed(run: Run, is_gpu: bool) -> Speed | None:
    """The speed that the configuration gives, or that an earlier run of this model reached."""
    wanted = run.config.forecast
    if (speed := given_speed(wanted)) is not None:
        return speed
    mine = latest_records(run.job.output, RECENT_RUNS)
    if (speed := earlier_speed(mine, is_gpu, wanted.device, "of this version")) is not None:
        return speed
    others = (
        [record for record in records if is_alike(record, run)]
        for records in records_by_version(run.output, run.job.version, RECENT_RUNS)
    )
    speeds = (earlier_speed(some, is_gpu, wanted.device, "of another version of this model") for some in others)
    return next(filter(None, speeds), None)


def is_alike(record: dict[str, Any], run: Run) -> bool:
    """Whether a run had the same weights, and computed in the same way."""
    model = record.get("config", {}).get("model", {})
    same = all(model.get(name) == getattr(run.config.model, name) for name in ("precision", "engine"))
    return same and record.get("model_digest") == run.job.model_digest


def measure(running: Running, rows: pa.Table, wanted: ForecastSection) -> Speed:
    """Score some rows of a sample, none of them bad, on one actor of the cluster. Raises Ray's error if none can be had."""
    layout, begun = running.layout, time.monotonic()
    options = {"num_cpus": layout.actor_cpus, "num_gpus": layout.actor_gpus}
    say(f"measuring how fast the model is here, for {wanted.measure_seconds:g} s (forecast.measure_seconds)")
    worker = LoneWorker.options(**options).remote(running.job, layout.threads, running.progress)  # type: ignore[attr-defined]
    chosen = np.random.default_rng(0).permutation(rows.num_rows)[:MEASURED_TEXTS]
    try:
        wait(worker.ready.remote(), running.limits.stall_seconds)
        started = time.monotonic() - begun
        found = wait(
            worker.measure.remote(rows.take(pa.array(chosen)), wanted.measure_seconds), running.limits.stall_seconds
        )
    finally:
        ray.kill(worker)
    return Speed(
        per_unit=found.per_unit,
        source=f"measured here for {found.seconds:.1f} s",
        device=found.device,
        starting_seconds=started,
    )


def explained(error: ray.exceptions.RayError) -> str:
    """What Ray says, as far as it fits a line."""
    return f"{type(error).__name__}: {str(error).strip()[-300:]}"


def wait(reference: Any, seconds: float) -> Any:
    """Wait for an answer. Raises `GetTimeoutError` after so long."""
    deadline = time.monotonic() + seconds
    while not ray.wait([reference], timeout=1)[0]:
        raise_if_stopped()
        if time.monotonic() > deadline:
            raise ray.exceptions.GetTimeoutError(f"no answer in {seconds:g} s (limits.stall_seconds)")
    return ray.get(reference)
