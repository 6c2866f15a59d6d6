"""Watching a run: which metrics the driver sets, and that a plan sets none."""

from types import SimpleNamespace
from typing import Any

import pytest

from lib import telemetry, watch
from lib.outcome import Outcome
from lib.progress import Counts
from lib.watch import Running, Watch


@pytest.mark.parametrize(("run_id", "set_by_it"), [("night", [1, 7, 1]), (None, [])])
def test_a_plan_is_no_run_for_those_who_watch_metrics(
    run_id: str | None, set_by_it: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    values, shown = [], []
    monkeypatch.setattr(
        telemetry, "instrument", lambda metric: SimpleNamespace(set=lambda value, tags: values.append(value))
    )
    monkeypatch.setattr(watch, "read_progress", lambda progress: Counts(rows=3))
    nothing: Any = None
    run = Running(
        job=SimpleNamespace(version="v"),  # type: ignore[arg-type]
        layout=nothing,
        limits=nothing,
        tokenizer=nothing,
        progress=nothing,
        outcome=Outcome(planned_rows=7, bad_shards={"a": "why"}),
        show=lambda outcome: shown.append(outcome.counts.rows),
        run_id=run_id,
    )
    Watch(run).show()
    assert values == set_by_it
    assert shown == [3]
