"""Metrics of a classifier on labelled rows, by scikit-learn, as plain JSON types.

Plain because they travel through Ray Train, which ends a run on a NumPy scalar.
Letters: N rows, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    f1_score,
    multilabel_confusion_matrix,
    precision_recall_curve,
    precision_recall_fscore_support,
)

from lib.calibration import Decision, FloatArray, calibration_error, chance_error, reliability
from lib.errors import UsageError
from lib.schema import Targets, Task
from lib.train_config import StoppingSection

CHOOSING = {
    Task.MULTI_CLASS: ("macro_f1", "micro_f1", "accuracy", "loss"),
    Task.MULTI_LABEL: ("macro_f1", "micro_f1", "accuracy", "loss"),
    Task.REGRESSION: ("loss", "pearson", "spearman"),
}
"""Metrics that may choose a checkpoint, the default one first."""

CURVE_POINTS = 101

WORST_ERRORS = 20

SHOWN = ("accuracy", "macro_f1", "micro_f1", "mean_absolute_error", "pearson", "spearman", "loss", "perplexity")
"""Metrics that everyone asks for, of whatever task, in the order in which they are shown."""


def choose_metric(wanted: str | None, task: Task) -> str:
    """The metric that chooses a checkpoint. Raises `UsageError` if the task does not have it."""
    if wanted is not None and wanted not in CHOOSING[task]:
        kind = task.value.replace("_", "-")
        raise UsageError(f"stopping.metric = {wanted}: this data is {kind}; choose from {', '.join(CHOOSING[task])}")
    return wanted or CHOOSING[task][0]


def shown(metrics: dict[str, Any]) -> str:
    """The numbers that everyone asks for, in one line."""
    return ", ".join(f"{name.replace('_', '-')} {metrics[name]:.4f}" for name in SHOWN if name in metrics)


def brief(metrics: dict[str, Any] | None) -> dict[str, Any] | None:
    """The single numbers of a set's metrics, if there are any."""
    return {key: value for key, value in (metrics or {}).items() if not isinstance(value, (list, dict))} or None


def summarize(truth: Targets, logits: FloatArray, decision: Decision) -> dict[str, float]:
    """The few numbers that choose a checkpoint: accuracy, macro_f1, micro_f1, loss (mean of the rows').

    `truth`: the class (N,), or for multi-label zeros and ones (N, C). Accuracy of multi-label means all labels of a row
    right. A class without any row, and never answered, counts 0 in macro_f1. For regression: mean_absolute_error, pearson and
    spearman correlations (0 where all answers are the same), loss (the mean squared error).
    """
    if decision.task is Task.REGRESSION:
        numbers = logits[:, 0].astype(np.float64)
        varied = np.ptp(numbers) > 0 and np.ptp(truth) > 0
        return {
            "mean_absolute_error": float(np.abs(numbers - truth).mean()),
            "pearson": float(pearsonr(truth, numbers).statistic) if varied else 0.0,
            "spearman": float(spearmanr(truth, numbers).statistic) if varied else 0.0,
            "loss": float(decision.losses(logits, truth).mean()),
        }
    answers = decision.answers(logits)
    classes = None if decision.task is Task.MULTI_LABEL else list(range(logits.shape[1]))
    f1 = {
        average: float(f1_score(truth, answers, labels=classes, average=average, zero_division=0))
        for average in ("macro", "micro")
    }
    return {
        "accuracy": float(accuracy_score(truth, answers)),
        "macro_f1": f1["macro"],
        "micro_f1": f1["micro"],
        "loss": float(decision.losses(logits, truth).mean()),
    }


def describe(truth: Targets, logits: FloatArray, decision: Decision, labels: Sequence[str]) -> dict[str, Any]:
    """All metrics: `summarize`, rows, calibration error, per class precision, recall, f1 and support, and the confusion matrix.

    `confusion[i][j]` counts rows of class i answered as j; for multi-label it is one 2x2 matrix for each label, in
    label order, with [[true negatives, false positives], [false negatives, true positives]]. Where a model abstains,
    `coverage` is the part of the rows that get a label, `answered_accuracy` the accuracy on them; all else is on all rows.
    `average_precision` is the area under a class's precision-recall curve; `precision_recall` is the curve of all classes'
    probabilities together (micro average), at most `CURVE_POINTS` of its points; `reliability` has for each fifteenth
    of the scores how many there are, their mean, and the part of them that is right; from it comes `calibration_error`, and
    `chance_calibration_error`, which so many rows of honest scores would have.
    """
    if decision.task is Task.REGRESSION:
        return {"rows": len(truth), **summarize(truth, logits, decision)}
    task, answers, probabilities = decision.task, decision.answers(logits), decision.probabilities(logits)
    hot = truth if task is Task.MULTI_LABEL else np.eye(len(labels), dtype=np.uint8)[truth]
    classes = list(range(len(labels)))
    columns = precision_recall_fscore_support(truth, answers, labels=classes, average=None, zero_division=0)
    per_class = [
        {
            "label": label,
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "support": int(support),
            "average_precision": float(average_precision_score(hot[:, index], probabilities[:, index]))
            if support
            else 0.0,
        }
        for index, (label, precision, recall, f1, support) in enumerate(zip(labels, *columns, strict=True))
    ]
    confusion = (
        multilabel_confusion_matrix(truth, answers)
        if task is Task.MULTI_LABEL
        else confusion_matrix(truth, answers, labels=classes)
    )
    bins = reliability(probabilities, truth, task)
    answered = {}
    if task is Task.MULTI_CLASS and decision.thresholds is not None:
        some = decision.answered(logits)
        right = float((answers == truth)[some].mean()) if some.any() else None
        answered = {"coverage": float(some.mean()), "answered_accuracy": right}
    return {
        "rows": len(truth),
        **summarize(truth, logits, decision),
        **answered,
        "calibration_error": calibration_error(bins),
        "chance_calibration_error": chance_error(bins),
        "per_class": per_class,
        "confusion": confusion.tolist(),
        "precision_recall": curve(hot, probabilities),
        "reliability": bins,
    }


def curve(hot: Targets, probabilities: FloatArray) -> dict[str, list[float]]:
    """Precision and recall of all (row, class) pairs together at falling thresholds; `hot` (N, C) are zeros and ones."""
    precision, recall, _ = precision_recall_curve(hot.ravel(), probabilities.ravel())
    places = np.unique(np.linspace(0, len(recall) - 1, CURVE_POINTS).astype(np.int64))
    return {"precision": precision[places].tolist(), "recall": recall[places].tolist()}


def worst_errors(
    truth: Targets, logits: FloatArray, decision: Decision, labels: Sequence[str], count: int = WORST_ERRORS
) -> list[dict[str, Any]]:
    """The wrong answers with the largest loss, first the worst: row, what was expected, what was answered, score and loss.

    For regression the numbers furthest away, without a score. The score is that of the likeliest answer.
    """
    losses, answers = decision.losses(logits, truth), decision.answers(logits)
    probabilities = decision.probabilities(logits)
    if decision.task is Task.REGRESSION:
        wrong = np.ones(len(truth), np.bool_)
    else:
        wrong = answers != truth if truth.ndim == 1 else (answers != truth).any(axis=1)

    def named(value: Any) -> Any:
        if decision.task is Task.REGRESSION:
            return float(value)
        return labels[value] if truth.ndim == 1 else [labels[int(place)] for place in np.flatnonzero(value)]

    order = np.argsort(-np.where(wrong, losses, -np.inf), kind="stable")[: min(count, int(wrong.sum()))]
    return [
        {
            "row": int(row),
            "expected": named(truth[row]),
            "answered": named(logits[row, 0] if decision.task is Task.REGRESSION else answers[row]),
            "score": None if decision.task is Task.REGRESSION else float(probabilities[row].max()),
            "loss": float(losses[row]),
        }
        for row in order
    ]


def metrics_of(metrics: dict[str, Any], name: str) -> dict[str, Any]:
    """The metrics of one of several heads, as those of a model that has no other."""
    common = {key: value for key, value in metrics.items() if key != "tasks"}
    own = metrics["tasks"][name]
    return common | own | {"best": {"step": metrics["best"]["step"], **own["valid"]}}


def is_better(value: float, best: float | None, metric: str) -> bool:
    """Whether a metric's value beats the best so far; NaN beats nothing."""
    if best is None:
        return value == value
    return value < best if metric == "loss" else value > best


def top_confusions(metrics: dict[str, Any], count: int = 10) -> list[tuple[str, str, int]]:
    """The most frequent mistakes of a multi-class model: `(true label, answered label, rows)`, most rows first."""
    names = [one["label"] for one in metrics["per_class"]]
    matrix = np.array(metrics["confusion"])
    if matrix.ndim != 2:
        return []
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:count]
    pairs = [(int(place) // len(names), int(place) % len(names)) for place in order]
    return [(names[true], names[answer], int(matrix[true, answer])) for true, answer in pairs if matrix[true, answer]]


def check_stopping(stopping: StoppingSection) -> None:
    """Raise `UsageError` for what is set and would change nothing."""
    if stopping.keep == "last" and "patience" in stopping.model_fields_set:
        raise UsageError(
            'stopping.patience with stopping.keep = "last": then nothing stops before the last step; leave one of the two out'
        )


def steps_to_keep(history: list[dict[str, float]], stopping: StoppingSection, metric: str) -> list[int]:
    """Steps of the best evaluations, or of the last ones, first those; of equally good ones the earlier."""
    if stopping.keep == "last":
        entries = history[::-1]
    else:
        sign = 1 if metric == "loss" else -1
        entries = sorted(
            (one for one in history if is_better(one[metric], None, metric)),
            key=lambda one: sign * one[metric],
        )
    return [int(one["step"]) for one in entries[: stopping.average]]
