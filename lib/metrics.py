"""Metrics of a classifier on labelled rows, by scikit-learn, as plain JSON types.

Plain because they travel through Ray Train, which ends a run on a NumPy scalar.
Letters: N rows, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
)

from lib.calibration import Decision, FloatArray, IntArray, calibration_error
from lib.schema import Task


def summarize(truth: IntArray, logits: FloatArray, decision: Decision) -> dict[str, float]:
    """The few numbers that choose a checkpoint: accuracy, macro_f1, micro_f1, loss (mean of the rows').

    `truth`: the class (N,), or for multi-label zeros and ones (N, C). Accuracy of multi-label means all labels of a row
    right. A class without any row, and never answered, counts 0 in macro_f1.
    """
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


def describe(truth: IntArray, logits: FloatArray, decision: Decision, labels: Sequence[str]) -> dict[str, Any]:
    """All metrics: `summarize`, rows, calibration error, per class precision, recall, f1 and support, and the confusion matrix.

    `confusion[i][j]` counts rows of class i answered as j; for multi-label it is one 2x2 matrix for each label, in
    label order, with [[true negatives, false positives], [false negatives, true positives]].
    """
    task, answers = decision.task, decision.answers(logits)
    classes = list(range(len(labels)))
    columns = precision_recall_fscore_support(truth, answers, labels=classes, average=None, zero_division=0)
    per_class = [
        {
            "label": label,
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "support": int(support),
        }
        for label, precision, recall, f1, support in zip(labels, *columns, strict=True)
    ]
    confusion = (
        multilabel_confusion_matrix(truth, answers)
        if task is Task.MULTI_LABEL
        else confusion_matrix(truth, answers, labels=classes)
    )
    return {
        "rows": len(truth),
        **summarize(truth, logits, decision),
        "calibration_error": calibration_error(decision.probabilities(logits), truth, task),
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }


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
