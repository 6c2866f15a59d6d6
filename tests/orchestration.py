"""A real Airflow on loopback, for the tests that run the DAGs on a Ray head. Everything is ended by its process id."""

import json
import os
import secrets
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.heads import Head, ask
from tests.waiting import wait_until

REPOSITORY = Path(__file__).parents[1]
AIRFLOW = REPOSITORY / ".venv-airflow" / "bin"
"""Airflow's environment, made by `make airflow-test`"""
START_SECONDS = 300


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def answers(url: str, token: str = "") -> bool:
    try:
        ask(url, token)
    except (OSError, ValueError):
        return False
    return True


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started, as it has them now."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for one in family:
        with_care(one.terminate)
    _, alive = psutil.wait_procs(family, timeout=10)
    for one in alive:
        with_care(one.kill)
    process.wait(30)


def with_care(signal: Any) -> None:
    try:
        signal()
    except psutil.NoSuchProcess:
        return


@contextmanager
def running(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        end(process)


class Airflow:
    """One installation: its folder, settings and commands, and the processes of a scheduler with its LocalExecutor."""

    def __init__(self, home: Path, head: Head, dags: Path, variables: Mapping[str, str]) -> None:
        self.home, self.port, self.stack = home, free_port(), ExitStack()
        self.url = f"http://127.0.0.1:{self.port}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        address, port = head.address.removeprefix("http://").split(":")
        connection = {"conn_type": "http", "host": address, "port": int(port), "password": head.token}
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("AIRFLOW", "RAY_", "PYTHON"))}
        self.environment = {
            **kept,
            "HOME": str(home),
            "PATH": f"{AIRFLOW}:{os.environ['PATH']}",
            "NO_PROXY": "127.0.0.1",
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
            "AIRFLOW__CORE__PLUGINS_FOLDER": str(REPOSITORY / "cluster" / "airflow" / "plugins"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CORE__PARALLELISM": "4",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(self.port),
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__API__SECRET_KEY": secrets.token_hex(16),
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db?timeout=60",
            # Airflow's services of logs have ports of their own, which two Airflows at once would fight over.
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(free_port()),
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(free_port()),
            # A task whose process or whose scheduler was killed is missed after 60 s in place of 300.
            "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "60",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
            "AIRFLOW_CONN_RAY": json.dumps(connection),
            **{f"AIRFLOW_VAR_{name.upper()}": value for name, value in variables.items()},
        }
        self.command("db", "migrate")

    def command(self, *arguments: str, seconds: float = 900, fails: bool = False) -> str:
        """Run one command of Airflow's to its end, which is a failure if `fails`; what it said."""
        done = subprocess.run([str(AIRFLOW / "airflow"), *arguments], env=self.environment, capture_output=True, text=True, timeout=seconds)  # fmt: skip
        assert bool(done.returncode) == fails, (
            f"airflow {' '.join(arguments)}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
        return done.stdout + done.stderr

    def __enter__(self) -> "Airflow":
        for name in ("api-server", "dag-processor", "scheduler", "triggerer"):
            self.start(name)
        wait_until(lambda: answers(f"{self.url}/auth/token"), f"Airflow's API ({self.home}/api-server.log)", START_SECONDS)  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def start(self, name: str) -> None:
        """Start one of Airflow's services, again if it was killed."""
        log = self.home / f"{name}.log"
        command = [str(AIRFLOW / "airflow"), name]
        self.processes[name] = self.stack.enter_context(running(command, self.environment, log))

    def api(self, path: str, method: str = "GET", body: Mapping[str, Any] | None = None) -> Any:
        token = ask(f"{self.url}/auth/token")["access_token"]
        return ask(f"{self.url}/api/v2/{path}", token, method, body)

    def knows(self, dag: str) -> bool:
        try:
            return bool(self.api(f"dags/{dag}")["dag_id"])
        except urllib.error.HTTPError:
            return False

    def tasks(self, dag: str, run: str) -> dict[str, dict[str, Any]]:
        """Every task of a run by its name: state, try_number and more."""
        found = self.api(f"dags/{dag}/dagRuns/{run}/taskInstances")["task_instances"]
        return {task["task_id"]: task for task in found}
