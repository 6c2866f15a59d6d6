"""The DAGs and the operator, by Airflow itself: what it sees of them, and what becomes of a job when everything else is killed."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.job_server import STOP_WAIT_SECONDS
from lib.storage import open_store
from tests import fakes, heads
from tests.heads import Head
from tests.orchestration import AIRFLOW, REPOSITORY, Airflow
from tests.publications import OLD, night, publish_run, record_run, write_objects
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
        "retries": min(task.retries for task in dag.tasks), "factor": min(task.retry_exponential_backoff for task in dag.tasks),
        "outlets": {task.task_id: [asset.name for asset in task.outlets] for task in dag.tasks},
        "schedule": dag.schedule, "rules": sorted({task.trigger_rule.value for task in dag.tasks}),
        "driver_cpus": {task.task_id: getattr(task, "entrypoint_num_cpus", None) for task in dag.tasks}} for dag in found.dags.values()},
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
}))
"""

GATE = """
import json, sys
from types import SimpleNamespace
from airflow.dag_processing.dagbag import DagBag
publish = DagBag().dags["textsweep_nightly"].get_task("publish").python_callable
told = SimpleNamespace(extra=None)
publish.__globals__["Variable"] = SimpleNamespace(get=lambda name: sys.argv[1])
publish.__globals__["get_current_context"] = lambda: {"outlet_events": {publish.__globals__["scores"]: told}}
try:
    publish(sys.argv[2])
    raised = ""
except Exception as error:
    raised = f"{type(error).__name__}: {error}"
print(json.dumps({"raised": raised, "told": told.extra}))
"""


def in_airflow(folder: Path, *arguments: str) -> Any:
    """What a program says on its last line, run by Airflow's interpreter."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "AIRFLOW_HOME": str(folder),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(DAGS.parent / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PYTHONPATH": str(DAGS.parent / "plugins"),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run([str(AIRFLOW / "python"), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found = in_airflow(tmp_path_factory.mktemp("cases"), str(REPOSITORY / "tests" / "operator_cases.py"))
    return dict(found)


NIGHT = "nightly.score.20261126T010000"


@pytest.mark.parametrize(
    ("case", "raised", "asked"),
    [
        ("new", "", [f"{NIGHT}-1"]),
        ("under way", "", []),
        ("ended before", "", [f"{NIGHT}-3"]),
        ("succeeded unseen", "", []),
        ("cleared", "", [f"{NIGHT}-2"]),
        ("cleared at work", "", []),
        ("another was first", "", [f"{NIGHT}-1"]),
        ("usage", "AirflowFailException", [f"{NIGHT}-1"]),
        ("over limit", "AirflowFailException", [f"{NIGHT}-1"]),
        ("over budget", "AirflowFailException", [f"{NIGHT}-1"]),
        ("incomplete", "AirflowException", [f"{NIGHT}-1"]),
        ("a bug", "AirflowException", [f"{NIGHT}-1"]),
        ("died", "AirflowException", [f"{NIGHT}-1"]),
        ("stopped", "AirflowException", [f"{NIGHT}-1"]),
        ("too long", "AirflowException", [f"{NIGHT}-1", f"/api/jobs/{NIGHT}-1/stop"]),
        ("lost", "AirflowException", [f"{NIGHT}-1"]),
        ("orphaned", "AirflowException", [f"{NIGHT}-1", f"/api/jobs/{NIGHT}-1/stop"]),
        ("orphaned for a moment", "", [f"{NIGHT}-1"]),
        ("head is just back", "", [f"{NIGHT}-1"]),
        ("node is there", "", [f"{NIGHT}-1"]),
        ("nodes unknown", "", [f"{NIGHT}-1"]),
        ("away", "AirflowException", [f"{NIGHT}-1"]),
        ("away for a moment", "", [f"{NIGHT}-1"]),
        ("no token", "AirflowFailException", []),
        ("manual", "", ["nightly.score.20261127T020304.000005-1"]),
        ("named", "", ["mine-1"]),
    ],
)
def test_what_the_operator_makes_of_a_job(
    cases: dict[str, dict[str, Any]], case: str, raised: str, asked: list[str]
) -> None:
    """AirflowFailException is not tried again, AirflowException is, as the task's retries say."""
    found = cases[case]
    assert (found["raised"], found["asked"]) == (raised, asked)
    if case in ("under way", "cleared at work"):
        assert found["waited_for"] == f"{NIGHT}-1"
    assert {
        "lost": "its head was lost",
        "orphaned": "lost with the node that it ran on",
        "away": "Ray cannot be asked: HTTPStatusError",
    }.get(case, "") in found["said"]


def test_every_job_has_the_time_that_it_needs_to_stop(cases: dict[str, dict[str, Any]]) -> None:
    """On any cluster, and beside what the task itself wants of its environment."""
    wait = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS)}
    assert cases["new"]["sent"]["runtime_env"] == {"env_vars": wait}
    assert cases["environment"]["sent"]["runtime_env"] == {
        "working_dir": "s3://b/code.zip",
        "env_vars": {"A": "1", **wait},
    }


def test_a_command_has_the_processors_that_its_task_asks_for(cases: dict[str, dict[str, Any]]) -> None:
    names = ("entrypoint_num_cpus", "entrypoint_num_gpus")
    assert [cases["processors"]["sent"][name] for name in names] == [2, 1]
    assert not set(names) & set(cases["new"]["sent"])


def test_the_dags_are_read_without_the_project_ray_or_torch(tmp_path: Path) -> None:
    found = in_airflow(tmp_path, "-c", LOOK)
    assert not found["errors"]
    assert not {"lib", "jobs", "ray", "torch"} & set(found["modules"])
    nightly, weekly = found["dags"]["textsweep_nightly"], found["dags"]["textsweep_weekly"]
    assert nightly["tasks"] == {"score": ["publish"], "publish": []}
    assert weekly["tasks"] == {"train": ["compare"], "compare": ["promote"], "promote": []}
    for dag in (nightly, weekly):
        assert (dag["catchup"], dag["active"]) == (False, 1)
        assert dag["retries"] > 0
        assert dag["factor"] > 1, "pauses grow"
    assert (nightly["schedule"], weekly["schedule"]) == ("0 1 * * *", "0 12 * * 6"), "every night, and every Saturday"
    assert nightly["outlets"] == {"score": [], "publish": ["textsweep_scores"]}, (
        "whoever waits for scores is started by it"
    )
    assert nightly["rules"] == weekly["rules"] == ["all_success"], "nothing is promoted or told of after a failure"
    assert weekly["driver_cpus"]["compare"] > 0, "its forward passes are not the head's"


@pytest.mark.parametrize("failed", [None, "night", "tonight"])
def test_whoever_waits_for_a_night_is_told_of_it_unless_a_report_says_that_it_failed(
    failed: str | None, tmp_path: Path
) -> None:
    """Its own, or that of the night that readers see: one without anything new has none."""
    store = open_store(str(tmp_path / "scores"))
    publish_run(store, OLD, "night", night(1), write_objects(store, OLD, {"a.parquet": 2}))
    record_run(store, OLD, "night", night(1), 3 if failed == "night" else 0, "not as it should be", {"rows": 100})
    if failed == "tonight":
        record_run(store, OLD, "tonight", night(2), 3, "not as it should be", {"rows": 200})
    found = in_airflow(tmp_path, "-c", GATE, store.url, "tonight")
    if failed:
        assert found == {
            "raised": f"AirflowFailException: {store.url}: run {failed} says of itself: not as it should be",
            "told": None,
        }
    else:
        manifest = f"{store.url}/{OLD}/_runs/night/manifest.parquet"
        assert found == {"raised": "", "told": {"manifest": manifest, "run": "night", "rows": 100}}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with heads.started(tmp_path_factory.mktemp("head"), "--nodes", "1", "--cpus", "2", "--no-s3") as found:
        yield found


@pytest.mark.trial
@pytest.mark.timeout(1800)
def test_a_model_is_trained_and_promoted_and_scores_a_night(head: Head, tmp_path: Path) -> None:
    """`airflow dags test` with real jobs and real files; the same night twice is one job."""
    fakes.make_encoder(tmp_path / "base", "bert")
    texts = [f"the harbour was {'quiet' if day % 2 else 'loud'} on day {day}" for day in range(60)]
    labelled = pa.table({"text": texts, "label": ["no", "yes"] * 30})
    fakes.write_archive(
        str(tmp_path / "labelled"), {"train/a.parquet": labelled, "test/a.parquet": labelled.slice(0, 20)}
    )
    archive = labelled.select(["text"])
    fakes.write_archive(str(tmp_path / "archive"), {"a.parquet": archive, "b.parquet": archive.slice(0, 10)})
    paths = {name: str(tmp_path / name) for name in ("archive", "scores", "labelled", "base", "models")}
    variables = {
        **{f"textsweep_{name}": path for name, path in paths.items()},
        "textsweep_root": str(REPOSITORY),
        "textsweep_score_options": "--set planning.chunk_mb=2 --set limits.stall_seconds=900",
        "textsweep_train_options": "--set optim.epochs=20 --set optim.learning_rate=3e-3 --set optim.batch_size=8 --set model.max_length=16",
    }
    airflow = Airflow(tmp_path, head, DAGS, variables)
    airflow.command("dags", "test", "textsweep_weekly", "2026-11-21T12:00:00+00:00")
    model = tmp_path / "models" / "2026-11-21T120000"
    assert str(model) in airflow.command("variables", "get", "textsweep_model")
    (trained,) = head.named("train")
    assert (trained["submission_id"], trained["status"]) == ("textsweep_weekly.train.20261121T120000-1", "SUCCEEDED")
    airflow.command("dags", "test", "textsweep_weekly", "2026-11-28T12:00:00+00:00")
    first, compared = head.named("compare")
    assert (first["status"], compared["status"]) == ("SUCCEEDED", "SUCCEEDED")
    assert "jobs.compare" not in first["entrypoint"]
    assert f"--champion '{model}'" in compared["entrypoint"]
    model = tmp_path / "models" / "2026-11-28T120000"
    assert str(model) in airflow.command("variables", "get", "textsweep_model")

    # A week of wrong labels: the challenger has learned the opposite, and the nights go on with the model that they have.
    wrong = labelled.set_column(1, "label", pa.array(["yes", "no"] * 30))
    fakes.write_archive(
        str(tmp_path / "mislabelled"), {"train/a.parquet": wrong, "test/a.parquet": labelled.slice(0, 20)}
    )
    airflow.environment["AIRFLOW_VAR_TEXTSWEEP_LABELLED"] = str(tmp_path / "mislabelled")
    airflow.command("dags", "test", "textsweep_weekly", "2026-12-05T12:00:00+00:00", fails=True)
    refused = head.named("compare")[2]
    assert (refused["status"], refused["driver_exit_code"]) == ("FAILED", 3)
    assert len(head.named("compare")) == 3, "what was refused is not tried again"
    assert str(model) in airflow.command("variables", "get", "textsweep_model")

    # `dags test` of one date is one turn of one run: the second takes the success of the first, as a retry would.
    for _ in range(2):
        airflow.command("dags", "test", "textsweep_nightly", "2026-11-26T01:00:00+00:00")
        (job,) = head.named("score")
        assert (job["submission_id"], job["status"]) == ("textsweep_nightly.score.20261126T010000-1", "SUCCEEDED")
        assert f"model.path='{model}'" in job["entrypoint"]
        assert "--run-id 2026-11-26T010000" in job["entrypoint"]
    pointer = json.loads((tmp_path / "scores" / "_published.json").read_text())
    assert pointer["run"] == "2026-11-26T010000"
    manifest = pq.read_table(tmp_path / "scores" / pointer["manifest"])
    assert sum(manifest["rows"].to_pylist()) == 70
    token = head.token.encode()
    told = [path for path in tmp_path.rglob("*") if path.is_file() and token in path.read_bytes()]
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

        waiting = ("triggerer_killed", "worker_killed", "ended_by_a_person")
        wait_until(
            lambda: all([job["status"] for job in head.named(task)] == ["RUNNING"] for task in waiting),
            "three jobs",
            600,
        )
        state("triggerer_killed", "deferred")
        state("ended_by_a_person", "deferred")

        airflow.api(f"dags/trial/dagRuns/{run}/taskInstances/ended_by_a_person", "PATCH", {"new_state": "failed"})
        wait_until(lambda: head.named("ended_by_a_person")[0]["status"] == "STOPPED", "the job to be stopped", 300)

        # These two are over by then: one that is killed before its end was seen is tried again, whatever that end was.
        state("over_limit", "failed")
        state("incomplete", "success")

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

        found = airflow.tasks("trial", run)
        assert (found["over_limit"]["try_number"], len(head.named("over_limit"))) == (1, 1)
        assert (found["incomplete"]["try_number"], len(head.named("incomplete"))) == (2, 2)
        assert found["ended_by_a_person"]["state"] == "failed"
        assert len(head.named("ended_by_a_person")) == 1


@pytest.mark.trial
@pytest.mark.timeout(3600)
def test_thirty_nights_are_filled_in_by_the_shipped_dag_one_killed_and_one_cleared_and_no_row_is_there_twice(
    head: Head, tmp_path: Path
) -> None:
    """A backfill, four nights of one archive at a time, with real jobs: one for each logical date. Clearing one asks for one more.

    One of the first four dies when there are predictions: Airflow tries it again.
    """
    fakes.make_classifier(tmp_path / "model", "bert", ["no", "yes"])
    rows = {f"{shard:02d}.parquet": 20 + shard for shard in range(10)}
    shards = {
        name: pa.table({"text": [f"row {row} of {name}" for row in range(count)]}) for name, count in rows.items()
    }
    fakes.write_archive(str(tmp_path / "archive"), shards)
    paths = {name: str(tmp_path / name) for name in ("archive", "scores", "model")}
    variables = {
        **{f"textsweep_{name}": path for name, path in paths.items()},
        "textsweep_root": str(REPOSITORY),
        "textsweep_score_options": "--set model.max_length=16 --set limits.stall_seconds=900",
    }
    airflow = Airflow(tmp_path, head, DAGS, variables)
    airflow.command("dags", "reserialize")
    airflow.command("dags", "unpause", "textsweep_nightly")
    airflow.command("backfill", "create", "--dag-id", "textsweep_nightly", "--from-date", "2026-06-01", "--to-date", "2026-07-01", "--max-active-runs", "4")  # fmt: skip
    june = [f"textsweep_nightly.score.202606{day:02d}T010000" for day in range(1, 31)]

    def jobs() -> list[tuple[str, str]]:
        return [(job["submission_id"], job["status"]) for job in head.named("score") if job["submission_id"][:-2] in june]  # fmt: skip

    def runs() -> dict[str, str]:
        found = airflow.api("dags/textsweep_nightly/dagRuns?limit=100")["dag_runs"]
        return {one["logical_date"][:10]: one["state"] for one in found if one["logical_date"].startswith("2026-06")}

    def written() -> dict[Path, tuple[int, bytes]]:
        objects = (tmp_path / "scores").glob("*/*.parquet")
        return {one: (one.stat().st_mtime_ns, one.read_bytes()) for one in objects}

    def check_rows() -> None:
        pointer = json.loads((tmp_path / "scores" / "_published.json").read_text())
        manifest = pq.read_table(tmp_path / "scores" / pointer["manifest"])
        assert dict(zip(manifest["shard"].to_pylist(), manifest["rows"].to_pylist(), strict=True)) == rows
        found = [pq.read_table(one, columns=["shard", "row"]) for one in written()]
        places = [(row["shard"], row["row"]) for table in found for row in table.to_pylist()]
        assert sorted(places) == [(name, row) for name, count in rows.items() for row in range(count)]

    def at_work() -> psutil.Process | None:
        """The driver of a night."""
        for one in psutil.process_iter(["cmdline"]):
            words = one.info["cmdline"] or []
            if words[1:3] == ["-m", "jobs.score"] and f"output.path={paths['scores']}" in words:
                return one
        return None

    with airflow:
        wait_until(lambda: bool(written() and at_work()), "a night with predictions", 900)
        driver = at_work()
        assert driver is not None
        date = driver.cmdline()[driver.cmdline().index("--run-id") + 1].replace("-", "")
        driver.kill()
        kept = written()
        wait_until(lambda: list(runs().values()) == ["success"] * 30, "30 nights", 2400)
        killed = f"textsweep_nightly.score.{date}"
        ends = {f"{name}-1": "SUCCEEDED" for name in june} | {f"{killed}-1": "FAILED", f"{killed}-2": "SUCCEEDED"}
        assert dict(jobs()) == ends
        assert kept.items() <= written().items()
        check_rows()
        before = written()
        cleared = {"dry_run": False, "task_ids": ["score"], "only_failed": False, "include_downstream": True}
        run = next(one for one in airflow.api("dags/textsweep_nightly/dagRuns?limit=100")["dag_runs"] if one["logical_date"].startswith("2026-06-25"))  # fmt: skip
        airflow.api("dags/textsweep_nightly/clearTaskInstances", "POST", {**cleared, "dag_run_id": run["dag_run_id"]})
        again = "textsweep_nightly.score.20260625T010000-2"
        wait_until(lambda: (again, "SUCCEEDED") in jobs(), "a second job of that night", 600)
        wait_until(lambda: runs()["2026-06-25"] == "success", "the cleared night", 600)
        assert len(jobs()) == 32
        assert written() == before
        check_rows()
