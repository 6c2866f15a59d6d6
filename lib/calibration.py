"""What a trained classifier's scores mean: the temperature that makes them honest, and from which one a label is given.

Both are found on validation rows, kept in the checkpoint's card, and used by scoring. Letters: N rows, C classes.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, log_softmax, logit, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve

from lib.errors import UsageError, say
from lib.schema import MULTI_LABEL_THRESHOLD, Targets, Task
from lib.train_config import DecisionSection

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]

CALIBRATION_BINS = 15
"""As in Guo et al. 2017."""

MEAN_DISTANCE = float(np.sqrt(2 / np.pi))
"""Of a normal number from its mean, in standard deviations."""

SMALLEST_SCORE = 1e-12
"""That has a logit, and as far from 1 the largest one."""

LARGEST_LOG_TEMPERATURE = 3.0
"""A temperature is sought from 1/20 to 20."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How logits become answers."""

    task: Task
    temperature: float = 1.0
    """logits are divided by it"""
    thresholds: tuple[float, ...] | None = None
    """(C,), the probability from which on each label is given; without, for multi-label 0.5, for one label a row 0"""

    def probabilities(self, logits: FloatArray) -> FloatArray:
        """Logits (N, C) to probabilities."""
        scaled = logits.astype(np.float64) / self.temperature
        found: FloatArray = expit(scaled) if self.task is Task.MULTI_LABEL else softmax(scaled, axis=1)
        return found

    def answers(self, logits: FloatArray) -> npt.NDArray[np.int64]:
        """Logits (N, C) to the class (N,), or for multi-label to zeros and ones (N, C)."""
        if self.task is not Task.MULTI_LABEL:
            return logits.argmax(axis=1).astype(np.int64)
        limits = np.asarray(self.thresholds or [MULTI_LABEL_THRESHOLD] * logits.shape[1])
        return (self.probabilities(logits) >= limits).astype(np.int64)

    def answered(self, logits: FloatArray) -> npt.NDArray[np.bool_]:
        """Which rows (N,) get a label, where each has one: those whose likeliest class comes to its threshold."""
        probabilities = self.probabilities(logits)
        best = probabilities.argmax(axis=1)
        limits = np.asarray(self.thresholds or np.zeros(logits.shape[1]))
        found: npt.NDArray[np.bool_] = probabilities[np.arange(len(best)), best] >= limits[best]
        return found

    def losses(self, logits: FloatArray, targets: Targets) -> npt.NDArray[np.float64]:
        """Cross entropy of each row (N,), for multi-label the labels' mean binary one, for regression the squared error."""
        scaled = logits.astype(np.float64) / self.temperature
        if self.task is Task.REGRESSION:
            found = (scaled[:, 0] - targets) ** 2
        elif self.task is Task.MULTI_LABEL:
            found = -np.where(targets > 0, log_expit(scaled), log_expit(-scaled)).mean(axis=1)
        else:
            found = -log_softmax(scaled, axis=1)[np.arange(len(targets)), targets]
        return np.asarray(found, np.float64)


def decide(section: DecisionSection, logits: FloatArray, targets: Targets, task: Task) -> Decision:
    """Find the temperature and the thresholds that are asked for, on rows with known answers."""
    temperature = find_temperature(logits, targets, task) if section.temperature else 1.0
    found = Decision(task=task, temperature=temperature)
    if section.abstain is not None:
        threshold = find_abstention(found.probabilities(logits), targets, section.abstain)
        return replace(found, thresholds=(threshold,) * logits.shape[1])
    if section.thresholds is None:
        return found
    thresholds = find_thresholds(found.probabilities(logits), targets, section.thresholds)
    return replace(found, thresholds=thresholds)


def check_decision(section: DecisionSection, task: Task) -> None:
    """Raise `UsageError` for what a task does not have: thresholds of labels, or rows that have just one label."""
    if task is Task.REGRESSION:
        if section.model_fields_set:
            raise UsageError(
                f"decision.{sorted(section.model_fields_set)[0]}: it is for classes, and train.regression learns a number"
            )
        return
    if section.abstain is not None and task is not Task.MULTI_CLASS:
        raise UsageError(
            "decision.abstain: a row of this data may have no label as it is; decision.thresholds with a precision gives each label"
            " only where it is sure enough"
        )
    if section.thresholds is not None and task is not Task.MULTI_LABEL:
        raise UsageError(
            "decision.thresholds: each row of this data has one label, the likeliest; thresholds are for labels that are given"
            " each by itself"
        )


def find_temperature(logits: FloatArray, targets: Targets, task: Task) -> float:
    """The temperature with the least cross entropy (Guo et al. 2017, arXiv 1706.04599). Answers stay what they are."""

    def loss(log_temperature: float) -> float:
        return float(Decision(task=task, temperature=float(np.exp(log_temperature))).losses(logits, targets).mean())

    bounds = (-LARGEST_LOG_TEMPERATURE, LARGEST_LOG_TEMPERATURE)
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4}).x))


def find_thresholds(probabilities: FloatArray, targets: IntArray, goal: str | float) -> tuple[float, ...]:
    """For each label the threshold with the best F1 to expect, or with the best recall of those with at least that precision.

    Half-way to the next lower probability, so that rounding changes nothing. A label without a row that has it keeps 0.5; one
    that never comes to the precision is given from its largest probability on.
    """
    found = []
    for column, truth in zip(probabilities.T, targets.T, strict=True):
        if not truth.any():
            found.append(MULTI_LABEL_THRESHOLD)
            continue
        limit = limit_for_f1(column, truth) if goal == "f1" else limit_for_precision(column, truth, float(goal))
        lower = column[column < limit]
        found.append(float((limit + lower.max()) / 2) if len(lower) else limit)
    return tuple(found)


def limit_for_f1(scores: FloatArray, truth: IntArray) -> float:
    """The score (of N) from which on giving a label has the best F1 that rows like these can be expected to have.

    Not the best on these rows themselves, which of a rare label a few rows decide by chance: a logistic regression makes the scores'
    logits probabilities (Platt 1999), and those are counted in place of rows (as in Ye et al., ICML 2012).
    """
    order = np.argsort(-scores, kind="stable")
    scores, truth = scores[order].astype(np.float64), truth[order]
    logits = logit(scores.clip(SMALLEST_SCORE, 1 - SMALLEST_SCORE))[:, None]
    likely = (
        np.ones(len(scores)) if truth.all() else LogisticRegression().fit(logits, truth).predict_proba(logits)[:, 1]
    )
    f1 = 2 * likely.cumsum() / (np.arange(1, len(scores) + 1) + likely.sum())
    return float(scores[np.argmax(f1)])  # never among rows of one score: over these it rises or falls throughout


def limit_for_precision(scores: FloatArray, truth: IntArray, least: float) -> float:
    """The lowest score from which on a label is right at least so often; the largest of all if there is none."""
    precision, _, limits = precision_recall_curve(truth, scores)
    enough = np.flatnonzero(precision[:-1] >= least)
    return float(limits[enough[0] if len(enough) else -1])


def find_abstention(probabilities: FloatArray, targets: IntArray, accuracy: float) -> float:
    """The least score from which on the likeliest classes are right so often, so that as many rows as can be get a label.

    Selective classification by the softmax response (Geifman and El-Yaniv 2017, arXiv 1705.08500), on these rows alone: without
    their bound for others. Half-way to the next lower score, so that rounding changes nothing. If no threshold is enough, that of
    the most accurate rows, and a warning.
    """
    scores, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    # Rows with the same score get a label or none together.
    ends = np.flatnonzero(np.append(scores[:-1] > scores[1:], True))
    enough = ends[found[ends] >= accuracy]
    last = int(enough[-1] if len(enough) else ends[np.argmax(found[ends])])
    if not len(enough):
        say(
            f"WARNING: decision.abstain = {accuracy}: the surest {last + 1} of {len(scores)} validation rows are right {found[last]:.2%}"
            " of the time, and no others more often; only rows that are as sure will get a label"
        )
    return float((scores[last] + scores[last + 1]) / 2) if last + 1 < len(scores) else 0.0


def reliability(probabilities: FloatArray, targets: Targets, task: Task) -> list[dict[str, float]]:
    """Rows, mean score and share of right answers in each of 15 equal steps of the score that has any, lowest first.

    The score is the likeliest class's probability; for multi-label each (row, label) pair's counts by itself. `deviation`
    is the standard deviation of the share if every score were what it says: closer than that is chance.
    """
    if task is Task.MULTI_LABEL:
        scores, right = probabilities.ravel(), targets.ravel() == 1
    else:
        scores, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    places = np.minimum((scores * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    found = []
    for place in np.unique(places):
        own, rows = scores[places == place], int((places == place).sum())
        found.append(
            {
                "rows": rows,
                "score": float(own.mean()),
                "right": float(right[places == place].mean()),
                "deviation": float(np.sqrt((own * (1 - own)).sum())) / rows,
            }
        )
    return found


def calibration_error(bins: list[dict[str, float]]) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3): the gap of score and share, by rows."""
    rows = sum(one["rows"] for one in bins)
    return sum(one["rows"] * abs(one["score"] - one["right"]) for one in bins) / rows


def chance_error(bins: list[dict[str, float]]) -> float:
    """The mean calibration error of so many rows if every score were what it says: a model's own cannot be told from none below it.

    What drawing the labels from the scores gives on average (Broecker and Smith 2007, doi 10.1175/WAF993.1), with shares taken as
    normal.
    """
    rows = sum(one["rows"] for one in bins)
    return MEAN_DISTANCE * sum(one["rows"] * one["deviation"] for one in bins) / rows
