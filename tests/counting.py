"""Counting what Python does, instead of timing it."""

import sys
from collections.abc import Callable


def count_objects(run: Callable[[], object]) -> tuple[int, int]:
    """Run something; returns how many calls and returns there were, and how many more objects were alive at once."""
    events = peak = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal events, peak
        events, peak = events + 1, max(peak, sys.getallocatedblocks())

    before = sys.getallocatedblocks()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return events, peak - before
