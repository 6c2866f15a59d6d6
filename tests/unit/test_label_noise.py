"""Labels that look wrong: those that were made wrong are found, and little else."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from lib import label_noise
from lib.label_noise import find_suspects, rows_to_look_at

LABELS = ("a", "b", "c", "d")


def make_rows(count: int, seed: int = 0) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]:
    """Rows (N, 16) around a centre for each class, which overlap; classes of different sizes."""
    chance = np.random.default_rng(seed)
    centres = 0.6 * chance.normal(size=(4, 16))
    targets = chance.choice(4, count, p=[0.4, 0.3, 0.2, 0.1])
    return centres[targets] + chance.normal(size=(count, 16)), targets


def test_labels_that_were_made_wrong_are_found_and_the_clearest_come_first() -> None:
    features, truth = make_rows(800)
    wrong = np.sort(np.random.default_rng(1).choice(800, 40, replace=False))
    targets = truth.copy()
    targets[wrong] = (truth[wrong] + 1 + np.arange(40) % 3) % 4
    numbers = np.arange(800) * 3 + 7
    found = find_suspects(features, targets, numbers, LABELS, 0)
    rows = [one.row for one in found]
    assert len(set(rows) & set(numbers[wrong])) >= 24
    assert len(set(rows) - set(numbers[wrong])) <= 30
    assert len(set(rows[:15]) & set(numbers[wrong])) >= 12, "the clearest come first"
    for one in found[:15]:
        place = (one.row - 7) // 3
        assert one.label == LABELS[targets[place]]
        assert place not in wrong or one.likelier == LABELS[truth[place]]
        assert 0.5 < one.confidence <= 1
    assert found == find_suspects(features, targets, numbers, LABELS, 0)
    assert all(left.row != right.row for left, right in pairwise(found))


def test_classes_with_few_rows_are_left_alone() -> None:
    features, targets = make_rows(300)
    targets = np.where(targets == 3, 2, targets)
    targets[:3] = 3  # they look like others, but no fold could learn what they are
    assert not {one.row for one in find_suspects(features, targets, np.arange(300), LABELS, 0)} & {0, 1, 2}
    assert find_suspects(features[:6], np.array([0, 0, 0, 0, 0, 1]), np.arange(6), LABELS, 0) == []


def test_of_many_rows_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_to_look_at(50, 0).tolist() == list(range(50))
    monkeypatch.setattr(label_noise, "MAX_ROWS", 20)
    some = rows_to_look_at(50, 0)
    assert len(set(some.tolist())) == 20 and some.tolist() == sorted(some) != list(range(20))
