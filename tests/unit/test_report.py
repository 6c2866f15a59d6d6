"""The progress line: what a person sees at each stage of a run."""

import pytest

from lib.outcome import Outcome
from lib.progress import Counts
from lib.report import ProgressLine
from lib.run_page import duration


def test_the_line_says_what_the_run_is_at() -> None:
    line, outcome = ProgressLine(started_at=0.0), Outcome()
    assert line.text(outcome, 7.0) == "scoring: reading the shards' footers, 7 s so far"

    outcome.planned_rows = 2_000
    assert line.text(outcome, 9.0) == ("scoring: 2,000 rows planned, starting actors and loading the model, 9 s so far")

    line.first = (20.0, 100, 1_000)
    outcome.counts = Counts(rows=1_100, tokens=11_000)
    outcome.errors["null"] = 3
    assert line.text(outcome, 30.0) == (
        "scoring: 1,100 of 2,000 rows (55.0%), 3 bad rows, 30 s so far, 100 rows/s, 1,000 tokens/s, 9 s left"
    )


def test_rows_that_were_tried_twice_are_not_counted_over_the_plan() -> None:
    line, outcome = ProgressLine(started_at=0.0, first=(1.0, 0, 0)), Outcome(planned_rows=10)
    outcome.counts = Counts(rows=25, tokens=100)
    assert "10 of 10 rows (100.0%)" in line.text(outcome, 5.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (61, "1 min 01 s"), (7_260, "2 h 01 min")]
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
