"""How long a run would take and what it would cost, from its blocks, the speed of one actor and what else takes time.

Pure arithmetic; what goes in was listed, sampled or measured.
"""

import heapq
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lib.cost import Usage
from lib.errors import UsageError
from lib.estimate import Estimate
from lib.planning import MAX_WAVE_BLOCKS
from lib.runtime import Cluster, Layout, Node
from lib.score_config import ForecastSection
from lib.throughput import Device, Throughput

BLOCK_SECONDS = 0.023
"""What the driver takes for each block, whatever it holds (2,000 blocks of trivial work on two cores)."""

STARTING_SECONDS = 15.0
"""Until the first block is begun, where no run has told: 3 to 4 s for a reading process, 5 to 10 for a model, on two cores."""

FINISHING_SECONDS = 2.0
"""Listing, manifest, pointer, report, where no run has told."""

GPUS_PER_NODE, CPUS_PER_GPU, CPUS_PER_NODE = 8, 8, 8
"""Of a cluster that is described by a part of these."""

LONG_ENOUGH_SECONDS = 10.0
"""That each actor of an earlier run must have worked, on average, for the run to be believed before others."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast one GPU, or one thread of a processor, is, and who says so."""

    per_unit: float
    """tokens a second"""
    source: str
    device: Device | None = None
    starting_seconds: float = STARTING_SECONDS
    finishing_seconds: float = FINISHING_SECONDS


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds of each part of a run, and what it costs."""

    planning_seconds: float
    starting_seconds: float
    scoring_seconds: Estimate
    finishing_seconds: float
    cost: Estimate | None
    """None if nothing has a price"""

    @property
    def seconds(self) -> Estimate:
        """From the command to its end."""
        rest = self.planning_seconds + self.starting_seconds + self.finishing_seconds
        scoring = self.scoring_seconds
        return Estimate(value=scoring.value + rest, low=scoring.low + rest, high=scoring.high + rest)


def described_cluster(wanted: ForecastSection) -> Cluster:
    """The cluster that a configuration describes, its nodes alike."""
    gpus = wanted.gpus or 0
    nodes = wanted.nodes or max(1, math.ceil(gpus / GPUS_PER_NODE))
    cpus = wanted.cpus or max(CPUS_PER_GPU * gpus, CPUS_PER_NODE * nodes)
    return Cluster((Node(cpus=cpus / nodes, gpus=gpus / nodes),) * nodes)


def meant(asked: str, names: Iterable[str]) -> list[str]:
    """The devices that a name, or a part of one, stands for: the one that is called exactly so, whatever the case; else all it fits.

    A part begins a word and ends no number in its middle: A10 is no part of A100, nor L4 of L40S.
    """
    same = [name for name in names if name.lower() == asked.lower()]
    return same or [name for name in names if is_part(asked, name) or is_part(name, asked)]


def is_part(part: str, name: str) -> bool:
    """Whether a part stands in a name, see `meant`."""
    return re.search(rf"(?<![a-z0-9]){re.escape(part.lower())}(?![0-9])", name.lower()) is not None


def earlier_speed(records: Sequence[dict[str, object]], is_gpu: bool, device: str | None, source: str) -> Speed | None:
    """The speed that the latest of some runs reached with such devices; of runs that were too short the longest.

    `records` are `run.json` of each, the latest first. Raises `UsageError` if `device` stands for several of them.
    """
    done = [
        (found, record)
        for record in records
        for found in map(Throughput.model_validate, record.get("throughput", []))  # type: ignore[call-overload]
        if found.device.is_gpu == is_gpu and found.tokens_per_second
    ]
    if device is not None:
        names = meant(device, sorted({found.device.name for found, _ in done}))
        if len(names) > 1:
            raise UsageError(
                f"forecast.device = {device!r} fits {', '.join(map(repr, names))}, which earlier runs had: set it to one of these"
            )
        done = [(found, record) for found, record in done if found.device.name in names]
    if not done:
        return None
    long = (one for one in done if one[0].seconds_each >= LONG_ENOUGH_SECONDS)
    return told_by(*next(long, max(done, key=lambda one: one[0].seconds_each)), source)


def told_by(found: Throughput, record: dict[str, object], source: str) -> Speed:
    """What a run's record says."""
    phases: dict[str, float] = record.get("phases", {})  # type: ignore[assignment]
    short = (
        ""
        if found.seconds_each >= LONG_ENOUGH_SECONDS
        else f", whose actors worked for {found.seconds_each:.0f} s only"
    )
    return Speed(
        per_unit=found.per_unit,
        source=f"run {record.get('run_id')} {source}{short}",
        device=found.device,
        starting_seconds=phases.get("starting", STARTING_SECONDS),
        finishing_seconds=phases.get("finishing", FINISHING_SECONDS),
    )


def given_speed(wanted: ForecastSection) -> Speed | None:
    """The speed that the configuration gives. Raises `UsageError` if it gives several and does not say which."""
    given = wanted.tokens_per_second
    if given is None:
        return None
    if not isinstance(given, dict):
        return Speed(per_unit=given, source="forecast.tokens_per_second")
    fitting = list(given) if wanted.device is None else meant(wanted.device, given)
    if len(fitting) != 1:
        raise UsageError(
            f"forecast.tokens_per_second has {', '.join(given)}, and forecast.device = {wanted.device!r} does not say which of them:"
            " set it to one of these"
        )
    return Speed(per_unit=given[fitting[0]], source=f"forecast.tokens_per_second of {fitting[0]}")


def makespan(seconds: npt.NDArray[np.float64], actors: int) -> float:
    """When the last of some blocks is done, if each goes to the actor that is free first, in order."""
    free = [0.0] * min(actors, max(1, len(seconds)))
    for one in seconds.tolist():
        heapq.heapreplace(free, free[0] + one)
    return max(free)


def scoring_seconds(
    block_tokens: npt.NDArray[np.float64],
    actors: int,
    actor_speed: float,
    starting: float,
    wave_blocks: int = MAX_WAVE_BLOCKS,
    driver_seconds: float = BLOCK_SECONDS,
) -> float:
    """Seconds from the first block's beginning to the last one's end: waves, each with its tail, and new actors for each but the first.

    A wave takes at least what the driver needs for its blocks, so long for each.
    """
    total = 0.0
    for start in range(0, len(block_tokens), wave_blocks):
        wave = block_tokens[start : start + wave_blocks]
        total += max(makespan(wave / actor_speed, actors), driver_seconds * len(wave)) + (starting if start else 0.0)
    return total


def forecast(
    tokens: Estimate,
    block_guesses: npt.NDArray[np.float64],
    cluster: Cluster,
    layout: Layout,
    speed: Speed,
    planning_seconds: float,
    prices: ForecastSection,
) -> Forecast:
    """Put it together. `block_guesses` (blocks,) say how the tokens are spread over the blocks."""
    actor_speed = speed.per_unit * (1 if layout.actor_gpus else layout.threads)
    shares = block_guesses / max(block_guesses.sum(), 1e-9)
    starting = speed.starting_seconds if len(shares) else 0.0

    def take(number: float) -> float:
        return scoring_seconds(shares * number, layout.num_actors, actor_speed, starting)

    scoring = Estimate(value=take(tokens.value), low=take(tokens.low), high=take(tokens.high))
    found = Forecast(
        planning_seconds=planning_seconds,
        starting_seconds=starting,
        scoring_seconds=scoring,
        finishing_seconds=speed.finishing_seconds,
        cost=None,
    )
    each = Usage().plus(cluster, 1.0).cost(prices)
    return found if each is None else replace(found, cost=found.seconds.scaled(each))
