"""A real Ray head with its job server, started by `cluster/local/cluster.py`, what it says of its jobs, and the command that submits to it."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import REPOSITORY
from tests.unit.test_packaging import run_git

SCRIPT = REPOSITORY / "cluster" / "local" / "cluster.py"


def ask(url: str, token: str = "", method: str = "GET", body: Mapping[str, Any] | None = None) -> Any:
    """A JSON answer from loopback. Raises `urllib.error.URLError` (an HTTP status included)."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = json.dumps(body).encode() if body is not None else None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data, headers, method=method), timeout=30) as answer:
        return json.loads(answer.read())


@dataclass
class Head:
    """A cluster that was started in `folder`, and a project's folder to submit from."""

    folder: Path
    project: Path
    said: str
    """what the script printed"""

    def __post_init__(self) -> None:
        self.read()

    def read(self) -> None:
        """What the script recorded."""
        state = json.loads((self.folder / "cluster.json").read_text())
        self.address: str = state["values"]["address"]
        self.session = Path(state["values"]["session"])
        self.pids = {one["name"]: int(one["pid"]) for one in state["processes"]}

    @property
    def token(self) -> str:
        """What the cluster asks for."""
        return (self.folder / "token").read_text()

    @property
    def environment(self) -> dict[str, str]:
        """What a command that submits has in its environment: a file that holds the token, nothing else of Ray's."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
        return {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}

    def jobs(self) -> list[dict[str, Any]]:
        """All submitted jobs, the oldest first."""
        found = [job for job in ask(f"{self.address}/api/jobs/", self.token) if job["type"] == "SUBMISSION"]
        return sorted(found, key=lambda job: float(job["start_time"]))

    def named(self, task: str) -> list[dict[str, Any]]:
        """The jobs of one task of Airflow's."""
        return [job for job in self.jobs() if f".{task}." in job["submission_id"]]

    def submit(
        self, *arguments: str, address: str = "", stdin: int = subprocess.DEVNULL, extra: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start `python -m jobs.submit`, with `extra` variables in its environment."""
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.submit", *arguments, "--address", address or self.address],
            cwd=self.project,
            env={**self.environment, **(extra or {})},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, extra: dict[str, str] | None = None) -> tuple[int, str, str]:
        """Run `python -m jobs.submit` to its end: exit code, standard output, standard error."""
        return finish(self.submit(*arguments, extra=extra))


def finish(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    """Wait for a command: exit code, standard output, standard error."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        raise AssertionError(f"the command did not end in {seconds:g} s: {output[-2000:]} {errors[-2000:]}") from None
    return process.returncode, output, errors


def run_script(action: str, folder: Path, *options: str, **environment: str) -> str:
    """Run the script that starts and stops clusters; returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), action, "--folder", str(folder), *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def left_over(head: Head) -> list[str]:
    """Processes that still run and name the cluster's own folder."""
    found = []
    for one in psutil.process_iter():
        try:
            line = " ".join(one.cmdline())
        except psutil.Error:
            continue
        if str(head.session) in line or str(head.folder) in line:
            found.append(line)
    return found


def make_project(folder: Path) -> Path:
    """A checkout with the project's own folders, one job more that does what a test says, and a file that git does not track."""
    for name in ("jobs", "lib"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "tests" / "scripted.py", folder / "jobs")
    run_git(folder, "init")
    run_git(folder, "add", "jobs", "lib")
    run_git(folder, "commit", "-m", "all of it")
    (folder / "jobs" / "untracked.txt").write_text("not sent")
    return folder


@contextmanager
def started(folder: Path, *options: str, **environment: Any) -> Iterator[Head]:
    """A cluster, ended by the ids that its script recorded."""
    said = run_script("up", folder / "cluster", *options, **environment)
    head = Head(folder / "cluster", make_project(folder / "project"), said)
    try:
        yield head
    finally:
        run_script("down", head.folder)
