"""The course of a run, and what an outcome keeps of shards and errors: bounded, however long the run is."""

from typing import Any

import numpy as np
import pytest

from lib.course import FINISHING, MAX_POINTS, Course
from lib.outcome import SHOWN_EXAMPLES, SLOWEST_SHARDS, Outcome
from lib.progress import Counts
from lib.report import phases


def test_a_night_has_as_many_points_as_a_minute_and_the_same_end() -> None:
    course = Course()
    for second in range(40_000):
        course.note(Counts(rows=10 * second, tokens=1_000 * second, num_busy=2), second)
    assert len(course.points) <= 2 * MAX_POINTS
    found = course.record(offset=5)["points"]
    assert len(found["seconds"]) <= MAX_POINTS
    assert found["seconds"][0] == 5
    assert found["seconds"][-1] > 39_000
    rates = np.diff(found["rows"]) / np.diff(found["seconds"])
    assert rates[1:] == pytest.approx(10)


def test_a_progress_actor_that_counts_from_zero_again_takes_no_row_back() -> None:
    course = Course()
    for second, rows in enumerate((0, 100, 200, 10, 50)):
        course.note(Counts(rows=rows, tokens=rows), second)
    assert [point.rows for point in course.points] == [0, 100, 200, 210, 250]


def test_stages_are_planning_start_up_waves_their_tails_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course()
    course.note(Counts(), 1)
    course.begin_wave(2)
    course.note(Counts(), 4)
    course.note(Counts(num_busy=1), 8)
    for second in range(9, 20):
        course.note(Counts(rows=second, num_busy=2), second)
    course.note(Counts(rows=30, num_busy=1), 25)
    course.end_wave(30)
    course.begin_wave(31)
    course.begin("missing chunks", 40)
    course.begin(FINISHING, 50)
    assert course.starts == [
        ("planning", 0), ("start-up", 2), ("wave 1", 4), ("tail", 19), ("wave 2", 31), ("missing chunks", 40), ("finishing", 50),
    ]  # fmt: skip
    monkeypatch.setattr(Course, "now", lambda course: 53.0)
    stages = course.record(offset=5)["stages"]
    assert stages[:2] == [{"stage": "planning", "start": 0, "end": 7}, {"stage": "start-up", "start": 7, "end": 9}]
    assert stages[-1] == {"stage": "finishing", "start": 55, "end": 58}
    assert phases(stages) == {"planning": 7, "starting": 2, "scoring": 46, "finishing": 3}
    assert phases(stages[:2]) == {"planning": 7, "starting": 2}, "as far as it came"
    course.waited = 4.0
    assert course.record(offset=5)["stages"][:3] == [
        {"stage": "planning", "start": 0, "end": 1},
        {"stage": "waiting for nodes", "start": 1, "end": 5},
        {"stage": "planning", "start": 5, "end": 7},
    ]
    assert phases(course.record(offset=5)["stages"])["waiting"] == 4


def test_planning_a_wave_is_no_part_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome()
    outcome.course.begin_wave(2)
    outcome.course.note(Counts(rows=1, num_busy=1), 4)
    monkeypatch.setattr(Course, "now", lambda course: 9.0)
    outcome.close_wave()
    outcome.course.begin_wave(15)
    assert outcome.course.starts[2:] == [("wave 1", 2), ("planning", 9), ("wave 2", 15)]


def test_actors_that_are_busy_at_once_leave_no_start_up_before_their_wave() -> None:
    course = Course()
    course.begin_wave(3)
    course.note(Counts(num_busy=1), 3.1)
    assert course.starts[1:] == [("start-up", 3), ("wave 1", 3)]


def result(shard: str, seconds: float, **more: Any) -> dict[str, Any]:
    counted = {
        "rows": 10,
        "bytes": 1,
        "start": 0,
        "truncated": 0,
        "tokens": 50,
        "abstained": 0,
        "errors": {},
        "labels": {},
    }
    return {
        "name": f"{shard}-0",
        "shard": shard,
        **counted,
        "score_bins": [0] * 20,
        "seconds": {"predict": seconds},
        **more,
    }


def test_the_slowest_shards_are_kept_of_all_waves() -> None:
    outcome = Outcome()
    for wave in range(3):
        for number in range(100):
            outcome.add(result(f"{wave}-{number:03d}", number / 10 + wave / 100))
        outcome.add(result("in all waves", 9.5, name=f"in all waves-{wave}"))
        outcome.close_wave()
    assert len(outcome.slowest) == SLOWEST_SHARDS
    assert next(iter(outcome.slowest)) == "in all waves"
    assert outcome.slowest["in all waves"].seconds == pytest.approx(28.5)
    assert outcome.slowest["in all waves"].rows == 30
    assert list(outcome.slowest)[1:4] == ["2-099", "1-099", "0-099"]
    assert outcome.stage_seconds["predict"] == pytest.approx(3 * 495 + 100 * 0.03 + 28.5)


def test_an_object_is_counted_once_and_a_few_rows_are_named_for_each_reason() -> None:
    outcome = Outcome()
    many = result("a", 1.0, errors={"null": 9}, error_rows={"null": [1, 2, 3]})
    assert outcome.add(many)
    assert not outcome.add(many)
    for shard in ("b", "c"):
        outcome.add(result(shard, 1.0, errors={"null": 9}, error_rows={"null": [4, 5, 6]}))
    assert outcome.errors["null"] == 27
    assert outcome.error_rows["null"] == [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("b", 5)]
    assert len(outcome.error_rows["null"]) == SHOWN_EXAMPLES
