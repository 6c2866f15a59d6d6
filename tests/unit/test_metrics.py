"""Metrics against numbers worked out by hand, and as plain JSON."""

import json
import math

import numpy as np
import pytest

from lib import metrics
from lib.schema import Task

LABELS = ("a", "b", "c")


def test_multi_class_numbers_are_those_worked_out_by_hand() -> None:
    truth = np.array([0, 0, 0, 1, 1, 2])
    answers = np.array([0, 0, 1, 1, 1, 0])
    found = metrics.describe(truth, answers, np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), Task.MULTI_CLASS, LABELS)

    assert found["rows"] == 6
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["micro_f1"] == pytest.approx(4 / 6)
    # a: precision 2/3, recall 2/3; b: precision 2/3, recall 1; c: never answered
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0.8 + 0) / 3)
    assert found["loss"] == pytest.approx(3.5)
    assert found["confusion"] == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert [(one["label"], one["support"]) for one in found["per_class"]] == [("a", 3), ("b", 2), ("c", 1)]
    assert found["per_class"][1]["precision"] == pytest.approx(2 / 3)
    assert found["per_class"][1]["recall"] == 1.0


def test_multi_label_numbers_are_those_worked_out_by_hand() -> None:
    truth = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    answers = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    found = metrics.describe(truth, answers, np.zeros(3), Task.MULTI_LABEL, LABELS)

    assert found["accuracy"] == pytest.approx(1 / 3)  # all labels of the row right
    assert found["macro_f1"] == pytest.approx(2 / 3)
    assert found["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["confusion"][2] == [[1, 1], [1, 0]]  # true negatives, false positives; false negatives, true positives


def test_classes_without_rows_keep_their_place() -> None:
    found = metrics.describe(np.array([0, 0]), np.array([0, 0]), np.zeros(2), Task.MULTI_CLASS, LABELS)
    assert len(found["confusion"]) == len(found["per_class"]) == 3
    assert found["macro_f1"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("task", [Task.MULTI_CLASS, Task.MULTI_LABEL])
def test_metrics_are_plain_json(task: Task) -> None:
    """NumPy's float64 passes through json; its float32 and integers do not, and Ray Train ends a run on any of them."""
    probabilities = np.random.default_rng(0).random((20, 3), dtype=np.float32)
    answers = metrics.decide(probabilities, task)
    found = metrics.describe(answers, answers, np.ones(20, np.float32), task, LABELS)
    json.dumps(found)

    def types(value: object) -> set[type]:
        if isinstance(value, dict):
            return set().union(*map(types, value.values()))
        return set().union(*map(types, value)) if isinstance(value, list) else {type(value)}

    assert types(found) <= {float, int, str}


def test_answers_are_the_most_probable_class_or_all_labels_from_a_half_on() -> None:
    probabilities = np.array([[0.2, 0.5, 0.3], [0.6, 0.5, 0.49]])
    assert metrics.decide(probabilities, Task.MULTI_CLASS).tolist() == [1, 0]
    assert metrics.decide(probabilities, Task.MULTI_LABEL).tolist() == [[0, 1, 0], [1, 1, 0]]


def test_less_loss_is_better_and_more_of_all_else() -> None:
    assert metrics.is_better(0.1, 0.2, "loss")
    assert not metrics.is_better(0.2, 0.2, "loss")
    assert metrics.is_better(0.3, 0.2, "macro_f1")
    assert not metrics.is_better(0.2, 0.2, "macro_f1")
    assert metrics.is_better(0.0, None, "accuracy")
    assert not metrics.is_better(math.nan, None, "loss")
    assert not metrics.is_better(math.nan, 0.5, "loss")


def test_confusions_come_most_rows_first_and_leave_out_what_is_right() -> None:
    truth = np.array([0, 0, 0, 1, 2, 2])
    answers = np.array([1, 1, 0, 1, 0, 2])
    found = metrics.describe(truth, answers, np.zeros(6), Task.MULTI_CLASS, LABELS)
    assert metrics.top_confusions(found) == [("a", "b", 2), ("c", "a", 1)]
