"""How many tokens go into one forward pass on a GPU: found by timing a few, remembered on the node, lowered when memory ends."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from lib.storage import cache_folder

SMALLEST, LARGEST = 8_192, 524_288

WORTH = 1.03
"""A larger pass is taken if it does so many times as many tokens in a second: a smaller one is kinder to memory."""

TRIES = 2
"""Sizes in a row that are no faster before no larger one is tried: one alone may have been disturbed."""


def best_budget(seconds_of: Callable[[int], float]) -> int:
    """The tokens of one pass, doubled as long as that is worth it and memory suffices. `seconds_of` times a pass.

    After a size at which memory ends one half of the largest that fits is taken: real rows differ in length.
    """
    rates: dict[int, float] = {}
    budget, most = SMALLEST, LARGEST
    while budget <= LARGEST:
        try:
            rates[budget] = budget / seconds_of(budget)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            most = max(1, budget // 4)
            break
        if budget // max(rates, key=lambda one: rates[one]) >= 2**TRIES:
            break
        budget *= 2
    enough = max(rates.values(), default=0.0) / WORTH
    return min([most, *(size for size, rate in rates.items() if rate >= enough)])


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
