"""Batching: every row in one batch, budgets kept, order restored, padding equal to a naive loop."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lib.batching import MEGABATCH_STEPS, cut_by_tokens, epoch_batches, gather, pad, share_of

lengths_of_rows = st.lists(st.integers(0, 300), max_size=200).map(lambda rows: np.array(rows, np.int32))


@given(lengths_of_rows, st.integers(1, 2000))
def test_micro_batches_cover_every_row_with_tokens_once(lengths: np.ndarray, budget: int) -> None:
    batches = cut_by_tokens(lengths, budget)
    rows = np.concatenate([*batches, np.empty(0, np.int64)])
    assert sorted(rows) == list(np.flatnonzero(lengths))
    assert all(len(batch) for batch in batches)


@given(lengths_of_rows, st.integers(1, 2000))
def test_micro_batches_keep_the_budget_unless_a_row_is_alone(lengths: np.ndarray, budget: int) -> None:
    for batch in cut_by_tokens(lengths, budget):
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget


@given(lengths_of_rows, st.integers(1, 2000))
def test_micro_batches_are_neighbours_in_length_order_longest_first(lengths: np.ndarray, budget: int) -> None:
    in_order = [int(lengths[row]) for batch in cut_by_tokens(lengths, budget) for row in batch]
    assert in_order == sorted(in_order, reverse=True)


@given(lengths_of_rows, st.integers(1, 2000))
def test_scattering_answers_restores_the_order(lengths: np.ndarray, budget: int) -> None:
    answers = np.zeros(len(lengths), np.int64)
    for batch in cut_by_tokens(lengths, budget):
        answers[batch] = lengths[batch] * 7
    assert (answers == lengths * 7).all()


def test_lengths_in_unsigned_integers_are_sorted_too() -> None:
    lengths = np.array([3, 0, 200, 7], np.uint8)
    assert [list(batch) for batch in cut_by_tokens(lengths, 200)] == [[2], [3, 0]]


@given(st.lists(st.integers(0, 9), max_size=30), st.data())
def test_pad_equals_a_naive_loop(lengths: list[int], data: st.DataObject) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.arange(1, offsets[-1] + 1).astype(np.uint16)
    longest = [row for row, length in enumerate(lengths) if length]
    if not longest:
        return
    rows = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, max_size=10))
    padded, mask = pad(ids, offsets, np.array(rows), fill=9999)
    together, sizes = gather(ids, offsets, np.array(rows))
    assert np.array_equal(together, padded[mask]) and np.array_equal(sizes, mask.sum(axis=1))
    width = max(lengths[row] for row in rows)
    for position, row in enumerate(rows):
        tokens = [int(token) for token in ids[offsets[row] : offsets[row + 1]]]
        assert padded[position].tolist() == tokens + [9999] * (width - len(tokens))
        assert mask[position].tolist() == [True] * len(tokens) + [False] * (width - len(tokens))
    assert padded.dtype == np.int64


@given(st.integers(0, 500), st.integers(1, 40), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_has_every_row_once_and_is_decided_by_seed_and_epoch(
    rows: int, batch_size: int, seed: int, epoch: int
) -> None:
    lengths = np.random.default_rng(rows).integers(1, 100, rows)
    batches = epoch_batches(lengths, batch_size, seed, epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    again = epoch_batches(lengths, batch_size, seed, epoch)
    assert all((one == other).all() for one, other in zip(batches, again, strict=True))


def test_epochs_and_seeds_differ() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 400)
    orders = {tuple(np.concatenate(epoch_batches(lengths, 8, seed, epoch))) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_rows_of_a_training_batch_are_alike_in_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 8 * MEGABATCH_STEPS)
    spread = [int(np.ptp(lengths[batch])) for batch in epoch_batches(lengths, 8, 0, 0)]
    assert max(spread) < 60


@given(st.integers(0, 60), st.integers(1, 5), st.integers(1, 4))
def test_shares_of_all_workers_make_up_the_batch(rows: int, world_size: int, steps: int) -> None:
    batch = np.random.default_rng(rows).permutation(rows)
    shares = [share_of(batch, rank, world_size, steps) for rank in range(world_size)]
    assert all(len(share) == steps for share in shares)
    assert sorted(row for share in shares for part in share for row in part) == list(range(rows))
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
