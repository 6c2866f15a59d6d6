#!/usr/bin/env python3
"""A Ray cluster of several nodes and an S3 server on this machine, to try everything on that runs on a real one.

    .venv/bin/python cluster/local/cluster.py up [--nodes 3] [--cpus 2]    # start; prints what to export and what to run
    .venv/bin/python cluster/local/cluster.py down                         # end all of it, by the process ids that were recorded
    .venv/bin/python cluster/local/cluster.py lose                         # one worker node is gone without a word
    .venv/bin/python cluster/local/cluster.py add                          # one more worker node
    .venv/bin/python cluster/local/cluster.py restart                      # the head anew, without memory of its jobs; one node alone
    .venv/bin/python cluster/local/cluster.py up --redis HOST:PORT         # the head's state in a Redis that runs there: after `restart`
                                                                           # the head knows its jobs, and the workers stay

Everything listens on 127.0.0.1 alone and asks for a token. The first node is the head: it has no CPUs for work, unless it is the only
one, and runs the drivers of submitted jobs. All state is in .cluster/ (another folder with --folder); the S3 server keeps its objects
in memory.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray  # noqa: F401  brings its own psutil along

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120
STOP_SECONDS = 5
"""What processes get after SIGTERM; a node of Ray's would wait up to 30 s for tasks that nobody waits for any more."""

HOST = "127.0.0.1"

# `ray start`. Ray 2.60 listens on loopback alone only if it believes that it is on a Mac (the variable below), where it refuses
# a second node: that check, and the machine's own address that it would take for a loopback one, are replaced in this one process.
RAY = """
from ray._private import ray_constants, services
from ray.scripts.scripts import main
ray_constants.ENABLE_RAY_CLUSTER = True
services.get_node_ip_address = lambda address=None: "127.0.0.1"
main()
"""

HOW = """
In each shell that uses it:

{exports}

Then, for example (the first two once):

    python -m jobs.demo_corpus s3://demo
    python -m jobs.submit train --config jobs/configs/demo_train.toml --set train.path=s3://demo/train.parquet \\
        --set valid.path=s3://demo/valid.parquet --set test.path=s3://demo/test.parquet --set output.path=s3://demo/model --run-id demo
    python -m jobs.submit score --config jobs/configs/demo_score.toml --set input.path=s3://demo/archive \\
        --set model.path=s3://demo/model --set output.path=s3://demo/scores --run-id demo

The dashboard is {address} (it asks for the token). To end all of it: make cluster-down
"""


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["up", "down", "lose", "add", "restart"])
    parser.add_argument("--nodes", type=int, default=3, help="nodes, the head included (default: 3)")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs that Ray believes each node has (default: 2)")
    parser.add_argument(
        "--no-s3", action="store_true", help="up: no S3 server; the one that the environment names is used"
    )
    parser.add_argument(
        "--redis", metavar="HOST:PORT", help="up: a Redis that keeps the head's state (GCS fault tolerance)"
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".cluster", help="where state and logs are (default: .cluster)"
    )
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    state = State(folder)
    if arguments.action == "up":
        if arguments.nodes < 1:
            sys.exit(f"--nodes {arguments.nodes}: expected 1 or more")
        if any(alive(one) for one in state.processes):
            sys.exit(f"{folder}: a cluster is running already; `down` ends it")
        state = cleared(state)
        try:
            up(state, arguments.nodes, arguments.cpus, s3=not arguments.no_s3, redis=arguments.redis)
        except BaseException:
            down(state, keep_logs=True)
            raise
        return
    if not state.processes:
        sys.exit(f"{folder}: no cluster was started from here")
    if arguments.action == "add":
        add_worker(state, arguments.cpus)
        state.wait_for_nodes()
    elif arguments.action == "restart":
        restart(state)
    elif arguments.action == "lose":
        workers = [one for one in state.processes if one["name"].startswith("worker") and alive(one)]
        if not workers:
            sys.exit("there is no worker node left to lose")
        end([workers[-1]], gracefully=False)
        print(f"{workers[-1]['name']} is gone")
    else:
        down(state)


class State:
    """What was started, in a file: `processes` (name, pid, start time) and `values`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "cluster.json"
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.is_recorded = {"processes", "values"} <= found.keys()
        self.processes: list[dict[str, Any]] = found.get("processes", [])
        self.values: dict[str, Any] = found.get("values", {})

    def save(self) -> None:
        """Write it."""
        self.path.write_text(json.dumps({"processes": self.processes, "values": self.values}, indent=2))

    def start(self, name: str, command: list[str], environment: dict[str, str]) -> Path:
        """Start a process that outlives this one, without what `environment` gives as empty; returns its log."""
        log = self.folder / f"{name}.log"
        inherited = {name: value for name, value in os.environ.items() if name not in environment}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**inherited, **{name: value for name, value in environment.items() if value}},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.processes.append({"name": name, "pid": process.pid, "started": psutil.Process(process.pid).create_time()})
        self.save()
        return log

    def wait_for_nodes(self) -> None:
        """Wait until every node that is there says so."""
        for one in self.processes:
            if one["name"] != "s3" and alive(one):
                log = self.folder / f"{one['name']}.log"
                wait(lambda log=log: "Ray runtime started" in log.read_text(errors="replace"), one, log)


def cleared(state: State) -> State:
    """The same folder, without what a cluster that has ended left there. A folder that is no cluster's is left as it is."""
    if state.is_recorded:
        down(state)
    try:
        state.folder.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        sys.exit(f"{state.folder}: {error.strerror}, and no cluster was started from here; name a new folder")
    return State(state.folder)


def up(state: State, nodes: int, cpus: int, *, s3: bool, redis: str | None = None) -> None:
    """Start the S3 server and all nodes, and say how to use them."""
    state.folder.mkdir(parents=True)
    state.save()
    token = state.folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    exports = {}
    if s3:
        exports = start_s3(state)
    gcs, dashboard, client, *metrics = free_ports(5)
    address = f"http://{HOST}:{dashboard}"
    # Ray's sockets lie below its folder, and their paths may have 107 bytes.
    session = tempfile.mkdtemp(prefix="textsweep-", dir="/tmp")
    environment = {
        **exports,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_AUTH_TOKEN": "",
        "RAY_ADDRESS": "",
        "PYTHONPATH": "",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "40"),
        "AUTOSCALER_METRIC_PORT": str(metrics[0]),
        "DASHBOARD_METRIC_PORT": str(metrics[1]),
        "RAY_REDIS_ADDRESS": redis or "",
        "RAY_external_storage_namespace": Path(session).name if redis else "",
    }
    state.values = {"gcs": f"{HOST}:{gcs}", "address": address, "session": session, "environment": environment}
    state.values["head"] = [
        *("--head", "--port", str(gcs), "--dashboard-host", HOST, "--dashboard-port", str(dashboard)),
        *("--ray-client-server-port", str(client), "--temp-dir", session),
        *("--num-cpus", str(0 if nodes > 1 else cpus)),
    ]
    start_node(state, "head", state.values["head"])
    state.wait_for_nodes()
    for _ in range(nodes - 1):
        add_worker(state, cpus)
    wait_for_server(state)
    exports = {
        **exports,
        "RAY_API_SERVER_ADDRESS": address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    lines = "\n".join(f"export {name}={value}" for name, value in exports.items())
    (state.folder / "env").write_text(lines + "\n")
    shown = f"    source {state.folder}/env\n\nwhich is\n\n" + "\n".join(f"    {line}" for line in lines.splitlines())
    print(f"{nodes} nodes are up.\n{HOW.format(exports=shown, address=address)}", end="", flush=True)


def restart(state: State) -> None:
    """Start the head anew at its old address. Nodes of one that has forgotten them would not join it, so they are ended."""
    has_memory = bool(state.values["environment"]["RAY_REDIS_ADDRESS"])
    nodes = [one for one in state.processes if one["name"] == "head" or (one["name"] != "s3" and not has_memory)]
    end(nodes, gracefully=False)
    state.processes = [one for one in state.processes if one not in nodes]
    # Ray 2.60 takes the workers' processes, which name the head's address, for a head that is there, if this file says so, too.
    (Path(state.values["session"]) / "ray_current_cluster").unlink(missing_ok=True)
    start_node(state, "head", state.values["head"])
    wait_for_server(state)


def wait_for_server(state: State) -> None:
    """Wait until all nodes are up and the job server answers."""
    state.wait_for_nodes()
    token = Path(state.values["environment"]["RAY_AUTH_TOKEN_PATH"]).read_text()
    head = next(one for one in state.processes if one["name"] == "head")
    wait(lambda: answers(state.values["address"], token), head, state.folder / "head.log")


def start_s3(state: State) -> dict[str, str]:
    """Start the S3 server; returns what a process needs in its environment to use it."""
    log = state.start("s3", [sys.executable, "-m", "jobs.demo_store", str(state.folder / "s3-server.log")], {})
    wait(lambda: "ready" in log.read_text(), state.processes[-1], log)
    lines = (line.removeprefix("export ") for line in log.read_text().splitlines() if line.startswith("export "))
    return dict(line.split("=", 1) for line in lines)


def add_worker(state: State, cpus: int) -> None:
    """Start one more worker node."""
    number = sum(one["name"].startswith("worker") for one in state.processes) + 1
    # A folder of its own: in a common one two nodes that start together take the same socket, and one node's clearing up removed
    # the working folder of a job's driver on another (both seen).
    session = f"{state.values['session']}/w{number}"
    start_node(
        state,
        f"worker-{number}",
        ["--address", state.values["gcs"], "--num-cpus", str(cpus), "--temp-dir", session],
    )


def start_node(state: State, name: str, options: list[str]) -> None:
    """Start a node as one process, whose children are all of Ray's."""
    command = [sys.executable, "-c", RAY, "start", *options, "--block", "--disable-usage-stats"]
    command += ["--node-ip-address", HOST, "--object-store-memory", str(200 * 2**20)]
    # Ports that the system chooses: Ray's own choice may be another cluster's on this machine.
    command += ["--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", "0"]
    state.start(name, command, state.values["environment"])


def answers(address: str, token: str) -> bool:
    """Whether the job server is there."""
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would see the token
    try:
        with direct.open(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_ports(number: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait(condition: Callable[[], bool], process: dict[str, Any], log: Path) -> None:
    """Wait for something that a process does; end with its log if it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if not alive(process) or time.monotonic() > deadline:
            sys.exit(f"{process['name']} did not start within {START_SECONDS} s; {log}:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)


def find(process: dict[str, Any]) -> psutil.Process | None:
    """The process that was started; None if it is gone, even if another one has its id now."""
    try:
        found = psutil.Process(process["pid"])
        same = found.create_time() == process["started"]
    except psutil.NoSuchProcess:
        return None
    return found if same and is_running(found) else None


def alive(process: dict[str, Any]) -> bool:
    """Whether it is there."""
    return find(process) is not None


def end(processes: list[dict[str, Any]], *, gracefully: bool) -> None:
    """End processes and all that they have started."""
    tops = [found for one in processes if (found := find(one))]
    everything = [*tops, *(child for top in tops for child in top.children(recursive=True))]
    if gracefully:
        for top in tops:
            top.terminate()
        await_end(everything)
    everything += [child for top in tops if is_running(top) for child in top.children(recursive=True)]
    for one in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    await_end(everything)


def await_end(processes: list[psutil.Process]) -> None:
    """Wait until processes are gone, or only their entries are: in some containers nobody reaps those."""
    deadline = time.monotonic() + STOP_SECONDS
    while any(is_running(one) for one in processes) and time.monotonic() < deadline:
        time.sleep(0.1)


def is_running(process: psutil.Process) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def down(state: State, *, keep_logs: bool = False) -> None:
    """End everything that is recorded, workers first, and remove what it left."""
    end(state.processes[::-1], gracefully=True)
    if keep_logs:
        print(f"Ray's logs are in {state.values.get('session', state.folder)}", file=sys.stderr)
        return
    if "session" in state.values:
        shutil.rmtree(state.values["session"], ignore_errors=True)
    shutil.rmtree(state.folder, ignore_errors=True)
    print("all of it has ended")


if __name__ == "__main__":
    main()
