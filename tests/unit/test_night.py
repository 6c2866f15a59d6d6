"""The night's script, run as it is with the real kubectl, against an API server that knows RayJobs and nothing else."""

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_manifests import KUBERAY, kubectl, of_kind

SCRIPT = KUBERAY / "components" / "night" / "night.sh"
TONIGHT = "29401980"
"""2025-11-26T01:00Z in minutes since 1970, as Kubernetes ends the name of a CronJob's job"""


class ApiServer(ThreadingHTTPServer):
    """Discovery, reading and creating of RayJobs. What is created takes the next of `fates` at each look at it: a status, or 503 if
    the server is in trouble just then, or None if the job was deleted."""

    def __init__(self, template: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.jobs = {"score": template}
        self.created: list[str] = []
        self.fates: list[dict[str, str] | int | None] = [{"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]


class Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on standard error."""

    def answer(self, body: dict[str, Any], code: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def status(self, code: int, reason: str, name: str) -> None:
        message = f"rayjobs.ray.io {name!r} {reason}"
        self.answer({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message}, code)  # fmt: skip

    def do_GET(self) -> None:
        path = self.path.split("?")[0].rstrip("/")
        version = {"groupVersion": "ray.io/v1", "version": "v1"}
        discovery: dict[str, dict[str, Any]] = {
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [{"name": "ray.io", "versions": [version], "preferredVersion": version}]},
            "/apis/ray.io/v1": {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "ray.io/v1", "resources": [
                {"name": "rayjobs", "singularName": "rayjob", "namespaced": True, "kind": "RayJob", "verbs": ["get", "create"]}]},
            # The server checks fields itself (fieldValidation), so kubectl does not.
            "/openapi/v3": {"paths": {"apis/ray.io/v1": {"serverRelativeURL": "/openapi/v3/apis/ray.io/v1"}}},
            "/openapi/v3/apis/ray.io/v1": {"openapi": "3.0.0", "info": {"title": "x", "version": "x"}, "paths": {
                "/apis/ray.io/v1/namespaces/{namespace}/rayjobs/{name}": {"patch": {
                    "parameters": [{"name": "fieldValidation", "in": "query"}],
                    "x-kubernetes-group-version-kind": {"group": "ray.io", "version": "v1", "kind": "RayJob"}}}}},
        }  # fmt: skip
        if path in discovery:
            return self.answer(discovery[path])
        name = path.rsplit("/", 1)[-1]
        if "/rayjobs/" not in path or name not in self.server.jobs:
            return self.status(404, "NotFound", name)
        job = self.server.jobs[name]
        if name != "score":
            fates = self.server.fates
            fate = fates.pop(0) if len(fates) > 1 else fates[0]
            if not isinstance(fate, dict):
                return self.status(*((fate, "ServiceUnavailable") if fate else (404, "NotFound")), name)
            job = job | {"status": fate}
        return self.answer(job)

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = job["metadata"]["name"]
        if name in self.server.jobs:
            return self.status(409, "AlreadyExists", name)
        assert "uid" not in job["metadata"]
        assert "resourceVersion" not in job["metadata"]
        self.server.jobs[name] = job
        self.server.created.append(name)
        return self.answer(job, 201)


@pytest.fixture
def server() -> Iterator[ApiServer]:
    (template,) = [job for job in of_kind("overlays/prod", "RayJob") if job["metadata"]["name"] == "score"]
    kept = {
        "uid": "1-2-3",
        "resourceVersion": "7",
        "creationTimestamp": "2025-11-01T00:00:00Z",
        "finalizers": ["ray.io/x"],
    }
    found = ApiServer(
        template | {"metadata": template["metadata"] | kept, "status": {"jobDeploymentStatus": "Suspended"}}
    )
    thread = threading.Thread(target=found.serve_forever, args=[0.01])
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def night(server: ApiServer, folder: Path, job: str = f"score-nightly-{TONIGHT}") -> subprocess.CompletedProcess[str]:
    """Run the script as the pod of a Kubernetes Job would; a `kubectl` in the folder goes before the real one."""
    (cron,) = of_kind("overlays/prod", "CronJob")
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    config = folder / "kubeconfig"
    config.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "x",
                "clusters": [{"name": "x", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
                "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x", "namespace": "textsweep"}}],
                "users": [{"name": "x", "user": {}}],
            }
        )
    )
    environment = {
        "PATH": f"{folder}:{Path(kubectl()).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "KUBECONFIG": str(config),
        "NO_PROXY": "127.0.0.1",
        "TMPDIR": str(folder),
        **{item["name"]: item["value"] for item in container["env"] if "value" in item},
        "JOB_NAME": job,
        "JOB_UID": "uid-of-the-job",
        "POLL_SECONDS": "0",
    }
    return subprocess.run(["sh", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=120)


def test_a_night_makes_one_job_of_its_date_and_waits_for_it(server: ApiServer, tmp_path: Path) -> None:
    server.fates = [{}, {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, *server.fates]
    done = night(server, tmp_path)
    assert done.returncode == 0, done.stderr
    assert server.created == ["score-2025-11-26"]
    job, template = server.jobs["score-2025-11-26"], server.jobs["score"]
    assert job["spec"]["suspend"] is False
    assert job["spec"]["entrypoint"] == template["spec"]["entrypoint"].replace("by-hand", "2025-11-26")
    rest = {"suspend", "entrypoint"}
    assert {key: value for key, value in job["spec"].items() if key not in rest} == {
        key: value for key, value in template["spec"].items() if key not in rest
    }
    assert not job.get("status")
    (owner,) = job["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Job", f"score-nightly-{TONIGHT}", "uid-of-the-job")


def test_a_pod_that_comes_again_waits_for_the_job_that_is_there(server: ApiServer, tmp_path: Path) -> None:
    server.jobs["score-2025-11-26"] = server.jobs["score"]
    assert night(server, tmp_path).returncode == 0
    assert not server.created


@pytest.mark.parametrize(
    "fate",
    [
        {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "exit code 3"},
        {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED", "message": "exit code 3"},
        {
            "jobDeploymentStatus": "ValidationFailed",
            "reason": "ValidationFailed",
            "message": "no entrypoint: exit code 3",
        },
    ],
    ids=["failed", "stopped", "refused"],
)
def test_a_job_that_did_not_succeed_is_no_success(server: ApiServer, tmp_path: Path, fate: dict[str, str]) -> None:
    server.fates = [fate]
    done = night(server, tmp_path)
    assert done.returncode == 3  # as the CronJob's podFailurePolicy expects
    assert "exit code 3" in done.stderr


def test_a_job_that_somebody_deleted_is_not_waited_for(server: ApiServer, tmp_path: Path) -> None:
    server.fates = [{"jobDeploymentStatus": "Running"}, None]
    done = night(server, tmp_path)
    assert done.returncode == 3
    assert "somebody deleted it" in done.stderr
    assert server.created == ["score-2025-11-26"]


@pytest.mark.parametrize("name", ["score-2", "score-20251126"])
def test_a_night_started_by_hand_has_a_name_and_run_of_its_own(server: ApiServer, tmp_path: Path, name: str) -> None:
    assert night(server, tmp_path, name).returncode == 0
    assert server.created == [f"score-{name}"]
    assert server.jobs[f"score-{name}"]["spec"]["entrypoint"].endswith(f"--run-id {name}")


def test_a_template_without_a_run_id_is_refused(server: ApiServer, tmp_path: Path) -> None:
    server.jobs["score"]["spec"] = server.jobs["score"]["spec"] | {"entrypoint": "python -m jobs.score"}
    done = night(server, tmp_path)
    assert done.returncode == 3
    assert "--run-id" in done.stderr
    assert not server.created


def test_a_patch_that_failed_is_not_the_templates_fault(server: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "kubectl").write_text(f'#!/bin/sh\n[ "$1" != patch ] || exit 1\nexec {kubectl()} "$@"\n')
    (tmp_path / "kubectl").chmod(0o755)
    done = night(server, tmp_path)
    assert done.returncode not in (0, 3), done.stderr
    assert "--run-id" not in done.stderr
    assert not server.created


def test_no_template_is_no_verdict(server: ApiServer, tmp_path: Path) -> None:
    server.jobs.clear()
    assert night(server, tmp_path).returncode not in (0, 3)
    assert not server.created


def test_an_api_server_that_is_away_is_asked_again(server: ApiServer, tmp_path: Path) -> None:
    server.fates = [503, *server.fates]
    done = night(server, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ServiceUnavailable" in done.stderr
