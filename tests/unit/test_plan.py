"""What `jobs.plan` says of what was found out: no credentials, and of what is not known the reason."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from jobs import plan
from lib import scoring, survey
from lib.blocks import IDS
from lib.errors import UsageError
from lib.estimate import Estimate
from lib.outcome import Outcome
from lib.runtime import Cluster, Node, plan_layout
from lib.score_config import ScoreResources
from lib.scoring import Run
from lib.storage import Store
from lib.survey import Survey, Tally
from tests.stand_in import add, prepared

HERE = Cluster((Node(4, 0),))
LAYOUT = plan_layout(HERE, ScoreResources())

NOTHING = Survey(
    tally=Tally(),
    outcome=Outcome(),
    tokens=Estimate(value=0.0, low=0.0, high=0.0),
    sampled_rows=0,
    sampled_errors=0,
    block_guesses=np.zeros(0),
    sample=None,
    sampling_seconds=0.0,
)


def planned(folder: Path, model: str) -> Run:
    add(folder, "a.parquet", "one", "two")
    return prepared(folder, model, "x")


def test_a_plan_shows_no_credentials(tmp_path: Path, classifier: str) -> None:
    run, secret = planned(tmp_path, classifier), "s3://key:hidden@host/folder"
    model = run.config.model.model_copy(update={"path": secret})
    run = replace(
        run,
        config=run.config.model_copy(update={"model": model}),
        output=Store(secret),
        job=replace(run.job, archive=Store(secret)),
    )
    found = replace(NOTHING, outcome=Outcome(bad_shards={"a": f"{secret}/a: storage failed to read it"}))
    record = plan.describe(run, found, HERE, LAYOUT, None, None, None)
    assert {record[name] for name in ("input", "output", "model")} == {"s3://***@host/folder"}
    assert "hidden" not in "".join([*map(str, record.values()), *plan.lines(record)])


def asked(
    run: Run, found: Survey, monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None, here: Cluster = HERE
) -> dict[str, Any]:
    """The plan of a run if its survey finds this, and no earlier run is there."""

    def measure(running: Any, rows: pa.Table, wanted: Any) -> Any:
        assert rows.num_rows
        raise failure or AssertionError("nothing is to be measured")

    running: Any = SimpleNamespace()
    monkeypatch.setattr(plan, "ray_session", lambda: contextlib.nullcontext(here))
    monkeypatch.setattr(survey, "take_survey", lambda run, layout: (found, running))
    monkeypatch.setattr(survey, "measure", measure)
    monkeypatch.setattr(scoring, "prepare", lambda config, run_id: run)
    return plan.plan(run.config, "x")


SAMPLES: tuple[list[list[int]], ...] = ([[1, 2], []], [[], []])
GOOD, BAD = (pa.table({IDS: pa.array(ids, pa.list_(pa.int32()))}) for ids in SAMPLES)

DIED = ray.exceptions.OutOfMemoryError("the node has no memory left")

CAUSES: list[tuple[dict[str, Any], pa.Table, bool, str]] = [
    ({"gpus": 8}, GOOD, True, "one GPU is with this model, and there is none here to measure; set"),
    ({"measure_seconds": 0}, GOOD, True, "and forecast.measure_seconds = 0 keeps it from being measured; set"),
    ({}, GOOD, True, "and measuring it failed (OutOfMemoryError: "),
    ({}, BAD, True, "and not one of the sampled rows is good enough to measure with; set"),
    ({"tokens_per_second": 1_000}, None, False, "too few of the rows that were tried could be read"),
]


@pytest.mark.parametrize(("forecast", "sample", "has_tokens", "expected"), CAUSES)
def test_each_reason_why_the_time_is_not_known_is_told(
    forecast: dict[str, Any],
    sample: pa.Table | None,
    has_tokens: bool,
    expected: str,
    tmp_path: Path,
    classifier: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add(tmp_path, "a.parquet", "one", "two")
    run = prepared(tmp_path, classifier, "x", forecast=forecast)
    tally = Tally()
    tally.rows.append(2)
    tokens = Estimate(value=9.0, low=9.0, high=9.0) if has_tokens else None
    found = replace(NOTHING, tally=tally, tokens=tokens, sample=sample)
    record = asked(run, found, monkeypatch, DIED)
    assert (record["seconds"], record["cost"]) == (None, None)
    assert expected in record["problem"]
    assert any(expected in line for line in plan.lines(record))


def test_the_record_goes_to_a_file_beside_the_text_or_alone_to_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "plan", lambda config, run_id: {"rows": 7})
    monkeypatch.setattr(plan, "lines", lambda record: [f"{record['rows']} rows"])
    words = ["--set", "input.path=a", "model.path=b", "output.path=c", "--json"]
    plan.main([*words, str(tmp_path / "plan.json")])
    assert capsys.readouterr().out == "7 rows\n"
    assert json.loads((tmp_path / "plan.json").read_text()) == {"rows": 7}
    plan.main(words)
    assert json.loads(capsys.readouterr().out) == {"rows": 7}
    with pytest.raises(UsageError, match=r"--json .*nowhere.*: cannot be written"):
        plan.main([*words, str(tmp_path / "nowhere" / "plan.json")])


def test_where_nothing_is_to_be_scored_no_speed_is_asked_for(
    tmp_path: Path, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = asked(planned(tmp_path, classifier), NOTHING, monkeypatch)
    assert (record["problem"], record["speed"], record["rows"]) == (None, None, 0)
    assert "time: that of listing and publishing, nothing is to be scored" in plan.lines(record)
