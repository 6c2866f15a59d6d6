"""The order in which training sees its rows: every row once an epoch, and nothing but (seed, epoch) decides it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.batching import epoch_batches, evaluation_places, share_of
from lib.learning import dropout_seed, rate_factor
from lib.mapped import split_rows

lengths_lists = st.lists(st.integers(2, 128), min_size=1, max_size=400)
sizes = st.integers(1, 40)
seeds = st.integers(0, 2**31)


@given(lengths_lists, sizes, seeds, st.integers(0, 50))
def test_every_row_comes_once_an_epoch(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(np.array(lengths), batch_size, seed, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert sum(len(batch) != batch_size for batch in batches) <= 1


@given(lengths_lists, sizes, seeds, st.integers(0, 50))
def test_order_depends_on_seed_and_epoch_alone(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    first = epoch_batches(np.array(lengths), batch_size, seed, epoch)
    np.random.default_rng(epoch).random()  # whatever ran before
    np.random.seed(epoch)
    again = epoch_batches(np.array(lengths), batch_size, seed, epoch)
    assert [batch.tolist() for batch in first] == [batch.tolist() for batch in again]


def test_epochs_and_seeds_differ() -> None:
    lengths = np.full(100, 7)
    orders = {
        np.concatenate(epoch_batches(lengths, 8, seed, epoch)).tobytes() for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9


def test_a_batch_holds_rows_of_like_length_and_batches_come_in_no_order_of_length() -> None:
    lengths = np.random.default_rng(0).integers(2, 128, 3_200)
    batches = epoch_batches(lengths, 32, 0, 0)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.05 * lengths.sum()  # at random: 1.9 times
    means = np.array([lengths[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.3


@given(st.integers(1, 70), st.integers(1, 8), st.integers(1, 5))
def test_shares_partition_a_batch(rows: int, world_size: int, accumulation_steps: int) -> None:
    batch = np.random.default_rng(rows).permutation(1_000)[:rows]
    shares = [share_of(batch, rank, world_size, accumulation_steps) for rank in range(world_size)]
    assert sorted(row for share in shares for part in share for row in part.tolist()) == sorted(batch.tolist())
    assert all(len(share) == accumulation_steps for share in shares)
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(0, 4), min_size=2, max_size=300), st.floats(0.01, 0.9), seeds)
def test_a_split_parts_the_rows_by_class(classes: list[int], fraction: float, seed: int) -> None:
    targets = np.array(classes)
    train, valid = split_rows(targets, fraction, seed)
    assert sorted([*train.tolist(), *valid.tolist()]) == list(range(len(classes)))
    assert set(targets[train]) == set(classes), "a class without a training row cannot be learned"
    for one in set(classes):
        count = classes.count(one)
        assert abs(int((targets[valid] == one).sum()) - count * fraction) <= 1
    assert len(valid) or max(map(classes.count, classes)) == 1
    again = split_rows(targets, fraction, seed)
    assert train.tolist() == again[0].tolist()


def test_the_rate_warms_up_then_falls_to_zero() -> None:
    factors = [rate_factor(step, 10, 0.2) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2:] == pytest.approx([1 - index / 8 for index in range(8)])
    assert [rate_factor(step, 4, 0) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    assert rate_factor(3, 4, 1) == 1.0


def test_dropout_differs_from_step_to_step_and_from_worker_to_worker() -> None:
    found = [dropout_seed(seed, step, rank) for seed in range(3) for step in range(10) for rank in range(3)]
    assert len(set(found)) == len(found)
    assert found[4] == dropout_seed(0, 1, 1)


@settings(max_examples=50)
@given(st.integers(1, 100), st.integers(1, 120))
def test_an_epoch_ends_with_an_evaluation(steps: int, evaluations: int) -> None:
    places = evaluation_places(steps, evaluations)
    assert max(places) == steps
    assert min(places) >= 1
    assert len(places) == min(steps, evaluations)
