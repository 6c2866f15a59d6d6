"""Drift: whether answers and texts are distributed as in an earlier run.

Two measures on counts that every object carries, so that no text and no score is read again:

* Population stability index (Lewis 1994, An Introduction to Credit Scoring; Siddiqi 2006, Credit Risk Scorecards): the sum over K
  bins of (p - q) ln(p / q), with p and q the parts of the present and of the earlier rows in a bin. 0.1 is called a small shift, 0.25
  a large one. Bins that are empty on both sides are left out, and half a row is added to each other one, so that no part is 0.
* Kolmogorov-Smirnov, for what has an order: the largest difference of the cumulated parts, at the edges of the bins. Rows inside a
  bin are taken as equal, which makes the difference smaller and the p-value larger, never the other way.

By chance alone the index of n and m independent rows is about (1/n + 1/m) chi-squared with K - 1 degrees of freedom (Yurdakul 2018,
Statistical Properties of Population Stability Index): its 99% quantile is what a shift must exceed to be one. Rows of one shard are
often alike, so real nights differ a little more than that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import chdtri, kolmogorov

from lib.blocks import LENGTH_EDGES
from lib.errors import OverLimitError
from lib.history import NOTHING_YET, Baseline
from lib.schema import Head, Task, label_name

SMOOTHING = 0.5
"""Rows added to each bin, on both sides."""

CHANCE = 0.01
"""How often independent rows of one distribution are further apart than what is called chance."""

SMALL, LARGE = 0.1, 0.25
"""What is customarily called a small and a large shift."""

NO_LABEL = "(no label)"

TOO_FEW = "too few rows to tell"

Counts = Sequence[float] | npt.NDArray[np.float64]
"""(K,), rows in each bin."""


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How far one distribution is from the earlier one."""

    name: str
    psi: float
    chance: float
    """what the index does not exceed in 99 of 100 runs if nothing has changed"""
    ks: float | None
    """the Kolmogorov-Smirnov distance; None for what has no order"""
    ks_p_value: float | None
    rows: int
    baseline_rows: int
    most: str
    """the bin whose part has changed most"""
    most_before: float
    most_now: float
    """its parts, from 0 to 1"""

    @property
    def verdict(self) -> str:
        """The shift in words."""
        if self.psi <= self.chance:
            return TOO_FEW if self.chance > SMALL else "none seen"
        return "large" if self.psi > LARGE else "small" if self.psi > SMALL else "slight"

    def exceeds(self, allowed: float) -> bool:
        """Whether it is over a limit, and not by chance."""
        return self.psi > max(allowed, self.chance)

    def record(self) -> dict[str, Any]:
        """The shift as plain JSON values."""
        rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}
        return {**rounded, "verdict": self.verdict}


def population_stability(present: Counts, earlier: Counts) -> float:
    """The population stability index of two counts of the same K bins; 0 if all bins are empty."""
    now, before = np.asarray(present, np.float64), np.asarray(earlier, np.float64)
    used = (now > 0) | (before > 0)
    p, q = ((side[used] + SMOOTHING) / (side[used] + SMOOTHING).sum() for side in (now, before))
    return float(np.sum((p - q) * np.log(p / q)))


def chance_of(present: Counts, earlier: Counts, rows: float, baseline_rows: float) -> float:
    """What the index stays under, with probability 1 - `CHANCE`, if so many rows on both sides are drawn from one distribution."""
    used = int(np.count_nonzero(np.asarray(present) + np.asarray(earlier)))
    if used < 2:
        return 0.0
    return float(chdtri(used - 1, CHANCE) * (1 / rows + 1 / baseline_rows))


def kolmogorov_smirnov(present: Counts, earlier: Counts) -> tuple[float, float]:
    """The distance of two counts of the same ordered bins, and its two-sided asymptotic p-value."""
    now, before = np.asarray(present, np.float64), np.asarray(earlier, np.float64)
    distance = float(np.abs(np.cumsum(now) / now.sum() - np.cumsum(before) / before.sum()).max())
    rows = now.sum() * before.sum() / (now.sum() + before.sum())
    return distance, float(kolmogorov(distance * np.sqrt(rows)))


def compare(present: Mapping[str, Any], earlier: Mapping[str, Any] | None, heads: Sequence[Head]) -> list[Shift]:
    """Compare two tallies as `Tally.record` gives them: labels of each head, scores, text lengths, errors; nothing without rows.

    What one side has not counted is left out: lengths of old runs, scores of a number (they are in no bins from 0 to 1).
    """
    if earlier is None or not present["rows"]:
        return []
    sides = (present, earlier)
    found = []
    for head in heads:
        if head.task is not Task.REGRESSION:
            name = f"labels of {head.name}" if head.name else "labels"
            found.append(shift_of(name, *label_counts(present, earlier, head, alone=len(heads) == 1), *sides))
    if not any(head.task is Task.REGRESSION for head in heads):
        bins = len(present["score_bins"])
        names = [f"{index / bins:.2f} to {(index + 1) / bins:.2f}" for index in range(bins)]
        now, before = (dict(zip(names, side["score_bins"], strict=True)) for side in sides)
        found.append(shift_of("scores", now, before, *sides, ordered=True))
    if all("length_bins" in side for side in sides):
        now, before = (dict(zip(LENGTH_NAMES, side["length_bins"], strict=True)) for side in sides)
        found.append(shift_of("text lengths", now, before, *sides, ordered=True))
    found.append(shift_of("errors", error_counts(present), error_counts(earlier), *sides))
    return [one for one in found if one is not None]


def length_names() -> list[str]:
    """The bins of lengths, in tokens."""
    starts = [1, *(edge + 1 for edge in LENGTH_EDGES)]
    return [
        *(f"{first} to {last}" for first, last in zip(starts, LENGTH_EDGES, strict=False)),
        f"over {LENGTH_EDGES[-1]}",
    ]


LENGTH_NAMES = length_names()


def label_counts(
    present: Mapping[str, Any], earlier: Mapping[str, Any], head: Head, alone: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """How often each label of a head was given on both sides; rows that got none are a bin of their own."""
    sides = []
    for side in (present, earlier):
        names = {label_name(head, label): label for label in head.labels}
        known = {label: side["labels"].get(name, 0) for name, label in names.items()}
        # A baseline of another version may know labels that this model does not.
        strange = {name: count for name, count in side["labels"].items() if alone and name not in names}
        sides.append(known | strange | ({NO_LABEL: side["abstained"]} if alone and head.abstains else {}))
    every = dict.fromkeys([*sides[0], *sides[1]], 0)
    return every | sides[0], every | sides[1]


def error_counts(side: Mapping[str, Any]) -> dict[str, int]:
    """Rows that were scored, and rows with an error."""
    bad = sum(side["errors"].values())
    return {"with an error": bad, "scored": side["rows"] - bad}


def shift_of(
    name: str,
    present: Mapping[str, int],
    earlier: Mapping[str, int],
    run: Mapping[str, Any],
    baseline: Mapping[str, Any],
    ordered: bool = False,
) -> Shift | None:
    """Compare one distribution, given its counts in the same bins on both sides; None if one side has none."""
    now, before = (np.array(list(side.values()), np.float64) for side in (present, earlier))
    if not now.sum() or not before.sum():
        return None
    # Several labels of one row are not several independent rows.
    rows, baseline_rows = int(min(now.sum(), run["rows"])), int(min(before.sum(), baseline["rows"]))
    parts, parts_before = now / now.sum(), before / before.sum()
    most = int(np.argmax(np.round(np.abs(parts - parts_before), 12)))  # of two bins the first, not what rounding says
    distance, p_value = kolmogorov_smirnov(now, before) if ordered else (None, None)
    return Shift(
        name=name,
        psi=population_stability(now, before),
        chance=chance_of(now, before, rows, baseline_rows),
        ks=distance,
        ks_p_value=p_value,
        rows=rows,
        baseline_rows=baseline_rows,
        most=list(present)[most],
        most_before=float(parts_before[most]),
        most_now=float(parts[most]),
    )


def describe(shift: Shift) -> str:
    """One line about a shift."""
    return (
        f"{shift.name}: population stability index {shift.psi:.3f} (chance explains {shift.chance:.3f} of {shift.rows:,} and"
        f" {shift.baseline_rows:,} rows), most: {shift.most}, {shift.most_before:.1%} before, {shift.most_now:.1%} now"
    )


def judge(
    shifts: Sequence[Shift], allowed: float | None, baseline: Baseline, new_rows: int, run_id: str
) -> OverLimitError | None:
    """Whether new rows are too far from the baseline's to be published (`drift.max_psi`).

    A limit that cannot be judged is none that is kept: only a version's first run passes without a baseline.
    """
    if allowed is not None and new_rows and baseline.counts is None and baseline.why_not != NOTHING_YET:
        return OverLimitError(
            f"new rows cannot be compared: {baseline.why_not}; drift.max_psi = {allowed}; not published. Name a run to compare with"
            " (drift.baseline), or leave drift.max_psi out for once, and run the same command again"
        )
    over = [shift for shift in shifts if allowed is not None and shift.exceeds(allowed)]
    if not over:
        return None
    return OverLimitError(
        f"new rows are not distributed as in run {baseline.name}: {'; '.join(map(describe, over))}; drift.max_psi = {allowed}; not"
        f" published. If the archive has changed for good, accept it: run the same command with --set drift.baseline={run_id};"
        " else repair the archive or raise drift.max_psi, and run the same command again"
    )


def remarks(shifts: Sequence[Shift], allowed: float | None, why_none: str) -> str:
    """Lines for the end of a run: large shifts, and, where a limit is set, what could not be judged and why."""
    lines = [describe(one) for one in shifts if one.exceeds(LARGE)]
    if allowed is not None and not shifts:
        lines.append(f"not judged: {why_none or 'this run has no new rows'}")
    few = [one.name for one in shifts if one.verdict == TOO_FEW]
    if allowed is not None and few:
        lines.append(f"{TOO_FEW}: {', '.join(few)}")
    return "".join(f"drift: {line}\n" for line in lines)
