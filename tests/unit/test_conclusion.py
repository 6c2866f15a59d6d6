"""How a run ends: what it is compared with, what keeps it from being published, and what is left of it if something fails then."""

import io
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import time_machine

from lib import checkpoint, conclusion, pipeline, report
from lib.errors import BudgetError, IncompleteError, OverLimitError, StoppedError
from lib.history import COUNTS_KEY
from lib.outcome import Outcome
from lib.planning import find_stale
from lib.publishing import write_table
from lib.schema import Task
from lib.scoring import Run
from lib.storage import Store, open_store
from lib.versions import list_runs, read_json, roll_back
from tests import fakes
from tests.stand_in import add, conclude, prepared, published, run_night, score

LIMIT = {"max_psi": 0.5}


def mixed(rows: int) -> list[str]:
    """Texts of all three labels."""
    return [("down", "same", "up")[row % 3] for row in range(rows)]


def test_a_refused_run_is_refused_again_under_its_own_id(tmp_path: Path, classifier: str) -> None:
    """An orchestrator runs the same command again: its run.json then holds what was refused, not what was published."""
    add(tmp_path, "a.parquet", *mixed(300))
    run_night(tmp_path, classifier, "x", drift=LIMIT)
    assert published(tmp_path) == "x"
    add(tmp_path, "b.parquet", *["down"] * 300)
    for _ in range(2):
        with pytest.raises(OverLimitError, match="not distributed as in run x: labels: "):
            run_night(tmp_path, classifier, "x", drift=LIMIT)
    found = open_store(f"{tmp_path}/scores")
    manifest = found.read(f"{prepared(tmp_path, classifier, 'x').job.version}/_runs/x/manifest.parquet") or b""
    assert pq.read_metadata(io.BytesIO(manifest)).num_rows == 1
    run_night(tmp_path, classifier, "y", drift=LIMIT | {"baseline": "x"})
    assert published(tmp_path) == "y", "accepted"


def test_nothing_of_one_run_stands_in_an_object(tmp_path: Path, classifier: str) -> None:
    """Of two runs that write one object at once either may win: nobody can tell, and nobody needs to."""
    add(tmp_path, "a.parquet", *mixed(30), None)
    found = []
    for run_id, days in (("x", 0), ("y", 1)):
        with time_machine.travel(datetime.now(UTC) + timedelta(days=days), tick=True):
            of_both = {"input": {"path": f"{tmp_path}/archive"}, "limits": {"max_bad_rows": 1}}
            run_night(tmp_path / run_id, classifier, run_id, **of_both)
        store = open_store(f"{tmp_path}/{run_id}/scores")
        names = [name for name in store.list()["path"].to_pylist() if "-of-" in name]
        found.append({name: store.read(name) for name in names})
    assert sorted(name.count("_dead_letter/") for name in found[0]) == [0, 1]
    assert found[0] == found[1]


def test_a_baseline_may_be_a_file_and_without_a_limit_a_shift_is_only_told(
    tmp_path: Path, classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add(tmp_path, "a.parquet", *mixed(300))
    run_night(tmp_path, classifier, "x")
    file = tmp_path / "run.json"
    file.write_bytes(prepared(tmp_path, classifier, "x").job.output.read("_runs/x/run.json") or b"")
    add(tmp_path, "b.parquet", *["down"] * 300)
    with pytest.raises(OverLimitError, match=f"as in run {file}: labels: "):
        run_night(tmp_path, classifier, "y", drift=LIMIT | {"baseline": str(file)})
    capsys.readouterr()
    run_night(tmp_path, classifier, "y")
    assert "drift: labels: population stability index" in capsys.readouterr().out
    assert published(tmp_path) == "y"


def test_runs_without_new_rows_hand_on_what_they_were_compared_with(
    tmp_path: Path, classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add(tmp_path, "a.parquet", *mixed(300))
    add(tmp_path, "b.parquet", *mixed(60))
    run_night(tmp_path, classifier, "x", drift=LIMIT)
    assert "drift: not judged: no run of this version is published yet" in capsys.readouterr().out
    removing = {"input": {"path": f"{tmp_path}/archive", "deleted": "remove"}}
    (tmp_path / "archive/b.parquet").unlink()
    run_night(tmp_path, classifier, "removed", drift=LIMIT, **removing)
    assert published(tmp_path) == "removed"
    add(tmp_path, "c.parquet", *["down"] * 300)
    with pytest.raises(OverLimitError, match="not distributed as in run x: labels: "):
        run_night(tmp_path, classifier, "y", drift=LIMIT, **removing)
    run_night(tmp_path, classifier, "y", drift={"baseline": "y", **LIMIT}, **removing)
    # Rolled back, and planned again: what was accepted is compared with the run that readers see now.
    roll_back(open_store(f"{tmp_path}/scores"), "removed", None, single_writer=False)
    assert prepared(tmp_path, classifier, "z", **removing).baseline.name == "x"
    with pytest.raises(OverLimitError, match="not distributed as in run x: "):
        run_night(tmp_path, classifier, "z", drift=LIMIT, **removing)


def test_an_old_manifest_is_judged_by_what_run_json_says_or_not_published(
    tmp_path: Path, classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add(tmp_path, "a.parquet", *mixed(300))
    run_night(tmp_path, classifier, "x")
    run = prepared(tmp_path, classifier, "x").job.output.at("_runs/x")
    manifest = pq.read_table(io.BytesIO(run.read("manifest.parquet") or b""))
    assert COUNTS_KEY in manifest.schema.metadata
    write_table(run, "manifest.parquet", manifest.replace_schema_metadata(None))
    assert prepared(tmp_path, classifier, "y").baseline.name == "x"
    assert "keeps no counts, it is an old one; those in run.json of x are taken" in capsys.readouterr().err
    run.delete("run.json")
    add(tmp_path, "b.parquet", *mixed(60))
    with pytest.raises(OverLimitError, match=r"cannot be compared: .* keeps no counts, and no run\.json"):
        run_night(tmp_path, classifier, "y", drift=LIMIT)
    assert published(tmp_path) == "x"
    run_night(tmp_path, classifier, "z")
    assert published(tmp_path) == "z"


SPENT = BudgetError("limits.budget = 1 is spent: 1.01 by now")


def test_a_budget_that_is_spent_when_all_is_done_keeps_nothing_from_readers(tmp_path: Path, classifier: str) -> None:
    add(tmp_path, "a.parquet", *mixed(30))
    fakes.write_archive(f"{tmp_path}/archive", {"bad.parquet": b"PAR1 no Parquet PAR1"})  # never gets an object
    run = prepared(tmp_path, classifier, "x", limits={"max_bad_shards": 1})
    outcome = score(run)
    outcome.over_budget = SPENT
    conclude(run, outcome)
    assert published(tmp_path) == "x"


def test_a_budget_that_is_spent_before_says_what_is_left_and_what_it_brought(tmp_path: Path, classifier: str) -> None:
    add(tmp_path, "a.parquet", *mixed(30))
    run = prepared(tmp_path, classifier, "x")
    run.start()
    with pytest.raises(
        BudgetError, match=r"of 1 shards to do 1 \(.*\) are left; .*; not one chunk was finished: raise it"
    ):
        conclude(run, Outcome(over_budget=SPENT))
    score(run)
    add(tmp_path, "b.parquet", *mixed(30))
    run = prepared(tmp_path, classifier, "x")
    # The budget's end came before the news of any object.
    with pytest.raises(BudgetError, match="of 1 shards to do 1") as caught:
        conclude(run, Outcome(over_budget=SPENT))
    assert "not one chunk" not in str(caught.value)
    assert published(tmp_path) is None


def lose_an_object(outcome: Outcome) -> None:
    outcome.missing.append("a.parquet-000000000000-00000-of-00001.parquet")


def change_a_shard(outcome: Outcome) -> None:
    outcome.changed.add("a.parquet")


def lose_a_row(outcome: Outcome) -> None:
    outcome.finished_rows -= 1


@pytest.mark.parametrize(
    ("happen", "why"),
    [
        (lose_an_object, r"1 objects are missing after two attempts \(a\.parquet-"),
        (change_a_shard, r"1 shards changed while they were scored \(a\.parquet\)"),
        (lose_a_row, "30 rows were planned, 29 are in objects"),
    ],
)
def test_a_run_that_is_not_reconciled_is_not_published(
    happen: Callable[[Outcome], None], why: str, tmp_path: Path, classifier: str
) -> None:
    add(tmp_path, "a.parquet", *mixed(30))
    run = prepared(tmp_path, classifier, "x")
    outcome = score(run)
    happen(outcome)
    with pytest.raises(IncompleteError, match=f"^{why}.*run the same command again$"):
        conclude(run, outcome)
    assert published(tmp_path) is None
    written = run.job.output.list()["path"].to_pylist()
    assert "_runs/x/run.json" in written
    assert not {"_runs/x/_SUCCESS", "_runs/x/manifest.parquet"} & set(written)


def add_stranger(run: Run, shard: str, hours: float) -> str:
    """Put an object that nothing names into a run's version, written so long ago; returns its name."""
    name = f"{shard}-0123456789ab-00000-of-00001.parquet"
    assert run.job.output.create(name, b"of a zombie")
    written = time.time() - hours * 3_600
    os.utime(f"{run.job.output.root}/{name}", (written, written))
    return name


def removes_at_once(folder: Path) -> dict[str, Any]:
    return {"output": {"path": f"{folder}/scores", "keep_stale_hours": 0}}


def test_what_was_written_while_a_run_went_on_is_left_to_the_next_one(tmp_path: Path, classifier: str) -> None:
    """Another run may be writing it, for a shard that this one's listing did not hold yet."""
    add(tmp_path, "a.parquet", *mixed(30))
    run = prepared(tmp_path, classifier, "x", **removes_at_once(tmp_path))
    old = add_stranger(run, "b.parquet", 1)
    outcome = score(run)
    new = add_stranger(run, "c.parquet", 0)
    conclude(run, outcome)
    left = run.job.output.list()["path"].to_pylist()
    assert old not in left
    assert new in left
    add(tmp_path, "d.parquet", *mixed(30))
    run_night(tmp_path, classifier, "y", **removes_at_once(tmp_path))
    assert new not in run.job.output.list()["path"].to_pylist()


def test_nothing_is_removed_once_readers_were_moved_to_another_run(
    tmp_path: Path, classifier: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_and_move(*arguments: Any) -> pa.Table:
        roll_back(open_store(f"{tmp_path}/scores"), "x", None, single_writer=False)
        return find_stale(*arguments)

    add(tmp_path, "a.parquet", *mixed(30))
    run_night(tmp_path, classifier, "x")
    add(tmp_path, "a.parquet", *mixed(60))
    run = prepared(tmp_path, classifier, "y", **removes_at_once(tmp_path))
    old = add_stranger(run, "b.parquet", 1)
    before = set(run.job.output.list()["path"].to_pylist())
    monkeypatch.setattr(conclusion, "find_stale", find_and_move)
    conclude(run, score(run))
    assert published(tmp_path) == "x"
    assert old in before <= set(run.job.output.list()["path"].to_pylist())
    assert "stale objects were left: readers were moved to another run meanwhile" in capsys.readouterr().out


def test_a_run_that_publishes_removes_what_killed_ones_left(tmp_path: Path, classifier: str) -> None:
    left = tmp_path / "scores" / "_probe-0123"
    left.parent.mkdir()
    left.touch()
    os.utime(left, (0, 0))
    add(tmp_path, "a.parquet", *mixed(30))
    run_night(tmp_path, classifier, "x")
    assert not left.exists()


def test_what_has_come_by_the_end_of_a_budget_is_noted() -> None:
    inbox: queue.Queue[dict[str, Any] | Exception | None] = queue.Queue()
    for item in ({"name": "a"}, {"name": "b"}, None):
        inbox.put(item)
    noted: list[dict[str, Any]] = []
    pipeline.note_waiting(SimpleNamespace(add=noted.append), inbox)  # type: ignore[arg-type]
    assert noted == [{"name": "a"}, {"name": "b"}]
    pipeline.note_waiting(SimpleNamespace(add=noted.append), inbox)  # type: ignore[arg-type]
    assert len(noted) == 2


def test_a_run_has_its_record_though_earlier_ones_cannot_be_read(
    tmp_path: Path, classifier: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(version: Store, but: str) -> None:
        assert read_json(version.at(f"_runs/{but}"), "run.json")["published"]
        raise IncompleteError("storage failed to list: 503 SlowDown")

    monkeypatch.setattr(report, "recent_runs", fail)
    add(tmp_path, "a.parquet", *mixed(30))
    run_night(tmp_path, classifier, "x")
    run = prepared(tmp_path, classifier, "x").job.output.at("_runs/x")
    assert {"run.json", "config.json", "report.html"} <= set(run.list()["path"].to_pylist())
    assert "WARNING: the report shows no earlier runs, they cannot be read: storage failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "warns"),
    [
        ({"train": {"text_column": ["a", "b"]}, "tasks": {}}, True),
        ({"train": {"text_column": "a"}, "tasks": {}}, False),
        ({"train": {"text_column": "text"}, "tasks": {"one": {"text_column": ["a", "b"]}}}, True),
        (
            {
                "train": {"text_column": "text"},
                "tasks": {"one": {"text_column": ["a", "b"]}, "two": {"text_column": "a"}},
            },
            False,
        ),
        ({}, False),
    ],
)
def test_single_texts_for_a_checkpoint_of_pairs_are_told(
    config: dict[str, Any], warns: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.make_classifier(tmp_path / "model", "bert", ("down", "same", "up"))
    files = {
        name: checkpoint.digest_of(tmp_path / "model" / name)
        for name in checkpoint.deciding_files(str(tmp_path / "model"))
    }
    card = checkpoint.Card(
        labels=("down", "same", "up"), task=Task.MULTI_CLASS, max_length=16, files=files, trained={"config": config}
    )
    (tmp_path / "model" / checkpoint.CARD_NAME).write_text(card.model_dump_json())
    add(tmp_path, "a.parquet", "down")
    prepared(tmp_path, str(tmp_path / "model"), "x")
    assert ("WARNING: model.path was trained on pairs of texts" in capsys.readouterr().err) == warns


# runs that are broken off


def break_off(folder: Path, model: str, run_id: str, error: BaseException) -> Run:
    """A run whose first shard is scored when it ends."""
    run = prepared(folder, model, run_id)
    outcome = Outcome()
    with pytest.raises(type(error)) as raised, conclusion.reported(run, outcome, "no cluster", None):
        done = score(replace(run, unfinished=run.unfinished.slice(0, 1)))
        vars(outcome).update(vars(done))
        raise error
    assert raised.value is error
    return run


@pytest.mark.parametrize(
    ("error", "code", "state", "message"),
    [
        (StoppedError("stopped by SIGTERM"), 5, "stopped", "stopped by SIGTERM"),
        (IncompleteError("the storage is gone"), 4, "incomplete", "the storage is gone"),
        (RuntimeError("a bug"), 1, "failed", "RuntimeError: a bug"),
    ],
)
def test_a_run_that_is_broken_off_has_a_report(
    error: BaseException, code: int, state: str, message: str, tmp_path: Path, classifier: str
) -> None:
    add(tmp_path, "a.parquet", *mixed(30))
    add(tmp_path, "b.parquet", *mixed(60))
    run = break_off(tmp_path, classifier, "x", error)
    record = read_json(run.job.output.at("_runs/x"), "run.json")
    assert (record["exit_code"], record["message"], record["published"]) == (code, message, False)
    assert record["this_run"]["rows"] == record["this_run"]["labels"]["up"] * 3 == 30
    assert record["drift"]["why_none"] == "the run did not come to its end"
    page = (run.job.output.read("_runs/x/report.html") or b"").decode()
    assert message in page
    assert "rows in the manifest" not in page
    (listed,) = list_runs(run.output)
    assert (listed.run, listed.state, listed.message, listed.rows) == ("x", state, message, None)
    assert published(tmp_path) is None


def test_the_report_of_a_success_stays_when_its_command_is_broken_off(tmp_path: Path, classifier: str) -> None:
    """Readers still see what it published, and an orchestrator asks its run.json."""
    add(tmp_path, "a.parquet", *mixed(30))
    run_night(tmp_path, classifier, "x")
    add(tmp_path, "b.parquet", *mixed(60))
    run = break_off(tmp_path, classifier, "x", StoppedError("stopped"))
    assert read_json(run.job.output.at("_runs/x"), "run.json")["exit_code"] == 0
    assert published(tmp_path) == "x"


@pytest.mark.parametrize("answers", [True, False])
def test_a_storage_without_room_for_a_report_is_told_and_does_not_hold_the_driver(
    answers: bool,
    tmp_path: Path,
    classifier: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    never = threading.Event()

    def fail(store: Store, name: str, data: bytes) -> None:
        if name != "run.json":
            return replace_object(store, name, data)
        if not answers:
            never.wait(30)
        raise OSError("no space left")

    replace_object = Store.replace
    add(tmp_path, "a.parquet", *mixed(30))
    monkeypatch.setattr(Store, "replace", fail)
    monkeypatch.setattr(conclusion, "REPORT_SECONDS", 30.0 if answers else 0.2)
    began = time.monotonic()
    break_off(tmp_path, classifier, "x", StoppedError("stopped"))
    took = time.monotonic() - began
    never.set()
    said = capsys.readouterr().err
    assert "WARNING: the run has no report: " in said
    assert ("no space left" if answers else "has not taken it in 0.2 s") in said
    assert took < 20
