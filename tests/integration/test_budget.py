"""`limits.budget`: a run that has spent it keeps what it has, publishes nothing, and the next one finishes."""

from pathlib import Path
from typing import Any

import pytest

from lib import pipeline
from lib.cost import Meter
from lib.errors import BudgetError, ExitCode, UsageError
from lib.storage import open_store
from lib.versions import list_runs
from lib.watch import Running, Watch
from tests import fakes
from tests.integration.test_growth import objects
from tests.integration.test_scoring import read_json, read_predictions, run_score, texts_table

pytestmark = pytest.mark.usefixtures("ray_session")

SHARDS, ROWS = 4, 120

FAST = ("model.engine=torch", "planning.chunk_mb=0.002")
"""The engine that starts fastest, and six chunks a shard."""


def record_of(output: str, run_id: str) -> Any:
    """`run.json` of a run, whatever its version."""
    store = open_store(output)
    paths = [path for path in store.list()["path"].to_pylist() if path.endswith(f"/_runs/{run_id}/run.json")]
    return read_json(store, paths[0])


def test_a_spent_budget_keeps_what_is_done_and_the_next_run_finishes(
    tmp_path: Path, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, output = str(tmp_path / "archive"), str(tmp_path / "scores")
    names = [f"part-{number}.parquet" for number in range(SHARDS)]
    shards = {name: texts_table(ROWS, ROWS * number) for number, name in enumerate(names)}
    fakes.write_archive(archive, shards, row_group_size=20)
    look, prices = Meter.look, "forecast.cpu_hour=1"
    monkeypatch.setattr(
        pipeline, "MAX_WAVE_BLOCKS", 8
    )  # the first wave is all that can be done before the budget is seen to be spent

    def look_later(meter: Meter) -> None:
        """As if the first object had taken ten hours."""
        if objects(output):
            meter.seen_at -= 36_000
        look(meter)

    monkeypatch.setattr(Meter, "look", look_later)
    with pytest.raises(BudgetError) as caught:
        run_score(archive, classifier, output, prices, "limits.budget=20", *FAST, run_id="first")
    monkeypatch.undo()
    assert caught.value.exit_code == 6
    assert "limits.budget = 20 is spent: " in str(caught.value)
    assert f"of {SHARDS} shards to do" in str(caught.value)
    assert "the same command again, and it goes on with a new budget" in str(caught.value)
    kept = objects(output)
    assert 0 < len(kept) <= 8, "what was finished is kept"
    first = record_of(output, "first")
    assert (first["exit_code"], first["status"], first["published"]) == (ExitCode.OVER_BUDGET, "over_budget", False)
    assert first["cost"]["cost"] >= 20 == first["cost"]["budget"]
    assert first["cost"]["cpu_seconds"] == pytest.approx(first["cost"]["cost"] * 3_600, rel=1e-3)
    assert open_store(output).read("_published.json") is None
    assert [one.state for one in list_runs(open_store(output))] == ["over_budget"]
    stamps = {path: Path(output, path).stat().st_mtime_ns for path in kept}

    run_score(archive, classifier, output, prices, "limits.budget=20", *FAST, run_id="second")
    assert {path: Path(output, path).stat().st_mtime_ns for path in kept} == stamps, "nothing was scored twice"
    assert len(objects(output)) == 6 * SHARDS
    found = read_predictions(output)
    assert found.num_rows == SHARDS * ROWS
    assert found["error"].null_count == found.num_rows
    second = record_of(output, "second")
    assert second["published_total"]["rows"] == SHARDS * ROWS
    held = second["cost"]
    rounded = 4 * 0.05 + 0.05 + 1e-9  # both are given in tenths
    assert held["cpu_seconds"] == pytest.approx(4 * held["node_seconds"], abs=rounded), (
        "a cluster of one node with 4 CPUs"
    )
    assert held["node_seconds"] == pytest.approx(sum(second["phases"].values()), abs=1)
    assert list(second["phases"]) == ["planning", "starting", "scoring", "finishing"]
    assert held["cost"] == pytest.approx(held["cpu_seconds"] / 3_600, abs=1e-3)
    (actors,) = second["throughput"]
    assert actors["lives"] == 1
    assert 0 < actors["tokens"] <= second["this_run"]["tokens"]
    assert 0 < actors["busy_seconds"] <= actors["seconds"] <= second["phases"]["scoring"] + 1
    assert (actors["device"]["precision"], actors["device"]["is_gpu"]) == ("fp32", False)
    report = open_store(output).read(f"{second['version']}/_runs/second/report.html") or b""
    assert b"of a budget of 20" in report


def test_a_budget_spent_before_the_first_chunk_says_that_it_was_too_small(
    tmp_path: Path, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_blocks = pipeline.run_blocks

    def look_first(run: Running, blocks: Any) -> bool:
        """As if the first chunk took longer than the second until the first look."""
        Watch(run).look()
        return run_blocks(run, blocks)

    monkeypatch.setattr(pipeline, "run_blocks", look_first)
    archive, output = str(tmp_path / "archive"), str(tmp_path / "scores")
    fakes.write_archive(archive, {"one.parquet": texts_table(40)})
    with pytest.raises(BudgetError, match=r"1 \(0\.0 MB\) are left; .* not one chunk was finished: raise it"):
        run_score(archive, classifier, output, "forecast.node_hour=1", "limits.budget=1e-9")
    assert not objects(output)


def test_a_budget_in_gpu_hours_on_a_cluster_without_gpus_is_refused_before_work(
    tmp_path: Path, classifier: str
) -> None:
    fakes.write_archive(str(tmp_path / "archive"), {"one.parquet": texts_table(40)})
    with pytest.raises(UsageError, match="would never be spent"):
        run_score(
            str(tmp_path / "archive"),
            classifier,
            str(tmp_path / "scores"),
            "forecast.gpu_hour=3.5",
            "limits.budget=10",
        )
    assert not objects(str(tmp_path / "scores"))
