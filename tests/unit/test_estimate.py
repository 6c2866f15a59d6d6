"""Estimates from a sample: right on average whatever the guess, as far off as they say, and exact where everything is read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.estimate import DRAWS, LEAST_ROWS, MOST_ROWS, Draws, Estimate, draw, estimate, guess_tokens
from lib.planning import RowGroup, chunks_of
from lib.sampling import Window, by_group, move_up
from lib.survey import tally_chunks

MB = 2**20


def read(draws: Draws, lengths: list[np.ndarray]) -> Estimate:
    """What reading the windows gives; `lengths` are the tokens of each unit's rows."""
    windows = zip(draws.unit, draws.first, draws.rows, strict=True)
    tokens = [int(lengths[unit][first : first + rows].sum()) for unit, first, rows in windows]
    found = estimate(draws, np.array(tokens), draws.rows)
    assert found is not None
    return found


def skewed(seed: int, by_dictionary: bool = False) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """40 units of short texts and 2 of 500 times as many long ones; the footer's bytes, or next to none behind a dictionary."""
    chance = np.random.default_rng(seed)
    sizes = [200] * 40 + [100_000] * 2
    means = [chance.uniform(5, 15) for _ in range(40)] + [300.0, 150.0]
    lengths = [
        np.clip(mean * chance.lognormal(0, 0.8, size), 3, 512).astype(np.int64)
        for size, mean in zip(sizes, means, strict=True)
    ]
    texts = [1_000 if by_dictionary else int(one.sum() * chance.uniform(3, 6)) for one in lengths]
    return lengths, np.array(sizes, np.int64), np.array(texts, np.int64)


@pytest.mark.parametrize("by_dictionary", [False, True])
def test_intervals_hold_the_truth_as_often_as_they_say_and_are_narrow(by_dictionary: bool) -> None:
    held, off = 0, []
    for seed in range(200):
        lengths, rows, texts = skewed(seed, by_dictionary)
        truth = sum(int(one.sum()) for one in lengths)
        draws = draw(rows, guess_tokens(rows, texts, 512), np.random.default_rng(seed))
        assert draws.rows.sum() <= LEAST_ROWS
        found = read(draws, lengths)
        held += found.low <= truth <= found.high
        off.append(found.value / truth - 1)
    assert held >= 180, "95%, less what chance leaves of 200"
    assert abs(np.mean(off)) < 0.01, "right on average"
    assert np.quantile(np.abs(off), 0.99) < 0.15


def test_a_tenth_of_a_percent_is_read_within_bounds() -> None:
    for rows, expected in ((10_000, LEAST_ROWS), (10_000_000, 10_000), (10**9, MOST_ROWS)):
        units = np.full(500, rows // 500, np.int64)
        draws = draw(units, units.astype(float), np.random.default_rng(0))
        assert expected - DRAWS < draws.rows.sum() <= expected
        assert len(np.unique(draws.unit)) >= DRAWS - 1, "spread over the archive"


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(lambda rows: sum(rows) > 0), st.integers(0, 99))
def test_few_rows_are_all_read_and_give_the_exact_sum(sizes: list[int], seed: int) -> None:
    chance = np.random.default_rng(seed)
    lengths = [chance.integers(0, 512, size) for size in sizes]
    rows = np.array(sizes, np.int64)
    draws = draw(rows, guess_tokens(rows, rows, 512), chance)
    found = read(draws, lengths)
    assert found.low == pytest.approx(found.high)
    assert found.value == pytest.approx(sum(int(one.sum()) for one in lengths))


@given(
    st.lists(st.integers(1, 3_000), min_size=1, max_size=30),
    st.lists(st.integers(0, 10**9), min_size=30, max_size=30),
    st.integers(1, 5_000),
    st.integers(0, 99),
)
def test_windows_lie_in_their_units(sizes: list[int], texts: list[int], wanted: int, seed: int) -> None:
    rows = np.array(sizes, np.int64)
    guesses = guess_tokens(rows, np.array(texts[: len(sizes)], np.int64), 512)
    draws = draw(rows, guesses, np.random.default_rng(seed), wanted, may_be_census=False)
    assert (draws.first >= 0).all()
    assert (draws.rows >= 1).all()
    assert (draws.first + draws.rows <= rows[draws.unit]).all()


def test_windows_that_could_not_be_read_are_left_out() -> None:
    rows = np.full(10, 1_000, np.int64)
    draws = draw(rows, rows.astype(float), np.random.default_rng(0))
    was_read = np.where(np.arange(DRAWS) % 2, draws.rows, 0)
    found = estimate(draws, was_read * 7, was_read)
    assert found is not None
    assert found.value == pytest.approx(70_000)
    assert estimate(draws, was_read * 0, was_read * 0) is None


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 60)), min_size=1, max_size=8),
    st.lists(st.integers(0, 50), min_size=1, max_size=8),
)
def test_windows_are_found_in_their_row_groups(spans: list[tuple[int, int]], groups: list[int]) -> None:
    windows = [Window(number, first, rows) for number, (first, rows) in enumerate(spans)]
    starts = np.concatenate([[0], np.cumsum(groups)])
    for whole in (False, True):
        found: dict[int, list[int]] = {window.number: [] for window in windows}
        for index, inside in by_group(windows, groups, whole).items():
            for one in inside:
                assert 0 <= one.first < one.first + one.rows <= groups[index]
                found[one.number] += range(starts[index] + one.first, starts[index] + one.first + one.rows)
        for window in windows:
            rows = list(range(window.first, min(window.first + window.rows, starts[-1])))
            assert sorted(found[window.number]) == rows[: len(found[window.number])]
            assert not whole or sorted(found[window.number]) == rows
            assert whole or len(set(np.searchsorted(starts, found[window.number], side="right"))) <= 1
            assert bool(rows) == bool(found[window.number])


def test_a_window_deep_in_a_row_group_is_moved_up() -> None:
    assert move_up(Window(0, 5_000, 8), 999) == Window(0, 0, 8)
    assert move_up(Window(0, 999, 8), 999) == Window(0, 999, 8)


shards = st.lists(
    st.lists(st.builds(RowGroup, rows=st.integers(0, 400), text_bytes=st.integers(0, 2 * MB)), min_size=1, max_size=6),
    min_size=1,
    max_size=8,
)


@given(shards, st.randoms(use_true_random=False))
def test_what_is_to_score_is_what_is_planned_and_not_there(all_groups: list[list[RowGroup]], chance: object) -> None:
    """Whatever part of the objects is there."""
    chunks = [
        chunk
        for number, groups in enumerate(all_groups)
        for chunk in chunks_of(f"{number}.parquet", "0123456789ab", groups, MB)
    ]
    is_there = {chunk.name: chance.random() < 0.5 for chunk in chunks}  # type: ignore[attr-defined]
    there = frozenset((one.shard, one.identity, one.index, one.count) for one in chunks if is_there[one.name])
    tally = tally_chunks(chunks, there, MB)
    todo = [chunk for chunk in chunks if chunk.rows and not is_there[chunk.name]]
    assert [tally.shards[number][0] for number in tally.shard] == [chunk.shard for chunk in todo]
    assert list(zip(tally.start, tally.rows, strict=True)) == [(chunk.start, chunk.rows) for chunk in todo]
    assert all(0 <= block < tally.num_blocks for block in tally.block)
