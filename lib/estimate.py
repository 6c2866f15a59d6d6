"""How many tokens there are, from few rows: windows of rows drawn by size, their sum, and an interval around it.

Pure functions. A unit is a chunk; each draw is a window of its rows. Units are drawn with probabilities p in proportion to a guess of
their tokens, systematically, so that draws are spread over the archive. Each draw, with t tokens a row on average in a unit of N
rows, says that there are N t / p tokens in all; the estimate is the mean of what the draws say (Hansen and Hurwitz 1943). It is right
on average whatever the guess was; a bad guess only widens the interval, which comes from the spread of the draws.

Letters: K units, D draws.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SAMPLED_SHARE = 0.001
LEAST_ROWS, MOST_ROWS = 1_024, 65_536
"""Rows of a sample: a share of all, within these bounds. Beyond them it is the number of draws that limits what is known."""

DRAWS = 128
"""Windows; each costs four requests or so."""

CONFIDENCE = 0.95

BYTES_PER_TOKEN = 4
"""Of English prose; a guess, see above."""

FEWEST_TOKENS = 4
"""Guessed for a row, whatever its bytes: behind a dictionary they say nothing."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number that was estimated, and the interval that holds the true one with `CONFIDENCE`."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Estimate":
        """The same in another unit."""
        return Estimate(value=self.value * factor, low=self.low * factor, high=self.high * factor)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Which windows are read."""

    unit: IntArray
    """(D,), into the units"""
    first: IntArray
    """(D,), first row, counted from the unit's first"""
    rows: IntArray
    """(D,)"""
    weight: FloatArray
    """(D,), by which tokens a row are multiplied to say what there is in all"""
    is_census: bool
    """whether every row is read: then the sum is exact"""


def guess_tokens(rows: IntArray, text_bytes: IntArray, most: int) -> FloatArray:
    """(K,), tokens of each unit as far as its footer tells; `most` is what is kept of a text."""
    each = text_bytes / np.maximum(rows, 1) / BYTES_PER_TOKEN
    return (rows * np.clip(each, FEWEST_TOKENS, max(most, FEWEST_TOKENS))).astype(np.float64)


def draw(
    rows: IntArray,
    guesses: FloatArray,
    chance: np.random.Generator,
    sample_rows: int | None = None,
    *,
    may_be_census: bool = True,
) -> Draws:
    """Choose windows from K units of `rows` rows each: about `sample_rows` rows in all (default: a share of all); all if there are so few.

    `may_be_census`: not where few rows of each of many chunks are scored: that would be as much reading as the run itself.
    """
    total = int(rows.sum())
    wanted = sample_rows or min(MOST_ROWS, max(LEAST_ROWS, round(SAMPLED_SHARE * total)))
    if total <= wanted and may_be_census:
        units = np.flatnonzero(rows).astype(np.int64)
        return Draws(
            unit=units,
            first=np.zeros(len(units), np.int64),
            rows=rows[units],
            weight=rows[units].astype(np.float64),
            is_census=True,
        )
    ends = np.cumsum(guesses)
    points = (chance.random() + np.arange(DRAWS)) / DRAWS * ends[-1]
    units = np.minimum(np.searchsorted(ends, points, side="right"), len(rows) - 1).astype(np.int64)
    size = np.minimum(max(1, wanted // DRAWS), rows[units])
    first = np.floor(chance.random(DRAWS) * (rows[units] - size + 1)).astype(np.int64)
    weight = rows[units] / (guesses[units] / ends[-1])
    return Draws(unit=units, first=first, rows=size, weight=weight, is_census=False)


def estimate(draws: Draws, tokens: IntArray, rows: IntArray) -> Estimate | None:
    """The sum over all units, from the tokens and rows that each window (D,) had; windows without rows could not be read.

    None if too little could be read: nothing of a census, or less than two windows, which have no spread.
    """
    read = rows > 0
    if read.sum() < (1 if draws.is_census else 2):
        return None
    said = draws.weight[read] * tokens[read] / rows[read]
    if draws.is_census:
        total = float(said.sum())
        return Estimate(value=total, low=total, high=total)
    mean = float(said.mean())
    reach = float(student.ppf((1 + CONFIDENCE) / 2, len(said) - 1) * said.std(ddof=1) / np.sqrt(len(said)))
    return Estimate(value=mean, low=max(0.0, mean - reach), high=mean + reach)
