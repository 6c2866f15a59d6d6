"""The DAGs and the operator, by Airflow itself: what it sees of them, and what becomes of a job when everything else is killed."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import fakes
from tests.orchestration import AIRFLOW, REPOSITORY, Airflow, Head, ray_head
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not (AIRFLOW / "airflow").exists(), reason="no Airflow in .venv-airflow: `make airflow-test` installs it"
)
DAGS = REPOSITORY / "cluster" / "airflow" / "dags"

LOOK = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
found = DagBag()
print(json.dumps({
    "errors": found.import_errors,
    "dags": {dag.dag_id: {
        "tasks": {task.task_id: sorted(task.downstream_task_ids) for task in dag.tasks}, "catchup": dag.catchup, "active": dag.max_active_runs,
        "retries": min(task.retries for task in dag.tasks)} for dag in found.dags.values()},
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
}))
"""


def test_the_dags_are_read_without_the_project_ray_or_torch(tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(DAGS.parent / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    }
    done = subprocess.run([str(AIRFLOW / "python"), "-c", LOOK], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["errors"]
    assert not {"lib", "jobs", "ray", "torch"} & set(found["modules"])
    nightly, weekly = found["dags"]["textsweep_nightly"], found["dags"]["textsweep_weekly"]
    assert nightly["tasks"] == {"score": ["publish"], "publish": []}
    assert weekly["tasks"] == {"train": ["promote"], "promote": []}
    for dag in (nightly, weekly):
        assert (dag["catchup"], dag["active"]) == (False, 1)
        assert dag["retries"] > 0


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head")) as found:
        yield found


@pytest.mark.trial
@pytest.mark.timeout(1800)
def test_a_night_is_scored_and_told_of(head: Head, tmp_path: Path) -> None:
    """`airflow dags test`, twice the same night: real jobs, real files; the second finds nothing to do."""
    fakes.make_classifier(tmp_path / "model", "bert", ["no", "yes"])
    texts = pa.table({"text": [f"the harbour was quiet on day {day}" for day in range(50)]})
    fakes.write_archive(str(tmp_path / "archive"), {"a.parquet": texts, "b.parquet": texts.slice(0, 20)})
    variables = {
        "textsweep_archive": str(tmp_path / "archive"),
        "textsweep_scores": str(tmp_path / "scores"),
        "textsweep_model": str(tmp_path / "model"),
        "textsweep_root": str(REPOSITORY),
        "textsweep_options": "--set planning.chunk_mb=2 --set limits.stall_seconds=900",
    }
    airflow = Airflow(tmp_path, head, DAGS, variables)
    for night in range(2):
        airflow.command("dags", "test", "textsweep_nightly", "2026-11-26T01:00:00+00:00")
        jobs = head.named("score")
        assert [job["submission_id"] for job in jobs][-1] == f"textsweep_nightly.score.20261126T010000-{night + 1}"
        assert jobs[-1]["status"] == "SUCCEEDED"
        assert "--run-id 2026-11-26T010000" in jobs[-1]["entrypoint"]
    pointer = json.loads((tmp_path / "scores" / "_published.json").read_text())
    assert pointer["run"] == "2026-11-26T010000"
    manifest = pq.read_table(tmp_path / "scores" / pointer["manifest"])
    assert sum(manifest["rows"].to_pylist()) == 70
    token = head.token
    told = [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert not told, "the token stands where Airflow keeps what it did"


@pytest.mark.trial
@pytest.mark.timeout(3600)
def test_whatever_is_killed_there_is_one_job_and_its_end_is_seen(head: Head, tmp_path: Path) -> None:
    """A scheduler with LocalExecutor, a triggerer, a Ray head; five tasks at once, see `dags/trial.py`."""
    dags = Path(__file__).parent / "dags"
    with Airflow(tmp_path, head, dags, {"trial_folder": str(tmp_path)}) as airflow:
        wait_until(lambda: airflow.knows("trial"), "the trial's DAG", 300)
        airflow.api("dags/trial", "PATCH", {"is_paused": False})
        run = airflow.api("dags/trial/dagRuns", "POST", {"logical_date": None})["dag_run_id"]

        def state(task: str, *wanted: str, seconds: float = 600) -> None:
            wait_until(
                lambda: airflow.tasks("trial", run)[task]["state"] in wanted,
                f"{task} to be {wanted}: {airflow.tasks('trial', run)[task]}",
                seconds,
            )

        for task in ("triggerer_killed", "worker_killed", "ended_by_a_person"):
            wait_until(lambda task=task: [job["status"] for job in head.named(task)] == ["RUNNING"], f"the job of {task}", 600)  # type: ignore[misc]  # fmt: skip
        state("triggerer_killed", "deferred")
        state("ended_by_a_person", "deferred")

        airflow.api(f"dags/trial/dagRuns/{run}/taskInstances/ended_by_a_person", "PATCH", {"new_state": "failed"})
        wait_until(lambda: head.named("ended_by_a_person")[0]["status"] == "STOPPED", "the job to be stopped", 300)

        # Without a word to any of them: the triggerer, the scheduler, its executor, the process of the task that waits in a worker.
        for service in ("triggerer", "scheduler"):
            process = psutil.Process(airflow.processes[service].pid)
            for one in [process, *process.children(recursive=True)]:
                one.kill()
            airflow.start(service)
        wait_until(lambda: airflow.tasks("trial", run)["worker_killed"]["try_number"] == 2, "the second try", 900)
        for task in ("triggerer_killed", "worker_killed"):
            (tmp_path / f"{task}.go").touch()
            state(task, "success")
            assert len(head.named(task)) == 1
            assert (tmp_path / f"{task}.started").read_text() == "started\n"

        state("over_limit", "failed")
        state("incomplete", "success")
        found = airflow.tasks("trial", run)
        assert (found["over_limit"]["try_number"], len(head.named("over_limit"))) == (1, 1)
        assert (found["incomplete"]["try_number"], len(head.named("incomplete"))) == (2, 2)
        assert found["ended_by_a_person"]["state"] == "failed"
        assert len(head.named("ended_by_a_person")) == 1

        wait_until(lambda: airflow.knows("every_night"), "the DAG of every night", 300)
        airflow.api("dags/every_night", "PATCH", {"is_paused": False})
        airflow.command("backfill", "create", "--dag-id", "every_night", "--from-date", "2026-06-01", "--to-date", "2026-06-30", "--max-active-runs", "4")  # fmt: skip
        nights = tmp_path / "nights"
        june = {f"2026-06-{day:02d}" for day in range(1, 31)}
        wait_until(lambda: nights.exists() and june <= set(nights.read_text().split()), "30 nights", 1800)
        noted = [night for night in nights.read_text().split() if night in june]
        assert sorted(noted) == sorted(june), "each night once"
