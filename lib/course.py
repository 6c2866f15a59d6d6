"""How a run went over time: a bounded series of what was done by when, and the stages it went through.

Times are seconds since the pipeline was called, on a clock that nobody sets.
"""

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lib.progress import Counts

MAX_POINTS = 600
"""At twice as many every second one is dropped: a plot of 600 points shows a night as well as a minute."""

WAITING, PLANNING, START_UP, TAIL, FINISHING = "waiting for nodes", "planning", "start-up", "tail", "finishing"
"""Stages that are always called so; the others are waves and what they left missing."""


@dataclass(frozen=True)
class Point:
    """What was done at one moment; rows and tokens since the beginning."""

    seconds: float
    rows: int
    tokens: int
    busy: int
    """actors that had a block"""


@dataclass
class Course:
    """Kept up to date while a run goes on."""

    began: float = field(default_factory=time.monotonic)
    every: float = 0.5
    """seconds between two points; doubled when there are too many"""
    points: list[Point] = field(default_factory=lambda: [Point(0.0, 0, 0, 0)])
    starts: list[tuple[str, float]] = field(default_factory=lambda: [(PLANNING, 0.0)])
    """stages, in the order in which they began"""
    waited: float = 0.0
    """seconds that nodes were waited for, right before the beginning"""
    waves: int = 0
    closed_at: float | None = None
    """when the last wave was settled; planning the next one begins"""
    all_busy_at: float | None = None
    """when every actor of this wave had a block for the last time"""
    most_busy: int = 0
    _before: tuple[int, int] = (0, 0)
    """rows and tokens told by progress actors that have died since"""

    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def note(self, counts: Counts, now: float | None = None) -> None:
        """Note what is done by now, unless that was done a moment ago."""
        now = self.now() if now is None else now
        if (counts.rows or counts.num_busy) and self.starts[-1][0] == START_UP:
            self.begin(f"wave {self.waves}", max(self.starts[-1][1], self.points[-1].seconds))
        if counts.num_busy >= max(1, self.most_busy):
            self.most_busy, self.all_busy_at = counts.num_busy, now
        last = self.points[-1]
        if now - last.seconds < self.every:
            return
        if counts.rows + self._before[0] < last.rows:  # a new progress actor counts from zero
            self._before = (last.rows, last.tokens)
        rows, tokens = counts.rows + self._before[0], counts.tokens + self._before[1]
        self.points.append(Point(now, rows, tokens, counts.num_busy))
        if len(self.points) > 2 * MAX_POINTS:
            self.points, self.every = self.points[::2], 2 * self.every

    def begin_wave(self, now: float | None = None) -> None:
        """A wave of blocks is about to run; the first one's start is start-up, until an actor has a block."""
        self.waves += 1
        if self.closed_at is not None:
            self.begin(PLANNING, self.closed_at)
            self.closed_at = None
        if self.waves == 1:
            self.begin(START_UP, now)
        elif self.starts[-1][0] != START_UP:
            self.begin(f"wave {self.waves}", now)
        self.all_busy_at, self.most_busy = None, 0

    def end_wave(self, now: float | None = None) -> None:
        """The wave is over: its tail is what came after all actors had a block for the last time."""
        now = self.now() if now is None else now
        since = self.all_busy_at
        if since is not None and since > self.starts[-1][1] and now - since >= 2 * self.every:
            self.begin(TAIL, since)

    def begin(self, stage: str, now: float | None = None) -> None:
        """A stage begins, and the one before it ends."""
        self.starts.append((stage, self.now() if now is None else now))

    def record(self, offset: float = 0.0) -> dict[str, Any]:
        """The course as plain JSON values, every time later by `offset` seconds, in which the first stage had begun; the last ends now."""
        points = self.points[:: 1 + len(self.points) // (MAX_POINTS + 1)]
        waited = [(WAITING, -self.waited), self.starts[0]] if self.waited else []
        ends = [(self.starts[0][0], -offset), *waited, *self.starts[1:], ("", self.now())]
        return {
            "points": {
                "seconds": [round(offset + one.seconds, 2) for one in points],
                "rows": [one.rows for one in points],
                "tokens": [one.tokens for one in points],
                "busy_actors": [one.busy for one in points],
            },
            "stages": [
                {"stage": name, "start": round(offset + start, 2), "end": round(offset + max(start, end), 2)}
                for (name, start), (_, end) in pairwise(ends)
            ],
        }
