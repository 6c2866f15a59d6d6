"""Metrics against numbers worked out by hand, and as plain JSON."""

import json
import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import softmax
from sklearn.metrics import log_loss

from lib import metrics
from lib.calibration import Decision
from lib.schema import Task

LABELS = ("a", "b", "c")
CLASSES, SEVERAL = Decision(task=Task.MULTI_CLASS), Decision(task=Task.MULTI_LABEL)


def logits_for(answers: npt.NDArray[np.integer]) -> npt.NDArray[np.floating]:
    """Logits (N, 3) that make these answers."""
    return 4.0 * (np.eye(3)[answers] if answers.ndim == 1 else answers) - 2.0


def test_multi_class_numbers_are_those_worked_out_by_hand() -> None:
    truth = np.array([0, 0, 0, 1, 1, 2])
    answers = np.array([0, 0, 1, 1, 1, 0])
    found = metrics.describe(truth, logits_for(answers), CLASSES, LABELS)

    assert found["rows"] == 6
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["micro_f1"] == pytest.approx(4 / 6)
    # a: precision 2/3, recall 2/3; b: precision 2/3, recall 1; c: never answered
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0.8 + 0) / 3)
    assert found["loss"] == pytest.approx(log_loss(truth, softmax(logits_for(answers), axis=1)))
    assert found["confusion"] == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert [(one["label"], one["support"]) for one in found["per_class"]] == [("a", 3), ("b", 2), ("c", 1)]
    assert found["per_class"][1]["precision"] == pytest.approx(2 / 3)
    assert found["per_class"][1]["recall"] == 1.0


def test_multi_label_numbers_are_those_worked_out_by_hand() -> None:
    truth = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    answers = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    found = metrics.describe(truth, logits_for(answers), SEVERAL, LABELS)

    assert found["accuracy"] == pytest.approx(1 / 3)  # all labels of the row right
    assert found["macro_f1"] == pytest.approx(2 / 3)
    assert found["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["confusion"][2] == [[1, 1], [1, 0]]  # true negatives, false positives; false negatives, true positives


def test_classes_without_rows_keep_their_place() -> None:
    found = metrics.describe(np.array([0, 0]), logits_for(np.array([0, 0])), CLASSES, LABELS)
    assert len(found["confusion"]) == len(found["per_class"]) == 3
    assert found["macro_f1"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("decision", [CLASSES, SEVERAL])
def test_metrics_are_plain_json(decision: Decision) -> None:
    """NumPy's float64 passes through json; its float32 and integers do not, and Ray Train ends a run on any of them."""
    logits = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    found = metrics.describe(decision.answers(logits), logits, decision, LABELS)
    json.dumps(found)

    def types(value: object) -> set[type]:
        if isinstance(value, dict):
            return set().union(*map(types, value.values()))
        return set().union(*map(types, value)) if isinstance(value, list) else {type(value)}

    assert types(found) <= {float, int, str}


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
    found = metrics.describe(truth, logits_for(answers), CLASSES, LABELS)
    assert metrics.top_confusions(found) == [("a", "b", 2), ("c", "a", 1)]


def test_curve_and_reliability_are_those_worked_out_by_hand() -> None:
    probabilities = np.array([[0.94, 0.04, 0.02], [0.96, 0.03, 0.01], [0.3, 0.66, 0.04], [0.2, 0.62, 0.18]])
    truth = np.array([0, 1, 1, 1])
    found = metrics.describe(truth, np.log(probabilities), CLASSES, LABELS)
    assert [one["rows"] for one in found["reliability"]] == [2, 2]
    assert [one["score"] for one in found["reliability"]] == pytest.approx([0.64, 0.95])
    assert [one["right"] for one in found["reliability"]] == [1.0, 0.5]
    hot = np.eye(3)[truth].ravel() == 1
    for precision, recall in zip(*found["precision_recall"].values(), strict=True):
        cuts = [probabilities.ravel() >= cut for cut in [*probabilities.ravel(), 2.0]]
        points = [(hot[cut].mean() if cut.any() else 1.0, hot[cut].sum() / 4) for cut in cuts]
        assert any((precision, recall) == pytest.approx(point) for point in points)
    # b: the rows in falling order of b are right, right, wrong, right
    assert found["per_class"][1]["average_precision"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert found["per_class"][2]["average_precision"] == 0.0, "no row, no curve"


def test_a_curve_of_many_points_is_thinned_and_keeps_its_ends() -> None:
    chance = np.random.default_rng(0)
    found = metrics.describe(chance.integers(0, 3, 400), chance.normal(size=(400, 3)), CLASSES, LABELS)
    curve = found["precision_recall"]
    assert len(curve["recall"]) == len(curve["precision"]) == metrics.CURVE_POINTS
    assert (curve["recall"][0], curve["recall"][-1], curve["precision"][-1]) == (1.0, 0.0, 1.0)


def test_the_worst_errors_come_first_and_right_answers_not_at_all() -> None:
    truth = np.array([0, 0, 1, 2])
    logits = np.array([[5.0, 0, 0], [0, 1.0, 0], [0, -1.0, 6.0], [0.1, 0, 0]])
    found = metrics.worst_errors(truth, logits, CLASSES, LABELS)
    assert [(one["row"], one["expected"], one["answered"]) for one in found] == [
        (2, "b", "c"),
        (1, "a", "b"),
        (3, "c", "a"),
    ]
    assert [one["loss"] for one in found] == pytest.approx(
        [-np.log(softmax(logits, axis=1)[row, truth[row]]) for row in (2, 1, 3)]
    )
    assert found[0]["score"] == pytest.approx(softmax(logits[2]).max())
    assert len(metrics.worst_errors(truth, logits, CLASSES, LABELS, count=2)) == 2
    several = metrics.worst_errors(
        np.array([[1, 0, 1], [0, 0, 0]]), np.array([[3.0, 3, -3], [-3, -3, -3]]), SEVERAL, LABELS
    )
    assert [(one["row"], one["expected"], one["answered"]) for one in several] == [(0, ["a", "c"], ["a", "b"])]
    number = metrics.worst_errors(
        np.array([1.0, 2.0]), np.array([[1.5], [5.0]]), Decision(task=Task.REGRESSION), ("stars",)
    )
    assert [(one["row"], one["expected"], one["answered"], one["score"]) for one in number] == [
        (1, 2.0, 5.0, None),
        (0, 1.0, 1.5, None),
    ]
