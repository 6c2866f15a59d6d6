"""How many tokens go into one forward pass on a GPU: found by timing a few, remembered on the node, lowered when memory ends."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from lib.storage import cache_folder

SMALLEST, LARGEST = 8_192, 524_288

WORTH = 1.03
"""A pass of twice the tokens is taken if it does so many times as many in a second: a smaller one is kinder to memory."""


def best_budget(seconds_of: Callable[[int], float]) -> int:
    """The tokens of one pass, doubled as long as that is worth it and memory suffices. `seconds_of` times a pass.

    After a size at which memory ends one half of the largest that fits is taken: real rows differ in length.
    """
    best, best_rate = SMALLEST, 0.0
    budget = SMALLEST
    while budget <= LARGEST:
        try:
            rate = budget / seconds_of(budget)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return max(1, min(best, budget // 4))
        if rate < best_rate * WORTH:
            break
        best, best_rate = budget, rate
        budget *= 2
    return best


def recall(key: str) -> int | None:
    """The budget that was found on this node for this GPU, model and engine, if any."""
    try:
        return max(1, int(path_of(key).read_text()))
    except (OSError, ValueError):
        return None


def remember(key: str, budget: int) -> None:
    """Keep a budget on this node; whoever else is at it may win, and a node that keeps nothing finds it again."""
    try:
        path_of(key).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path_of(key).write_text(str(budget))
    except OSError:
        return


def path_of(key: str) -> Path:
    """Where a budget is kept."""
    return cache_folder("budgets") / hashlib.sha256(key.encode()).hexdigest()[:24]
