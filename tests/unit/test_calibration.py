"""Temperature, thresholds and calibration error against data whose truth is known, and scikit-learn."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score, log_loss, precision_recall_curve, precision_score, recall_score
from torch.nn import functional

from lib.blocks import summarise
from lib.calibration import (
    Decision,
    calibration_error,
    chance_error,
    check_decision,
    decide,
    find_temperature,
    find_thresholds,
    reliability,
)
from lib.errors import UsageError
from lib.metrics import describe
from lib.schema import Head, PredictionSchema, Task, to_results
from lib.train_config import DecisionSection

ROWS, CLASSES = 20_000, 5


def honest(task: Task, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) and answers drawn from just the probabilities that they say."""
    chance = np.random.default_rng(seed)
    logits = chance.normal(scale=2, size=(ROWS, CLASSES))
    if task is Task.MULTI_LABEL:
        return logits, (chance.random(logits.shape) < expit(logits)).astype(np.uint8)
    sums = softmax(logits, axis=1).cumsum(axis=1)
    return logits, (chance.random((ROWS, 1)) > sums).sum(axis=1).clip(0, CLASSES - 1)


@pytest.mark.parametrize("task", [Task.MULTI_CLASS, Task.MULTI_LABEL])
@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_a_factor(task: Task, factor: float) -> None:
    logits, truth = honest(task)
    found = find_temperature(logits * factor, truth, task)
    assert found == pytest.approx(factor, rel=0.03)
    before, after = (Decision(task=task, temperature=one) for one in (1.0, found))
    assert calibration_error(reliability(after.probabilities(logits * factor), truth, task)) < 0.015
    if factor != 1:
        assert calibration_error(reliability(before.probabilities(logits * factor), truth, task)) > 0.05
        assert after.losses(logits * factor, truth).mean() < before.losses(logits * factor, truth).mean()
    if task is Task.MULTI_CLASS:
        assert (before.answers(logits) == after.answers(logits)).all()


@pytest.mark.parametrize("accuracy", [0.7, 0.9, 0.99])
def test_as_many_rows_as_can_be_get_a_label(accuracy: float, capsys: pytest.CaptureFixture[str]) -> None:
    logits, truth = honest(Task.MULTI_CLASS)
    found = decide(DecisionSection(abstain=accuracy), logits, truth, Task.MULTI_CLASS)
    scores, right = softmax(logits, axis=1).max(axis=1), logits.argmax(axis=1) == truth
    limits = [limit for limit in np.unique(scores) if right[scores >= limit].mean() >= accuracy]
    assert (found.answered(logits) == (scores >= limits[0])).all()

    head = Head(task=Task.MULTI_CLASS, labels=tuple("abcde"), thresholds=found.thresholds)
    schema = PredictionSchema(heads=(head,), prefix="", probabilities=False, keys=pa.schema([]))
    errors = np.zeros(ROWS, np.uint8)
    errors[:3] = 2
    written = to_results(schema, softmax(logits, axis=1).astype(np.float32), errors, errors.astype(bool), errors)
    labels, given = written["label"].to_numpy(), scores >= limits[0]
    given[:3] = False
    assert (pd.notna(labels) == given).all()
    assert (labels[given] == np.array(list("abcde"))[logits.argmax(axis=1)[given]]).all()
    assert written["score"].null_count == 3
    assert "WARNING" not in capsys.readouterr().err

    described = describe(truth, logits, found, "abcde")
    assert described["coverage"] == pytest.approx((scores >= limits[0]).mean())
    assert described["answered_accuracy"] == pytest.approx(right[scores >= limits[0]].mean())
    assert summarise(schema, written)["abstained"] == ROWS - 3 - given.sum()


def test_abstention_at_the_ends(capsys: pytest.CaptureFixture[str]) -> None:
    logits = np.array([[3.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    section = DecisionSection(abstain=0.9)
    everyone = decide(section, logits, np.array([0, 0, 0, 1]), Task.MULTI_CLASS)
    assert everyone.thresholds == (0, 0)
    nobody = decide(section, logits, np.array([1, 0, 1, 1]), Task.MULTI_CLASS)
    assert "the surest 4 of 4 validation rows are right 50.00% of the time" in capsys.readouterr().err
    assert nobody.answered(logits).all()
    ties = decide(section, logits, np.array([0, 0, 1, 1]), Task.MULTI_CLASS)
    assert ties.answered(logits).tolist() == [True, False, False, False]


@pytest.mark.parametrize("task", [Task.MULTI_CLASS, Task.MULTI_LABEL])
def test_losses_are_those_of_torch(task: Task) -> None:
    logits, truth = honest(task)
    found = Decision(task=task, temperature=2.0).losses(logits[:50], truth[:50])
    scaled, target = torch.from_numpy(logits[:50] / 2), torch.from_numpy(truth[:50])
    expected = (
        functional.binary_cross_entropy_with_logits(scaled, target.double(), reduction="none").mean(1)
        if task is Task.MULTI_LABEL
        else functional.cross_entropy(scaled, target, reduction="none")
    )
    assert found == pytest.approx(expected.numpy())
    if task is Task.MULTI_CLASS:
        assert found.mean() == pytest.approx(
            log_loss(truth[:50], softmax(logits[:50] / 2, axis=1), labels=range(CLASSES))
        )


def best_f1(truth: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """The best F1 that any threshold has on these rows, and the threshold, by scikit-learn."""
    precision, recall, limits = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(f1.max()), float(limits[min(int(f1.argmax()), len(limits) - 1)])


def test_thresholds_have_the_best_f1_that_there_is_whatever_the_scores_say() -> None:
    logits, truth = honest(Task.MULTI_LABEL)
    probabilities = expit(1.7 * logits - 1)
    for column, limit in enumerate(find_thresholds(probabilities, truth, "f1")):
        best, _ = best_f1(truth[:, column], probabilities[:, column])
        assert f1_score(truth[:, column], probabilities[:, column] >= limit) == pytest.approx(best, abs=0.003)
        assert f1_score(truth[:, column], probabilities[:, column] >= 0.5) < best - 0.01
        assert limit not in probabilities[:, column], "half-way between two, so that rounding changes nothing"


def test_thresholds_of_rare_labels_are_not_those_of_the_few_rows_that_have_them() -> None:
    """500 labels that 2% of 500 rows have: on other rows the best threshold of these gives less than what is expected."""
    chance = np.random.default_rng(0)
    logits, new = (chance.normal(-6, 2.5, (rows, 500)) for rows in (500, 2_000))
    truth, fresh = (chance.random(one.shape) < expit(one) for one in (logits, new))
    assert 0.015 < truth.mean() < 0.05
    scores, later = expit(1.5 * logits + 1), expit(1.5 * new + 1)
    found = find_thresholds(scores, truth.astype(np.int64), "f1")
    on_these = [best_f1(one, score)[1] for one, score in zip(truth.T, scores.T, strict=True)]
    f1 = [f1_score(fresh, later >= np.array(limits), average="macro") for limits in (found, on_these)]
    best = np.mean([best_f1(one, score)[0] for one, score in zip(fresh.T, later.T, strict=True)])
    assert f1[1] + 0.02 < f1[0] < best


def test_thresholds_of_equal_scores_and_of_a_label_that_all_rows_have() -> None:
    scores = np.array([[0.9, 0.4], [0.9, 0.3], [0.9, 0.3], [0.1, 0.6]])
    found = find_thresholds(scores, np.array([[1, 1], [1, 1], [0, 1], [0, 1]]), "f1")
    assert found == pytest.approx((0.5, 0.3))
    assert (scores[:, 1] >= found[1]).all()


def test_thresholds_keep_a_precision_with_the_best_recall() -> None:
    logits, truth = honest(Task.MULTI_LABEL)
    probabilities, truth = expit(logits[:300]), truth[:300]
    for column, limit in enumerate(find_thresholds(probabilities, truth, 0.9)):
        answers = probabilities[:, column] >= limit
        assert precision_score(truth[:, column], answers) >= 0.9
        others = [probabilities[:, column] >= one for one in probabilities[:, column]]
        allowed = [one for one in others if precision_score(truth[:, column], one) >= 0.9]
        assert recall_score(truth[:, column], answers) == max(recall_score(truth[:, column], one) for one in allowed)


def test_labels_without_a_row_and_precisions_out_of_reach_have_a_threshold() -> None:
    probabilities = np.array([[0.2, 0.9], [0.3, 0.8]])
    assert find_thresholds(probabilities, np.array([[0, 0], [0, 1]]), 0.9) == pytest.approx((0.5, 0.85))


def test_the_bins_are_those_of_scikit_learn_and_their_gap_is_the_calibration_error() -> None:
    """scikit-learn bins the probability of the positive class of multi-label pairs; ours are the same, with their rows."""
    logits, truth = honest(Task.MULTI_LABEL)
    probabilities = expit(1.5 * logits)
    bins = reliability(probabilities, truth, Task.MULTI_LABEL)
    right, score = calibration_curve(truth.ravel(), probabilities.ravel(), n_bins=15)
    assert [one["right"] for one in bins] == pytest.approx(right)
    assert [one["score"] for one in bins] == pytest.approx(score)
    rows = np.histogram(probabilities, bins=np.linspace(0, 1, 16))[0]
    assert [one["rows"] for one in bins] == list(rows)
    assert calibration_error(bins) == pytest.approx(np.average(np.abs(right - score), weights=rows))


def test_the_score_of_one_label_a_row_is_that_of_the_likeliest() -> None:
    """Two rows in the bin from 0.6, one of them right, two in the last one, one of them wrong with a score of 1."""
    probabilities = np.array([[0.62, 0.38], [0.36, 0.64], [0.98, 0.02], [1.0, 0.0]])
    bins = reliability(probabilities, np.array([0, 0, 0, 1]), Task.MULTI_CLASS)
    assert [one["rows"] for one in bins] == [2, 2]
    assert [one["score"] for one in bins] == pytest.approx([0.63, 0.99])
    assert [one["right"] for one in bins] == [0.5, 0.5]
    assert calibration_error(bins) == pytest.approx((2 * 0.13 + 2 * 0.49) / 4)


@pytest.mark.parametrize("task", [Task.MULTI_CLASS, Task.MULTI_LABEL])
def test_what_chance_leaves_of_honest_scores_is_what_drawing_the_labels_from_them_leaves(task: Task) -> None:
    chance = np.random.default_rng(1)
    logits = chance.normal(scale=3.0, size=(1_500, 4))
    probabilities = softmax(logits, axis=1) if task is Task.MULTI_CLASS else expit(logits)
    found = []
    for _ in range(200):
        if task is Task.MULTI_LABEL:
            truth = (chance.random(probabilities.shape) < probabilities).astype(np.int64)
        else:
            truth = (chance.random((len(logits), 1)) > probabilities.cumsum(axis=1)).sum(axis=1)
        bins = reliability(probabilities, truth, task)
        found.append(calibration_error(bins))
    assert chance_error(bins) == pytest.approx(np.mean(found), rel=0.05)
    assert chance_error(bins) < calibration_error(reliability(np.sqrt(probabilities), truth, task))


def test_scoring_gives_the_labels_that_training_measured() -> None:
    logits, truth = honest(Task.MULTI_LABEL)
    section = DecisionSection(temperature=True, thresholds="f1")
    decision = decide(section, 2 * logits[:400], truth[:400], Task.MULTI_LABEL)
    assert decision.thresholds is not None
    labels = tuple("abcde")
    head = Head(task=Task.MULTI_LABEL, labels=labels, thresholds=decision.thresholds)
    schema = PredictionSchema(heads=(head,), prefix="", probabilities=False, keys=pa.schema([]))
    scores = (torch.from_numpy(2 * logits[:400].astype(np.float32)) / decision.temperature).sigmoid().numpy()
    nothing = np.zeros(400, np.uint8)
    rows = to_results(schema, scores, nothing, nothing.astype(bool), nothing)["labels"].to_pylist()
    answers = decision.answers(2 * logits[:400])
    assert rows == [[label for label, one in zip(labels, row, strict=True) if one] for row in answers]


def test_thresholds_of_a_single_answer_are_refused() -> None:
    with pytest.raises(UsageError, match=r"decision\.thresholds: each row of this data has one label"):
        check_decision(DecisionSection(thresholds="f1"), Task.MULTI_CLASS)
    with pytest.raises(UsageError, match=r"decision\.abstain: a row of this data may have no label as it is"):
        check_decision(DecisionSection(abstain=0.9), Task.MULTI_LABEL)
    with pytest.raises(UsageError, match=r"decision\.temperature: it is for classes, and train\.regression"):
        check_decision(DecisionSection(temperature=True), Task.REGRESSION)
    check_decision(DecisionSection(), Task.REGRESSION)
