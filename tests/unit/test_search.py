"""What a search says before its trials run, and makes of what came out of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from lib.config import validate
from lib.errors import DeniedError, IncompleteError, UsageError
from lib.halving import Recorder, explain_missing, run_trials
from lib.runtime import Cluster, Node
from lib.search import judge, place_trials, search
from lib.space import SearchConfig, SearchSection
from lib.trial import Record

TWO_NODES = Cluster((Node(cpus=2, gpus=0), Node(cpus=2, gpus=0)))


def configure(output: str = "o", **search_keys: Any) -> SearchConfig:
    values = {"train": {"path": "t"}, "model": {"base": "b"}, "output": {"path": output}, "search": search_keys}
    return validate(SearchConfig, values)


def test_a_local_folder_that_several_nodes_must_see_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def taken(*_: Any) -> None:
        raise UsageError("taken")

    monkeypatch.setattr("lib.search.check_trials", lambda *_: ({}, []))
    monkeypatch.setattr("lib.search.claim", taken)
    with pytest.raises(UsageError, match="taken"):
        search(configure(str(tmp_path)), "night-1", TWO_NODES)
    said = f"output.path {tmp_path} is a local path: all 2 nodes must see it there"
    assert said in capsys.readouterr().out


def test_more_trials_at_a_time_than_fit_are_refused_by_the_number_that_was_given() -> None:
    """Which may be more than there are trials."""
    with pytest.raises(
        UsageError, match=r"search\.concurrent = 9 with a CPU for each trial, the cluster has 2 nodes, 4 CP"
    ):
        place_trials(configure(concurrent=9, trials=8), TWO_NODES)
    assert place_trials(configure(concurrent=9, trials=4), TWO_NODES) == (False, 1, 4)


def record(number: int, status: Any = "done", value: float | None = 0.5, reason: str | None = None) -> Record:
    return Record(
        number=number, point={}, status=status, value=value, step=1, steps=2, seconds=1.0, looks=[], history=[], reason=reason
    )  # fmt: skip


def judged(*records: Record) -> dict[str, Any]:
    trials: list[Any] = [SimpleNamespace(number=one.number, metric="loss") for one in records]
    return judge(configure(), "night-1", trials, {one.number: one for one in records})


def test_the_best_is_the_first_of_those_that_came_to_their_end() -> None:
    """A trial that was stopped had its value in the middle."""
    found = judged(record(1), record(2, "stopped", 0.1), record(3, value=0.4), record(4, value=0.4))
    assert found["best"] == {"trial": 3, "point": {}, "value": 0.4, "trained": None}
    assert (found["steps"], found["steps_without_stopping"], len(found["trials"])) == (4, 8, 4)


def test_a_search_whose_trials_all_failed_says_why() -> None:
    with pytest.raises(
        UsageError, match=r"no trial came to its end \(trial 2: no room\); search other values, .*--run-id"
    ):
        judged(record(1, "stopped", 0.1), record(2, "failed", None, "no room"))


@pytest.mark.parametrize(
    ("errors", "kind", "said"),
    [
        (
            [],
            IncompleteError,
            r"trials 3, 4 failed 2 times \(Ray Tune says nothing of them\); run the same command again",
        ),
        ([IncompleteError("no storage")], IncompleteError, r"trials 3, 4 failed 2 times \(no storage\)"),
        ([ActorDiedError()], IncompleteError, r"trials 3, 4 failed 2 times"),
        ([ActorDiedError(), ZeroDivisionError("a bug")], ZeroDivisionError, "a bug"),
    ],
)
def test_trials_that_could_not_be_run_never_pass_in_silence(
    errors: list[Exception], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        explain_missing([3, 4], errors)


def test_a_record_that_cannot_be_written_makes_the_search_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Tune would take what is raised when a trial is over for the trial's."""
    told: Any = SimpleNamespace(last_result={"record": record(1).model_dump_json()})

    def run(_section: Any, _plan: Any, recorder: Recorder, *_: Any) -> list[Exception]:
        recorder.on_trial_complete(0, [], told)
        return []

    def refuse(*_: Any) -> None:
        raise DeniedError("s3://bucket/x: not allowed to write it")

    monkeypatch.setattr("lib.halving.tune_trials", run)
    folder: Any = SimpleNamespace(replace=refuse)
    plan: Any = SimpleNamespace(jobs={1: SimpleNamespace(metric="loss")}, known={})
    with pytest.raises(IncompleteError, match="not allowed to write it; it was allowed when the run started"):
        run_trials(SearchSection(), plan, folder, 1, 1)
