"""The gate: its numbers against scipy's and scikit-learn's, how often it lets a worse model pass, and what it says."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import f1_score

from lib.config import validate
from lib.errors import UsageError
from lib.gate import IntArray, Verdict, judge, measure
from lib.score_config import CompareConfig

CLASSES = 4


def answers(rows: int, accuracy: float, alike: float, seed: int) -> tuple[IntArray, IntArray, IntArray]:
    """A truth and two models, right on a part of the rows, that answer a part of the rows alike."""
    chance = np.random.default_rng(seed)
    truth = chance.choice(CLASSES, rows, p=(0.5, 0.3, 0.15, 0.05))
    champion = np.where(chance.random(rows) < accuracy, truth, chance.integers(0, CLASSES, rows))
    other = np.where(chance.random(rows) < accuracy, truth, chance.integers(0, CLASSES, rows))
    return truth, champion, np.where(chance.random(rows) < alike, champion, other)


def verdict_of(truth: IntArray, champion: IntArray, challenger: IntArray, **settings: Any) -> Verdict:
    defaults: dict[str, Any] = {
        "metric": "accuracy",
        "margin": 0.002,
        "confidence": 0.95,
        "resamples": 4_000,
        "seed": 0,
    }
    return judge(truth, champion, challenger, CLASSES, **{**defaults, **settings})


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_the_interval_is_scipys_paired_bootstrap(metric: str) -> None:
    truth, champion, challenger = answers(600, 0.8, 0.6, seed=1)

    def difference(truth: IntArray, champion: IntArray, challenger: IntArray) -> float:
        if metric == "accuracy":
            return float((challenger == truth).mean() - (champion == truth).mean())
        first, second = (
            f1_score(truth, one, labels=range(CLASSES), average="macro", zero_division=0)
            for one in (champion, challenger)
        )
        return float(second - first)

    # Two-sided 90%: it leaves out 5% on each side.
    expected = bootstrap((truth, champion, challenger), difference, n_resamples=400, confidence_level=0.9, method="percentile",
                         paired=True, vectorized=False, rng=np.random.default_rng(5))  # fmt: skip
    found = verdict_of(truth, champion, challenger, metric=metric)
    assert found.difference == pytest.approx(difference(truth, champion, challenger), abs=1e-12)
    spread = float(expected.standard_error)
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.35 * spread)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.35 * spread)


def test_macro_f1_of_drawn_rows_is_scikit_learns() -> None:
    truth, champion, _ = answers(50, 0.5, 1.0, seed=2)
    chance = np.random.default_rng(3)
    for _ in range(20):
        drawn = chance.integers(0, 8, 8)  # few enough that classes are missing
        weights = np.bincount(drawn, minlength=50)[None]
        expected = f1_score(truth[drawn], champion[drawn], labels=range(CLASSES), average="macro", zero_division=0)
        assert measure(weights, truth, champion, CLASSES, "macro_f1")[0] == pytest.approx(expected, abs=1e-12)


def test_mcnemars_exact_p_value() -> None:
    """Ten rows that the champion alone has right and two of the challenger: 2 (1 + 12 + 66) / 2^12."""
    truth = np.zeros(100, np.int64)
    champion, challenger = truth.copy(), truth.copy()
    champion[:2], challenger[2:12] = 1, 1
    found = verdict_of(truth, champion, challenger)
    assert (found.champion_alone_right, found.challenger_alone_right) == (10, 2)
    assert found.mcnemar_p == pytest.approx(2 * 79 / 4096)
    assert found.is_significantly_worse
    assert verdict_of(truth, challenger, champion).mcnemar_p == pytest.approx(2 * 79 / 4096)
    assert not verdict_of(truth, challenger, champion).is_significantly_worse


def test_a_model_that_loses_the_margin_passes_one_time_in_twenty() -> None:
    chance, rows, margin, passed = np.random.default_rng(0), 2_000, 0.02, 0
    for seed in range(400):
        # The champion alone is right on 4% of the rows, the challenger alone on 2%: a true loss of 2 points.
        kind = chance.choice(4, rows, p=(0.04, 0.02, 0.84, 0.10))
        champion, challenger = (np.where(np.isin(kind, right), 0, 1) for right in ((0, 2), (1, 2)))
        found = verdict_of(np.zeros(rows, np.int64), champion, challenger, margin=margin, resamples=400, seed=seed)
        passed += found.is_not_worse
    assert 6 <= passed <= 36, "of 400; 20 are expected"


def test_the_same_answers_are_accepted_and_too_few_rows_are_not() -> None:
    truth, champion, challenger = answers(400, 0.85, 0.8, seed=4)
    same = verdict_of(truth, champion, champion)
    assert same.accepted
    assert (same.difference, same.low, same.mcnemar_p) == (0, 0, 1)
    assert same.reason() == "a loss of 0.20 points in accuracy is ruled out at 95% confidence (at most 0.00 points)"
    few = verdict_of(truth, champion, challenger, metric="macro_f1")
    assert not few.accepted
    assert "400 rows cannot tell: about" in few.reason()
    assert few.rows_needed > 10_000
    worse = verdict_of(truth, champion, (champion + 1) % CLASSES)
    assert not worse.accepted
    assert "it is worse" in worse.reason()
    assert verdict_of(truth, (champion + 1) % CLASSES, champion).accepted


def test_a_model_that_looks_worse_is_not_said_to_need_fewer_rows_than_it_had() -> None:
    truth = np.zeros(400, np.int64)
    champion, challenger = truth.copy(), truth.copy()
    challenger[:6], champion[6:8] = 1, 1  # six rows against two: worse by a point, but not significantly
    found = verdict_of(truth, champion, challenger, margin=0.02)
    assert not found.accepted
    assert not found.is_significantly_worse
    assert found.rows_needed <= 400
    assert found.reason().endswith("; the challenger looks worse: it loses 1.00 points on 400 rows")


def test_no_margin_would_refuse_a_model_that_answers_as_the_other_does() -> None:
    settings = {"test": {"path": "t"}, "gate": {"margin": 0}}
    with pytest.raises(UsageError, match=r"gate\.margin = 0: .*greater than 0"):
        validate(CompareConfig, settings)


def test_the_rows_that_are_asked_for_would_do() -> None:
    """With as many rows, equally good models that differ as these do pass about four times of five."""
    kinds = (0.03, 0.03, 0.84, 0.10)

    def drawn(rows: int, seed: int) -> Verdict:
        kind = np.random.default_rng(seed).choice(4, rows, p=kinds)
        champion, challenger = (np.where(np.isin(kind, right), 0, 1) for right in ((0, 2), (1, 2)))
        return verdict_of(np.zeros(rows, np.int64), champion, challenger, margin=0.01, resamples=400, seed=seed)

    needed = int(np.median([drawn(1_000, seed).rows_needed for seed in range(40)]))
    passed = sum(drawn(needed, 100 + seed).is_not_worse for seed in range(200))
    assert 140 <= passed <= 180, "of 200; 160 are expected"
