"""What a hyperparameter search tries: its configuration, the space, and the points drawn from it. Pure: knows no Ray.

Points are a scrambled Halton sequence (Halton 1960; Owen 2017): with a few trials over a few keys every part of each key's range
is tried, where chance leaves gaps, and more trials begin with the same points (Bousquet et al. 2017 on why for learning).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field
from scipy.stats import qmc

from lib.config import Section, masked, validate
from lib.errors import UsageError
from lib.toml import value_text
from lib.train_config import TrainConfig

Value = Any
"""What a key of the configuration may hold."""

Point = dict[str, Value]
"""A value for each key, as section.key."""

DIGITS = 2
"""Of a number that is drawn from a range: nobody writes 1.2345678e-4, and nothing is gained by it."""

ORDERS = 10
"""A range whose end is so many times its beginning is searched by orders of magnitude."""

DRAWN = 64
"""Points drawn for each one that is wanted, before a space is taken to hold no more different ones."""

DEFAULT_SPACE: dict[str, dict[str, Any]] = {
    "optim": {"learning_rate": [1e-5, 5e-4], "epochs": {"min": 2, "max": 6}, "batch_size": [16, 32, 64]}
}
"""Devlin et al. 2019 searched 2e-5 to 5e-5, 2 to 4 epochs, 16 and 32 rows for BERT. Encoders made since, and small ones, take rates up
to ten times as high (ModernBERT 8e-5, AutoGluon 1e-4, MiniLM-L6 5e-4 on GoEmotions here); at 4e-4 Sun et al. 2019 saw BERT fail."""

NOT_SEARCHED = {
    "train": "all trials learn from the same rows",
    "valid": "all trials are compared on the same validation rows",
    "test": "test rows choose nothing",
    "tasks": "all trials learn from the same rows",
    "stopping.metric": "all trials are compared by the same metric",
    "decision": "it is made after the metric that compares trials",
    "output": "it changes no result",
    "tracking": "it changes no result",
    "resources": "it changes no result",
    "search": "it is the search itself",
}
"""Sections and keys, and why."""


class SearchSection(Section):
    """Which configurations are tried, and when a trial is given up."""

    space: dict[str, dict[str, Any]] = DEFAULT_SPACE
    """what is searched, as search.space.SECTION.KEY, nearly any key of training: [1e-5, 5e-4] (two numbers, one with a point or an exponent:
    all between them, by orders of magnitude if they are ten times apart), [16, 32, 64] (one of these), {min = 2, max = 6} (a range; log =
    true or false says how). What is given takes the place of the default"""
    trials: int = Field(default=8, ge=1)
    """configurations, at most; the first one is the configuration as it is given"""
    seed: int = 0
    """of what is drawn from the space; more trials with the same seed begin with the same ones"""
    concurrent: int | None = Field(default=None, ge=1)
    """trials at a time; default: one for each GPU, without GPUs one for each node, with all its CPUs"""
    stopping: Literal["asha", "none"] = "asha"
    """asha (Li et al. 2018): end trials that are worse on the validation rows than others were after the same part of their steps"""
    grace: float = Field(default=0.25, ge=0.01, lt=1)
    """the part of its steps that every trial makes before it may be ended"""
    reduction: float = Field(default=2.0, gt=1)
    """of the trials so far the best 1 in so many goes on; looked at after grace, so many times grace, and so on"""
    train_best: bool = True
    """train the best configuration once more, and commit its checkpoint as output.path/best: only this looks at the test rows"""


class SearchConfig(TrainConfig):
    """Everything `jobs.search` can be told: how to train, and what to search."""

    search: SearchSection = SearchSection()


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Value, ...]

    def at(self, place: float) -> Value:
        """The value at a place from 0 to below 1."""
        return self.values[int(place * len(self.values))]

    @property
    def examples(self) -> tuple[Value, ...]:
        """Values that must all be allowed."""
        return self.values


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool
    """evenly by orders of magnitude"""
    whole: bool

    def at(self, place: float) -> Value:
        """The value at a place from 0 to below 1, with few digits."""
        if self.whole and not self.log:
            return int(self.low) + int(place * (self.high - self.low + 1))
        value = self.low * (self.high / self.low) ** place if self.log else self.low + place * (self.high - self.low)
        if self.whole:
            return min(int(self.high), max(int(self.low), round(value)))
        return min(self.high, max(self.low, float(f"{value:.{DIGITS}g}")))

    @property
    def examples(self) -> tuple[Value, ...]:
        """Values that must all be allowed."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)


Domain = Choice | Range


def is_number(value: Value) -> bool:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_domain(key: str, found: Value) -> Domain:
    """What is searched of one key. Raises `UsageError` if that cannot be told."""
    if isinstance(found, list):
        is_pair = len(found) == 2 and all(map(is_number, found)) and any(isinstance(one, float) for one in found)
        if is_pair:
            return read_range(key, {"min": found[0], "max": found[1]})
        values = tuple(one for place, one in enumerate(found) if one not in found[:place])
        if len(values) > 1:
            return Choice(values)
    if isinstance(found, dict) and {"min", "max"} <= found.keys() <= {"min", "max", "log"}:
        return read_range(key, found)
    raise UsageError(
        f"search.space.{key} = {masked(json.dumps(found, default=str))}: expected [1e-5, 5e-4] for all between two numbers, a list of"
        " two or more different values, or {min = 2, max = 6} with log = true or false"
    )


def read_range(key: str, found: dict[str, Value]) -> Range:
    """A range of numbers."""
    low, high = found["min"], found["max"]
    if not (is_number(low) and is_number(high) and low < high):
        raise UsageError(f"search.space.{key}: from {low!r} to {high!r}; expected two numbers, the smaller one first")
    log = found.get("log", low > 0 and high / low >= ORDERS)
    if not isinstance(log, bool) or (log and low <= 0):
        raise UsageError(
            f"search.space.{key}: from {low!r} to {high!r} with log = {log!r}; by orders of magnitude both must be over 0"
        )
    return Range(low, high, log, whole=isinstance(low, int) and isinstance(high, int))


def read_space(config: SearchConfig) -> dict[str, Domain]:
    """What is searched, by key. Raises `UsageError` that names the key if a value in it is not allowed, or compares what cannot be."""
    found = {}
    for section, keys in config.search.space.items():
        for name, value in keys.items():
            key = f"{section}.{name}"
            why = NOT_SEARCHED.get(key) or NOT_SEARCHED.get(section)
            if key == "optim.seed" and config.valid.path is None:
                why = "it also decides which rows are set aside for validation; give valid.path to search it"
            if section == "optim" and config.contrastive.iterations is not None:
                why = "contrastive.iterations is set, in whose place [optim] is not used; search contrastive.* instead"
            if why:
                raise UsageError(f"search.space.{key} cannot be searched: {why}")
            found[key] = read_domain(key, value)
            for example in found[key].examples:
                try:
                    configuration_at(config, {key: example})
                except UsageError as error:
                    raise UsageError(f"search.space: {error}") from None
    if not found:
        raise UsageError("search.space is empty; leave it out to search learning rate, epochs and batch size")
    return found


def configuration_at(config: SearchConfig, point: Point, **output: Any) -> TrainConfig:
    """The configuration of a trial: that of the search with a point's values in it, and perhaps another `output`.

    A value that the search has already, as a default, does not become one that was set: some are refused where they change nothing.
    """
    values = config.model_dump(exclude_unset=True, exclude={"search"})
    for key, value in point.items():
        section, _, name = key.partition(".")
        if value != getattr(getattr(config, section, None), name, None):
            values.setdefault(section, {})[name] = value
    values["output"] |= output
    return validate(TrainConfig, values)


def points_of(config: SearchConfig, space: dict[str, Domain]) -> list[Point]:
    """A point for each trial, all different: first the configuration as it is given, then what is drawn from the space.

    Fewer than `search.trials` if the space holds no more.
    """
    given = {key: getattr(getattr(config, key.partition(".")[0]), key.partition(".")[2]) for key in space}
    found, seen = [given], {identity(given)}
    for point in draw(space, config.search.seed, DRAWN * config.search.trials):
        if len(found) >= config.search.trials:
            break
        if identity(point) not in seen:
            seen.add(identity(point))
            found.append(point)
    return found


def draw(space: dict[str, Domain], seed: int, count: int) -> Iterator[Point]:
    """Points of the sequence, one after the other."""
    for places in qmc.Halton(len(space), scramble=True, rng=np.random.default_rng(seed)).random(count):
        yield {key: domain.at(float(place)) for (key, domain), place in zip(space.items(), places, strict=True)}


def identity(point: Point) -> str:
    """Equal for equal points."""
    return json.dumps(point, sort_keys=True, default=str)


def point_text(point: Point) -> str:
    """A point as a person would give it on the command line, but for passwords in its URLs."""
    return masked(
        ", ".join(f"{key} = {'none' if value is None else value_text(value)}" for key, value in point.items())
    )


def masked_point(point: Point) -> Point:
    """A point as it is kept and shown: without the passwords of its URLs."""
    found: Point = json.loads(masked(json.dumps(point)))
    return found
