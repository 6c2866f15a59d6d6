"""A job that asks for nodes which are not there: an autoscaler brings them, or the job says what lacks."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray

from jobs.demo_store import LoopbackS3
from lib.config import Resources
from lib.errors import IncompleteError
from lib.runtime import wait_for_nodes
from tests import fakes
from tests.conftest import REPOSITORY
from tests.integration.test_budget import record_of
from tests.integration.test_scoring import read_predictions, texts_table
from tests.waiting import wait_until

GCS_PORT = 6379
"""Ray's provider of fake nodes knows no other."""


def test_what_is_there_is_not_waited_for(ray_session: None) -> None:
    found = wait_for_nodes(Resources(min_cpus=4))
    assert (found.cpus, found.waited) == (4, 0)


def test_nodes_that_do_not_come_end_the_job_and_leave_no_request(
    ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(IncompleteError, match=r"min_cpus = 5, but after resources.wait_seconds = 0.5 the cluster has"):
        wait_for_nodes(Resources(min_cpus=5, wait_seconds=0.5))
    assert "waiting for 0 GPUs and 5 CPUs: the cluster has 1 nodes, 4 CPUs" in capsys.readouterr().out
    requests = ray.util.placement_group_table().values()
    assert requests and {one["state"] for one in requests} == {"REMOVED"}


@contextmanager
def autoscaled(folder: Path) -> Iterator[str]:
    """A Ray head without CPUs and an autoscaler whose node provider starts real raylets on this machine; its address."""
    config = {
        "cluster_name": "test",
        "max_workers": 1,
        "provider": {"type": "fake_multinode"},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "workers": {"resources": {"CPU": 4}, "node_config": {}, "min_workers": 0, "max_workers": 1},
        },
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1.0,
        "file_mounts_sync_continuously": False,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    }
    (folder / "autoscaler.json").write_text(json.dumps(config))
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--include-dashboard=false"),
        *("--num-cpus=0", f"--port={GCS_PORT}", f"--autoscaling-config={folder}/autoscaler.json"),
    ]
    environment = {**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    family: set[psutil.Process] = set()
    try:
        wait_until(lambda: b"Ray runtime started" in (folder / "head.log").read_bytes(), "a head", 120)
        yield f"127.0.0.1:{GCS_PORT}"
    finally:
        family = set(psutil.Process(head.pid).children(recursive=True))
        head.send_signal(signal.SIGTERM)
        for member in family:
            if member.is_running():
                member.kill()
        head.wait(60)


@pytest.mark.trial
def test_a_run_brings_up_a_cluster_that_has_no_node(s3: LoopbackS3, classifier: str, tmp_path: Path) -> None:
    archive, output = f"{s3.bucket()}/archive", f"{s3.bucket()}/scores"
    fakes.write_archive(archive, {"one.parquet": texts_table(60)})
    values = [f"input.path={archive}", f"model.path={classifier}", f"output.path={output}", "resources.min_cpus=4"]
    with autoscaled(tmp_path) as address:
        arguments = [word for value in values for word in ("--set", value)]
        done = subprocess.run(
            [sys.executable, "-m", "jobs.score", *arguments, "--run-id", "night"],
            cwd=REPOSITORY,
            env={**os.environ, "RAY_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=400,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    # Ray's provider takes its own head for one that is missing, and adds and removes another without CPUs all the time.
    assert re.search(r"waiting for 0 GPUs and 4 CPUs: the cluster has \d nodes, 0 CPUs", done.stdout), done.stdout
    assert read_predictions(output).num_rows == 60
    assert record_of(output, "night")["phases"]["waiting"] > 0
