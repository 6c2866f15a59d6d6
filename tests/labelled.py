"""Labelled rows whose words give their labels away, and how far two models' weights are apart."""

import numpy as np
import torch

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
