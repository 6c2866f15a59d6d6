"""Batching: which rows share a forward pass, and in which order training sees them. Pure functions on lengths.

Letters: B rows of a micro-batch, L its padded length in tokens.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

MEGABATCH_STEPS = 50
"""Training sorts by length inside so many batches at a time: little padding, and order that stays random."""


def cut_by_tokens(lengths: npt.NDArray[np.integer], budget: int) -> list[IntArray]:
    """Cut rows into micro-batches of neighbours in length order, longest first, with `B * L <= budget`.

    Rows of length 0 are in none. A row longer than the budget is alone. Longest first: memory runs out at once or never.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    order = order[: np.count_nonzero(lengths)]
    batches = []
    start = 0
    while start < len(order):
        rows = max(1, budget // int(lengths[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def epoch_batches(lengths: npt.NDArray[np.integer], batch_size: int, seed: int, epoch: int) -> list[IntArray]:
    """All of one epoch's batches: every row once, rows of a batch alike in length, order decided by (seed, epoch) alone."""
    chance = np.random.default_rng([seed, epoch])
    order = chance.permutation(len(lengths))
    span = batch_size * MEGABATCH_STEPS
    pieces = [order[start : start + span] for start in range(0, len(order), span)]
    ordered = (
        np.concatenate([piece[np.argsort(lengths[piece], kind="stable")] for piece in pieces]) if pieces else order
    )
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return [batches[index] for index in chance.permutation(len(batches))]


def evaluation_places(steps_per_epoch: int, evaluations: int) -> set[int]:
    """After which steps of an epoch (1 is the first) validation runs; always after the last one."""
    return {math.ceil(steps_per_epoch * part / evaluations) for part in range(1, evaluations + 1)}


def sample_rows(sizes: Sequence[int], temperature: float, seed: int, epoch: int) -> IntArray:
    """The rows that an epoch sees of sets that lie one after the other, as many as there are in all.

    A set's share of them is its size to the power of 1 / temperature, out of the sum of all of these (Raffel et al. 2020, arXiv
    1910.10683, section 3.5.2); each of its rows comes as often as any other of its rows, or once more. With 1 each row once.
    """
    total = sum(sizes)
    chance = np.random.default_rng([seed, epoch, len(sizes)])
    shares = np.array(sizes, np.float64) ** (1 / temperature)
    ends = np.rint(np.cumsum(shares / shares.sum()) * total).astype(np.int64)
    found, start = [], 0
    for size, wanted in zip(sizes, np.diff(ends, prepend=0), strict=True):
        rounds = [chance.permutation(size) for _ in range(-(-int(wanted) // size))]
        found.append(start + np.sort(np.concatenate(rounds)[:wanted]) if rounds else np.zeros(0, np.int64))
        start += size
    return np.concatenate(found)


def share_of(batch: IntArray, rank: int, world_size: int, accumulation_steps: int) -> list[IntArray]:
    """One worker's rows of a batch, cut into `accumulation_steps` forward passes (some may be empty)."""
    return list(np.array_split(batch[rank::world_size], accumulation_steps))


def gather(
    ids: npt.NDArray[np.integer], offsets: npt.NDArray[np.integer], rows: IntArray
) -> tuple[npt.NDArray[np.integer], IntArray]:
    """Rows of a flat token array (row i is `ids[offsets[i]:offsets[i + 1]]`) one after the other, and their lengths (B)."""
    starts = np.asarray(offsets)[rows].astype(np.int64)
    lengths = np.asarray(offsets)[rows + 1] - starts
    ends = np.cumsum(lengths)
    shift = np.repeat(starts - (ends - lengths), lengths)
    return ids[shift + np.arange(ends[-1])], lengths


def spread(ids: npt.NDArray[np.integer], lengths: IntArray, fill: int) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Rows that lie one after the other, of so many tokens each, as `(B, L)` ids and mask."""
    mask = np.arange(int(lengths.max())) < lengths[:, None]
    padded = np.full(mask.shape, fill, dtype=np.int64)
    padded[mask] = ids
    return padded, mask


def pad(
    ids: npt.NDArray[np.integer], offsets: npt.NDArray[np.integer], rows: IntArray, fill: int
) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Gather rows of a flat token array (row i is `ids[offsets[i]:offsets[i + 1]]`) into `(B, L)` ids and mask."""
    return spread(*gather(ids, offsets, rows), fill)
