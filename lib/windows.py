"""Long texts in windows: each as long as the model takes, neighbours overlapping, and one answer from those of all.

The windows of a row stand one behind the other in its token ids. All but the last one are full, so that the row's length
says where each begins. Letters: N rows, W windows of all of them, T tokens of all.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Windows:
    """How long texts are cut into windows, and what becomes of the windows' answers."""

    stride: int
    """tokens that neighbouring windows share, as `transformers` has it"""
    most: int
    """of one text; what lies behind them is cut off"""
    pooling: Literal["mean", "max"]
    """of the windows' logits"""

    def limit(self, size: int, specials: int) -> int:
        """The most tokens of a text that fit, special ones included once, in windows of `size`."""
        return size + (self.most - 1) * (size - specials - self.stride)

    def lay_out(
        self, ids: npt.NDArray[np.integer], lengths: IntArray, size: int, around: tuple[int, int]
    ) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int32]]:
        """Token ids (T,) of N texts and their lengths to those of their windows.

        `around`: so many special tokens stand before and behind a text, and then before and behind each of its windows.
        """
        before, behind = around
        room = size - before - behind
        step = room - self.stride
        lengths = lengths.astype(np.int64)
        counts = 1 + np.maximum(0, -(-(lengths - size) // step))
        owners = np.repeat(np.arange(len(lengths)), counts)
        shifts = (np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)) * step
        sizes = np.minimum(size, lengths[owners] - shifts)
        place = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        moved = np.where(place < before, 0, np.repeat(shifts, sizes))
        moved = np.where(place >= np.repeat(sizes - behind, sizes), np.repeat(lengths[owners] - sizes, sizes), moved)
        source = np.repeat((np.cumsum(lengths) - lengths)[owners], sizes) + moved + place
        return ids[source], np.bincount(owners, sizes, len(lengths)).astype(np.int32)


def split(lengths: IntArray, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Lengths (N,) of rows that are laid out in windows to the number of windows of each (N,), and the windows' lengths (W,).

    A row without tokens is one window without any.
    """
    counts = np.maximum(1, -(-lengths.astype(np.int64) // size))
    sizes = np.full(int(counts.sum()), size, np.int64)
    sizes[np.cumsum(counts) - 1] = lengths - (counts - 1) * size
    return counts, sizes
