"""Labelled rows whose words give their labels away, and how far two models' weights are apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from lib.mapped import LabelledSet
from lib.schema import Task
from lib.windows import Windows
from tests import fakes

WORDS = {"bad": "broken awful terrible sad", "fair": "plain usual average middling", "good": "lovely great sharp happy"}
LABELS = tuple(WORDS)
Weights = dict[str, torch.Tensor]


def make_rows(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Texts of many lengths with words that give their labels away."""
    chance = np.random.default_rng(seed)
    prose = fakes.PROSE.split()
    labels = [LABELS[index] for index in chance.integers(0, len(LABELS), count)]
    texts = []
    for label in labels:
        words = [*chance.choice(prose, int(chance.integers(1, 30))), *chance.choice(WORDS[label].split(), 3)]
        texts.append(" ".join(chance.permutation(words)))
    return texts, labels


def difference(first: Weights, second: Weights) -> float:
    """The largest one between two models' weights.

    Without the keys' biases: softmax does not see them, so their gradient is rounding alone, which Adam blows up to steps.
    """
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first if not name.endswith("key.bias"))


def make_set(
    path: Path,
    labels: Sequence[Any],
    task: Task = Task.MULTI_CLASS,
    weights: npt.NDArray[np.float32] | None = None,
    batch_rows: int | None = None,
    max_length: int = 64,
    windows: Windows | None = None,
) -> LabelledSet:
    """A mapped set of token ids of chance, 2 to 40 a row, in record batches of `batch_rows`."""
    chance = np.random.default_rng(0)
    lists = [chance.integers(5, 200, int(chance.integers(2, 40))).tolist() for _ in labels]
    columns = {"ids": pa.array(lists, pa.list_(pa.uint16())), "label": list(labels)}
    table = pa.table(columns if weights is None else {**columns, "weight": weights})
    with pa.ipc.new_file(path, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=batch_rows):
            writer.write_batch(batch)
    return LabelledSet([str(path)], LABELS, task, 0, max_length, windows)
