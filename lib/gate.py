"""Whether a challenger may take a champion's place: a test of non-inferiority on one frozen test set.

* Paired bootstrap (Efron and Tibshirani 1993, chapters 13 and 25.6; Koehn 2004 for two models on the same rows): rows are drawn again
  with both models' answers, so that what is hard for both cancels out. The challenger is accepted if the lower end of the percentile
  interval of the metric's difference is above -margin: then a loss of the margin or more is ruled out at the confidence asked for.
* McNemar's test (1947), exact: of the rows that one of them alone has right, how many has each? A challenger with significantly more
  rows wrong is refused whatever the metric says.

Letters: N rows, C classes, K distinct triples of (truth, champion's answer, challenger's answer), R resamples.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, norm

GateMetric = Literal["macro_f1", "accuracy"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

RESAMPLES_AT_ONCE = 500
"""Each takes K numbers, and a few times C."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the test found; metrics and differences as parts of 1."""

    metric: GateMetric
    rows: int
    champion: float
    challenger: float
    difference: float
    """the challenger's metric less the champion's"""
    low: float
    high: float
    """the two-sided interval that leaves out `1 - confidence` on each side"""
    margin: float
    confidence: float
    champion_alone_right: int
    challenger_alone_right: int
    mcnemar_p: float
    """two-sided; how likely so uneven a split is if both are equally often right"""
    rows_needed: int
    """about how many rows would show two equally good models that differ as these do to be so, four times of five"""

    @property
    def is_not_worse(self) -> bool:
        """Whether a loss of `margin` or more is ruled out."""
        return self.low > -self.margin

    @property
    def is_significantly_worse(self) -> bool:
        """Whether McNemar's test says that the challenger has more rows wrong."""
        return self.champion_alone_right > self.challenger_alone_right and self.mcnemar_p < 1 - self.confidence

    @property
    def accepted(self) -> bool:
        """Both tests together."""
        return self.is_not_worse and not self.is_significantly_worse

    def reason(self) -> str:
        """Why, in one sentence."""
        sure = f"{100 * self.confidence:g}% confidence"
        name = self.metric.replace("_", "-")
        if self.accepted:
            return f"a loss of {points(self.margin)} in {name} is ruled out at {sure} (at most {points(max(0.0, -self.low))})"
        if self.is_significantly_worse:
            return (
                f"the champion alone is right on {self.champion_alone_right:,} rows, the challenger alone on"
                f" {self.challenger_alone_right:,} (McNemar p {self.mcnemar_p:.3g}): it is worse"
            )
        if self.high < 0:
            return f"the challenger is worse: it loses at least {points(-self.high)} in {name} at {sure}"
        unsure = f"a loss of up to {points(-self.low)} in {name} is not ruled out at {sure}, and gate.margin allows {points(self.margin)}"
        if self.rows_needed <= self.rows:  # enough to show equally good models to be so, four times of five
            return f"{unsure}; the challenger looks worse: it loses {points(-self.difference)} on {self.rows:,} rows"
        return (
            f"{unsure}; {self.rows:,} rows cannot tell: about {self.rows_needed:,} would, if both are equally good. Give a larger"
            " test set, or a larger gate.margin"
        )


def points(part: float) -> str:
    """A part of 1 in percentage points."""
    return f"{100 * part:.2f} points"


def judge(
    truth: IntArray,
    champion: IntArray,
    challenger: IntArray,
    num_classes: int,
    *,
    metric: GateMetric,
    margin: float,
    confidence: float,
    resamples: int,
    seed: int,
) -> Verdict:
    """Compare two models' answers (N,) with the truth (N,), all of them numbers of classes."""
    triples, counts = np.unique(np.stack([truth, champion, challenger], axis=1), axis=0, return_counts=True)
    rows = len(truth)
    chance = np.random.default_rng(seed)
    differences = []
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        drawn = chance.multinomial(rows, counts / rows, size=min(RESAMPLES_AT_ONCE, resamples - start))
        first, second = (measure(drawn, triples[:, 0], triples[:, side], num_classes, metric) for side in (1, 2))
        differences.append(second - first)
    found = np.concatenate(differences)
    low, high = np.quantile(found, [1 - confidence, confidence])
    old, new = (
        float(measure(counts[None], triples[:, 0], triples[:, side], num_classes, metric)[0]) for side in (1, 2)
    )
    alone = (champion == truth) != (challenger == truth)
    challenger_alone = int((alone & (challenger == truth)).sum())
    p_value = binomtest(challenger_alone, int(alone.sum())).pvalue if alone.any() else 1.0
    spread = (norm.ppf(confidence) + norm.ppf(0.8)) * found.std() / margin
    return Verdict(
        metric=metric,
        rows=rows,
        champion=old,
        challenger=new,
        difference=new - old,
        low=float(low),
        high=float(high),
        margin=margin,
        confidence=confidence,
        champion_alone_right=int(alone.sum()) - challenger_alone,
        challenger_alone_right=challenger_alone,
        mcnemar_p=float(p_value),
        rows_needed=int(min(1e12, rows * spread**2)),
    )


def measure(
    weights: npt.NDArray[Any], truth: IntArray, answers: IntArray, num_classes: int, metric: GateMetric
) -> FloatArray:
    """A metric of rows that stand `weights` (R, K) times in each resample; `truth` and `answers` (K,). Returns (R,).

    A class without any row, and never answered, counts 0 in macro-F1, as in `lib.metrics`.
    """
    right = weights[:, truth == answers]
    if metric == "accuracy":
        return np.asarray(right.sum(axis=1) / weights.sum(axis=1), np.float64)
    classes = np.arange(num_classes)
    hits = right @ (truth[truth == answers][:, None] == classes)
    both = weights @ (truth[:, None] == classes) + weights @ (answers[:, None] == classes)
    return np.asarray((2 * hits / np.maximum(both, 1)).mean(axis=1), np.float64)
