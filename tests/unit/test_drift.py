"""Drift: both measures against computations that are not ours, what chance does, and what is compared with what."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp, power_divergence

from lib import drift
from lib.drift import LENGTH_NAMES, Shift, compare, kolmogorov_smirnov, population_stability
from lib.history import Baseline
from lib.outcome import Tally
from lib.schema import Head, Task

COUNTS = st.lists(st.integers(0, 200), min_size=20, max_size=20).filter(any)

MONDAY = Baseline(name="monday", counts={})

HEAD = Head(task=Task.MULTI_CLASS, labels=("a", "b", "c"))


def rows_of(counts: list[int]) -> np.ndarray:
    """A row in the middle of its bin for each one counted."""
    return np.repeat(np.arange(len(counts)) + 0.5, counts)


@given(present=COUNTS, earlier=COUNTS)
def test_kolmogorov_smirnov_is_scipys_of_the_same_rows(present: list[int], earlier: list[int]) -> None:
    distance, p_value = kolmogorov_smirnov(present, earlier)
    expected = ks_2samp(rows_of(present), rows_of(earlier), method="asymp")
    assert distance == pytest.approx(expected.statistic, abs=1e-12)
    # scipy corrects for the size of the samples, the plain limit does not: the same from some hundred rows on.
    if min(sum(present), sum(earlier)) > 300:
        assert p_value == pytest.approx(expected.pvalue, abs=0.02)


@given(present=COUNTS, earlier=COUNTS)
def test_the_index_is_the_sum_of_both_divergences(present: list[int], earlier: list[int]) -> None:
    """scipy gives each Kullback-Leibler divergence as half of a likelihood ratio; Jeffreys' index is both together."""
    kept = [index for index in range(20) if present[index] or earlier[index]]
    p, q = (np.array([side[index] + 0.5 for index in kept]) for side in (present, earlier))
    p, q = p / p.sum(), q / q.sum()
    both = sum(power_divergence(one, other, lambda_="log-likelihood").statistic / 2 for one, other in ((p, q), (q, p)))
    assert population_stability(present, earlier) == pytest.approx(both, abs=1e-9)
    assert population_stability(earlier, present) == pytest.approx(population_stability(present, earlier))
    assert population_stability(present, present) == 0


def test_a_known_index() -> None:
    """(0.7 - 0.5) ln(0.7 / 0.5) + (0.3 - 0.5) ln(0.3 / 0.5), with so many rows that half of one more is nothing."""
    assert population_stability([7_000_000, 3_000_000], [5_000_000, 5_000_000]) == pytest.approx(0.169460, abs=1e-6)


@pytest.mark.parametrize(("rows", "baseline_rows"), [(2_000, 2_000), (500, 20_000)])
def test_one_of_a_hundred_equal_draws_is_beyond_chance(rows: int, baseline_rows: int) -> None:
    chance = np.random.default_rng(0)
    parts = chance.dirichlet(np.full(20, 5.0))
    beyond = 0
    for _ in range(2_000):
        present, earlier = chance.multinomial(rows, parts).tolist(), chance.multinomial(baseline_rows, parts).tolist()
        limit = drift.chance_of(present, earlier, rows, baseline_rows)
        beyond += population_stability(present, earlier) > limit
    assert 2 <= beyond <= 40, "of 2,000; 20 are expected"


def tally(
    labels: dict[str, int], scores: list[int] | None = None, lengths: list[int] | None = None, bad: int = 0
) -> dict:  # type: ignore[type-arg]
    found = Tally()
    rows = sum(labels.values()) + bad
    found.count(
        {
            "rows": rows,
            "truncated": 0,
            "tokens": 0,
            "errors": {"null": bad} if bad else {},
            "labels": labels,
            "abstained": 0,
            "score_bins": scores or [0] * 19 + [rows - bad],
            "length_bins": lengths or [rows - bad] + [0] * (len(LENGTH_NAMES) - 1),
        }
    )
    return found.record()


def named(shifts: list[Shift]) -> dict[str, Shift]:
    return {one.name: one for one in shifts}


def test_each_distribution_is_compared_and_named_by_what_changed_most() -> None:
    before = tally({"a": 500, "b": 400, "c": 100})
    same = named(compare(tally({"a": 5_000, "b": 4_000, "c": 1_000}), before, (HEAD,)))
    assert list(same) == ["labels", "scores", "text lengths", "errors"]
    assert {one.verdict for one in same.values()} == {"none seen"}

    now = named(
        compare(
            tally({"a": 100, "b": 400, "c": 500}, [500, *[0] * 18, 500], [0, 1_000, *[0] * 16], 300), before, (HEAD,)
        )
    )
    assert {one.verdict for one in now.values()} == {"large"}
    assert (now["labels"].most, now["labels"].most_before, now["labels"].most_now) == ("a", 0.5, 0.1)
    assert now["scores"].most == "0.00 to 0.05"
    assert now["scores"].ks == 0.5
    assert now["text lengths"].most == "1 to 8"
    assert now["errors"].most == "with an error"
    assert now["errors"].most_now == pytest.approx(300 / 1_300)
    assert now["labels"].ks is None, "labels have no order"
    assert all(one.exceeds(0.25) for one in now.values())


def test_few_rows_say_so_unless_the_shift_is_beyond_chance() -> None:
    before = tally({"a": 500, "b": 400, "c": 100})
    few = named(compare(tally({"a": 6, "b": 4, "c": 2}), before, (HEAD,)))["labels"]
    assert few.verdict == "too few rows to tell"
    assert not few.exceeds(0.001)
    clear = named(compare(tally({"c": 12}), before, (HEAD,)))["labels"]
    assert clear.exceeds(0.25)


def test_a_label_that_only_one_side_has_is_a_bin() -> None:
    shift = named(compare(tally({"a": 500, "new": 500}), tally({"a": 1_000}), (HEAD,)))["labels"]
    assert (shift.most_now, shift.verdict) == (0.5, "large")


def test_heads_are_compared_one_by_one_and_numbers_by_lengths_and_errors_alone() -> None:
    heads = (
        Head(name="tone", task=Task.MULTI_CLASS, labels=("good", "bad")),
        Head(name="stars", task=Task.REGRESSION, labels=("stars",)),
    )
    found = compare(tally({"tone/good": 90, "tone/bad": 10}), tally({"tone/good": 50, "tone/bad": 50}), heads)
    assert [one.name for one in found] == ["labels of tone", "text lengths", "errors"]


def test_old_records_without_lengths_are_compared_as_far_as_they_go() -> None:
    before = {name: value for name, value in tally({"a": 10}).items() if name != "length_bins"}
    assert [one.name for one in compare(tally({"a": 10}), before, (HEAD,))] == ["labels", "scores", "errors"]
    assert compare(tally({"a": 10}), None, (HEAD,)) == []


def test_the_judgement_says_what_to_do() -> None:
    shifts = compare(tally({"c": 1_000}), tally({"a": 500, "b": 500}), (HEAD,))
    assert drift.judge(shifts, None, MONDAY, 1_000, "tuesday") is None
    assert drift.judge(shifts, 1e6, MONDAY, 1_000, "tuesday") is None
    problem = drift.judge(shifts, 0.2, MONDAY, 1_000, "tuesday")
    assert problem is not None
    assert problem.exit_code == 3
    for part in ("not distributed as in run monday", "labels: population stability index", "most: c, 0.0% before, 100.0% now",
                 "drift.max_psi = 0.2", "--set drift.baseline=tuesday"):  # fmt: skip
        assert part in str(problem)
    assert "scores" not in str(problem)
