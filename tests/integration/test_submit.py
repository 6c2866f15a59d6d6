"""`jobs.submit` against a real head with token authentication: one job for one command, its own exit code, whatever breaks."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pyarrow.compute as pc
import pytest

from jobs.demo_corpus import NUM_SHARDS
from jobs.demo_store import LoopbackS3
from lib.job_server import STOP_WAIT_SECONDS
from lib.storage import open_store
from tests import fakes, heads
from tests.faults.conftest import make_shards
from tests.faults.harness import ROWS, SHARDS, assert_alike, read_manifest, read_rows
from tests.faults.test_killed import contents
from tests.heads import Head, ask, finish
from tests.integration.test_budget import record_of
from tests.integration.test_growth import objects
from tests.integration.test_scoring import read_predictions
from tests.proxy import Fault, FaultyProxy
from tests.unit.test_packaging import run_git
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def head(s3: LoopbackS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """One node with two CPUs, whose Ray would kill a job that is stopped after 1 s unless the job says otherwise."""
    folder = tmp_path_factory.mktemp("head")
    with heads.started(folder, "--nodes", "1", "--cpus", "2", "--no-s3", RAY_JOB_STOP_WAIT_TIME_S="1") as made:
        yield made


def scripted(folder: Path, *settings: str) -> list[str]:
    """The command for a job that leaves its traces in `folder`."""
    words = ["scripted", "--run-id", "2026-11-19"]
    for value in (f"step.folder={folder}", *settings):
        words += ["--set", value]
    return words


def runs(folder: Path) -> int:
    """How often the job was started."""
    return len(list(folder.glob("run-*")))


def test_the_cluster_listens_on_loopback_alone_and_wants_its_token(head: Head) -> None:
    top = psutil.Process(head.pids["head"])
    sockets = [
        (one.name(), found.laddr.ip)
        for one in [top, *top.children(recursive=True)]
        for found in one.net_connections("inet")
        if not found.raddr
    ]
    assert {"gcs_server", "raylet"} <= {name for name, _ in sockets}, "the test must see Ray's own processes"
    assert {(name, ip) for name, ip in sockets if ip not in ("127.0.0.1", "::ffff:127.0.0.1")} == set()
    assert (head.folder / "token").stat().st_mode & 0o777 == 0o600
    with pytest.raises(urllib.error.HTTPError) as refused:
        heads.ask(f"{head.address}/api/jobs/")
    assert refused.value.code == 401


def test_a_job_ends_as_itself(head: Head, tmp_path: Path) -> None:
    """An exit code and the driver's death, at the same time. What else an end says: `test_submission`. What failed is tried again."""
    command = scripted(tmp_path / "job", "step.codes=[3, 0]")
    failed = head.submit(*command)
    killed = head.submit(*scripted(tmp_path / "killed", "step.waits=true"))
    wait_until(lambda: runs(tmp_path / "killed") == 1, "the job's driver")
    wait_until(lambda: (tmp_path / "killed" / "run-1").read_text() != "", "its id")
    os.kill(int((tmp_path / "killed" / "run-1").read_text()), signal.SIGKILL)
    code, output, errors = finish(failed)
    assert code == 3, errors
    assert output.count("run 1 of 2026-11-19 at work") == 1, "the job's own log"
    code, _, errors = finish(killed)
    assert code == 4
    assert "the driver was killed by SIGKILL" in errors.splitlines()[-1]

    code, output, errors = head.run(*command, "--status", "--json")
    assert code == 0, errors
    found = json.loads(output)
    assert (found["status"], found["exit_code"], found["attempt"]) == ("FAILED", 3, 1)
    assert runs(tmp_path / "job") == 1, "looking starts nothing"

    code, output, errors = head.run(*command)
    assert code == 0, errors
    assert "the job ended with exit code 3" in errors.splitlines()[0]
    assert "run 2 of 2026-11-19 at work" in output
    assert runs(tmp_path / "job") == 2
    assert head.jobs()[-1]["submission_id"].endswith("-2"), "the attempt after the one that failed"


def test_two_people_one_job_which_a_stop_lets_end(head: Head, tmp_path: Path) -> None:
    """Ctrl-C on a terminal asks; SIGTERM leaves the job. A job that was stopped begins its next attempt, which --stop ends."""
    command = scripted(tmp_path / "job", "step.waits=true", "step.stopping_seconds=2")
    controller, terminal = os.openpty()
    first = head.submit(*command, stdin=terminal)
    wait_until(lambda: runs(tmp_path / "job") == 1, "the job's driver")
    others = {signal.SIGTERM: head.submit(*command), signal.SIGINT: head.submit(*command, stdin=terminal)}
    os.write(controller, b"leave\n")
    for number, other in others.items():
        # What it says is read while it follows: its process must not be ended before.
        assert other.stderr is not None
        assert any("nothing was sent" in line for line in other.stderr), "attached"
        other.send_signal(number)
        code, _, errors = finish(other)
        assert code == 5
        assert ("or leave it running?" in errors) is (number == signal.SIGINT), errors
        assert "is not followed any more and goes on" in errors.splitlines()[-1]
        assert "--run-id 2026-11-19" in errors.splitlines()[-1], "how to follow it again"
    assert head.jobs()[-1]["status"] == "RUNNING"

    first.send_signal(signal.SIGINT)
    os.write(controller, b"stop\n")
    code, _, errors = finish(first, 60)
    os.close(controller)
    os.close(terminal)
    assert code == 5, errors
    assert "Stop the job on the cluster, or leave it running?" in errors
    assert runs(tmp_path / "job") == 1, "two commands, one job"

    code, output, errors = head.run(*command, "--detach")
    assert (code, output) == (0, ""), errors
    assert "not followed; to follow it: " in errors
    assert "--detach" not in errors
    wait_until(lambda: runs(tmp_path / "job") == 2, "the next attempt")
    code, output, errors = head.run(*command, "--stop")
    assert code == 0, errors
    assert "STOPPED" in output
    code, output, errors = head.run(*command, "--logs")
    assert code == 0, errors
    assert "stopped well" in output, "the job had the 2 s that it needed, not the cluster's 1"


def test_a_real_job_whose_acknowledgement_is_lost_is_one_and_shows_no_secret(head: Head, s3: LoopbackS3) -> None:
    """A job that reads S3 on the cluster, followed over a connection that is cut twice; token and keys of whoever submits stand
    nowhere, whatever is told about it."""
    secret = "planted-secret-8d1f"
    words = ["publish", "list", "--set", f"output.path={s3.bucket()}/scores", "--run-id", "nightly:1"]
    lost: list[str] = []
    looks: list[str] = []

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault:
        if (method, path) == ("POST", "/api/jobs/") and not lost:
            lost.append(path)
            return Fault.LOST_ANSWER
        if lost and method == "GET" and path.endswith("-1"):
            looks.append(path)
            # The first one asks whether the job was taken, the next ones whether it has ended.
            return Fault.RESET if len(looks) in (2, 3) else Fault.NONE
        return Fault.NONE

    with FaultyProxy(head.address) as proxy:
        proxy.rule = rule
        # The proxy knows no websockets: the log is the one that is read at the end.
        client = head.submit(*words, address=proxy.url, extra={"AWS_SECRET_ACCESS_KEY": secret})
        code, output, errors = finish(client)
    assert lost
    assert code == 0, output + errors
    before, after = errors.split("submitted already")
    assert (before.count("trying again in"), after.count("trying again in")) == (1, 2), errors
    assert "0 runs below s3://" in output
    again = head.run(*words)
    assert again[:2] == (0, "")
    assert "done already" in again[2]

    sent = [head.project / name for name in run_git(head.project, "ls-files").split()]
    commit = run_git(head.project, "rev-parse", "HEAD").strip()
    size = f"{sum(path.stat().st_size for path in sent) / 1e6:.1f} MB"
    assert f"sending {len(sent)} files, {size} (tracked by git at {commit[:12]})\n" in before
    (job,) = [one for one in head.jobs() if one["metadata"]["run_id"] == "nightly:1"]
    digest = job["submission_id"].split("-")[-2]
    expected = {"textsweep_job": "publish", "run_id": "nightly:1", "config_digest": digest, "git_commit": commit}
    assert job["metadata"] == expected

    shown = json.dumps(head.jobs())
    assert shown.count('"run_id": "nightly:1"') == 1, "one job, which the search sees"
    logs = "".join(path.read_text(errors="replace") for path in head.session.rglob("*.log") if path.is_file())
    assert "jobs.publish" in logs, "the search must see the logs"
    lines = [" ".join(one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"])]
    for needle in (head.token, secret):
        for place, text in {
            "job info": shown,
            "logs": logs,
            "output": output + errors,
            "processes": str(lines),
        }.items():
            assert needle not in text, place


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        (["--set", "step.foldr=x"], {}, "did you mean 'folder'"),
        (["--set", "step.folder=/x", "--config", "{outside}"], {}, "not among the files that are sent"),
        (["--set", "step.folder=/x"], {"RAY_AUTH_TOKEN": "0" * 64}, "refused the token"),
    ],
    ids=["typo", "config", "token"],
)
def test_what_is_wrong_is_one_line_and_no_submission(
    head: Head, tmp_path: Path, arguments: list[str], variables: dict[str, str], says: str
) -> None:
    (tmp_path / "outside.toml").write_text("")
    words = [word.replace("{outside}", str(tmp_path / "outside.toml")) for word in arguments]
    before = head.jobs()
    code, output, errors = head.run("scripted", *words, extra=variables)
    assert code == 2, errors
    assert not output
    assert says in errors
    assert len(errors.splitlines()) == 1, errors
    assert head.jobs() == before


@pytest.mark.trial
def test_a_scoring_run_as_every_night(head: Head, s3: LoopbackS3, classifier: str) -> None:
    """Stopped in the middle through the Jobs API it ends by itself, the same command scores the rest, and then is answered at once."""
    url, shards = s3.bucket(), 8 * SHARDS  # more than a job that is stopped has in flight, and finishes
    fakes.write_archive(f"{url}/archive", make_shards(shards))
    words = ["score", "--config", "jobs/configs/score_cpu.toml", "--run-id", "2026-11-19"]
    for value in (f"input.path={url}/archive", f"model.path={classifier}", f"output.path={url}/scores"):
        words += ["--set", value]
    words += ["--set", "model.precision=fp32"]
    controller, terminal = os.openpty()
    client = head.submit(*words, stdin=terminal)
    # As soon as there is something: a command with --stop takes longer to start than all the rest takes.
    wait_until(lambda: len(contents(f"{url}/scores")) > 0, "the first object", 180)
    os.write(controller, b"stop\n")
    client.send_signal(signal.SIGINT)
    code, output, errors = finish(client)
    os.close(controller)
    os.close(terminal)
    assert code == 5, output + errors
    assert "stopped by SIGTERM: what is finished is kept" in head.run(*words, "--logs")[1]
    before = contents(f"{url}/scores")
    assert 0 < len(before) < shards, "in the middle"

    code, output, errors = finish(head.submit(*words), 240)
    assert code == 0, output + errors
    manifest = read_manifest(open_store(f"{url}/scores"))
    assert manifest is not None
    assert manifest["rows"].to_pylist() == [ROWS] * shards
    assert before.items() <= contents(f"{url}/scores").items(), "what was finished is as it was"
    assert "scoring: " in output, "the job's own line of progress"
    code, output, errors = head.run(*words)
    assert (code, output) == (0, ""), "answered at once"


def end_hard(pid: int) -> None:
    """Kill a process and all that it has started."""
    for one in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue


@pytest.mark.trial
def test_a_head_that_was_started_anew_has_lost_its_jobs(
    s3: LoopbackS3, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """The state of a head is in its memory: after a restart the job is unknown, and the same command starts it again."""
    folder = tmp_path_factory.mktemp("restarted")
    with heads.started(folder, "--nodes", "1", "--no-s3") as head:
        command = [*scripted(tmp_path / "job", "step.waits=true"), "--patience", "120"]
        client = head.submit(*command)
        wait_until(lambda: runs(tmp_path / "job") == 1, "the job's driver")
        end_hard(head.pids["head"])
        heads.run_script("restart", head.folder)
        code, _, errors = finish(client)
        assert code == 4
        assert "trying again in" in errors
        assert "its head was started anew" in errors.splitlines()[-1]
        (tmp_path / "job" / "go").touch()
        code, _, errors = head.run(*command)
        assert code == 0, errors
        assert runs(tmp_path / "job") == 2

        head.read()
        end_hard(head.pids["head"])
        code, _, errors = head.run(*command, "--patience", "3")
        assert code == 4
        assert "no answer for 3 s" in errors.splitlines()[-1]


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """A Redis of its own on loopback, in memory; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    process = subprocess.Popen(
        ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return True
        return False

    try:
        wait_until(answers, "Redis")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.trial
@pytest.mark.timeout(1_200)
@pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="there is no redis-server: apt-get install redis-server"
)
def test_a_head_whose_state_is_in_redis_comes_back_with_its_workers_and_jobs(
    s3: LoopbackS3, classifier: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """GCS fault tolerance. Ray 2.60 goes on saying RUNNING of the job whose driver was lost with the head; the client is not deceived."""
    url, shards = s3.bucket(), 8 * SHARDS
    fakes.write_archive(f"{url}/archive", make_shards(shards))
    words = ["score", "--config", "jobs/configs/score_cpu.toml", "--run-id", "2026-11-19"]
    for value in (f"input.path={url}/archive", f"model.path={classifier}", f"output.path={url}/scores"):
        words += ["--set", value]
    words += ["--set", "model.precision=fp32"]
    folder = tmp_path_factory.mktemp("kept")
    with redis_server(folder) as redis, heads.started(folder, "--nodes", "3", "--no-s3", "--redis", redis) as head:
        client = head.submit(*words)
        wait_until(lambda: len(contents(f"{url}/scores")) > 0, "the first object", 180)
        (before,) = head.jobs()
        workers = {name: pid for name, pid in head.pids.items() if name != "head"}
        end_hard(head.pids["head"])
        done = contents(f"{url}/scores")
        assert len(done) < shards, "the head must go while there is work"
        heads.run_script("restart", head.folder)
        head.read()
        assert {name: pid for name, pid in head.pids.items() if name != "head"} == workers
        assert all(psutil.pid_exists(pid) for pid in workers.values())
        (known,) = head.jobs()
        assert (known["submission_id"], known["status"]) == (before["submission_id"], "RUNNING")
        code, output, errors = finish(client, 300)
        assert code == 4, output + errors
        assert "its driver was lost with the node that it ran on" in errors.splitlines()[-1]
        code, output, errors = finish(head.submit(*words), 400)
        assert code == 0, output + errors
        assert "cluster: 3 nodes, 4 CPUs" in output, "the workers are the new head's"
    manifest = read_manifest(open_store(f"{url}/scores"))
    assert manifest is not None
    assert manifest["rows"].to_pylist() == [ROWS] * shards
    assert done.items() <= contents(f"{url}/scores").items(), "what was finished is as it was"


@pytest.mark.trial
@pytest.mark.timeout(1_800)
def test_three_nodes_of_which_one_is_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The local cluster from start to end: what it prints is run as it stands there; then a node goes, and no row is another."""
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    with heads.started(tmp_path_factory.mktemp("local")) as head:
        started_with = json.loads((head.folder / "cluster.json").read_text())["values"]["environment"]
        assert started_with["RAY_JOB_STOP_WAIT_TIME_S"] == str(STOP_WAIT_SECONDS)
        commands = "\n".join(line[4:] for line in head.said.splitlines() if line.startswith("    "))
        assert [commands.count(word) for word in ("env\n", "demo_corpus", "submit train", "submit score")] == [1] * 4
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", "PYTHONPATH"))
        }
        kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
        shell = ["bash", "-euo", "pipefail", "-c", commands]
        done = subprocess.run(shell, cwd=head.project, env=kept, capture_output=True, text=True, timeout=1_200)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        for line in (head.folder / "env").read_text().splitlines():
            name, _, value = line.removeprefix("export ").partition("=")
            if name.startswith("AWS_"):
                monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        rows = read_predictions("s3://demo/scores")
        scored = rows.filter(pc.is_null(rows["error"]))
        assert rows.num_rows - scored.num_rows == 2 * NUM_SHARDS, "those that the demo's corpus plants"
        packages = [module.partition("/")[0] for module in scored["module"].to_pylist()]
        right = np.equal(packages, scored["label"].to_pylist()).mean()
        assert right > 0.5, "of eight packages"

        common = ["score", "--config", "jobs/configs/demo_score.toml", "--set", "input.path=s3://demo/archive"]
        common += ["input.key_columns=[]", "model.path=s3://demo/model", "planning.chunk_mb=0.02"]
        common += ["model.precision=fp32", "model.engine=torch"]
        client = head.submit(*common, "--set", "output.path=s3://demo/whole", "--run-id", "whole")
        code, output, errors = finish(client, 600)
        assert code == 0, output + errors
        chunks = len(objects("s3://demo/whole"))
        listed = ["publish", "list", "--set", "output.path=s3://demo/whole", "--entrypoint-num-cpus", "1"]
        code, output, errors = head.run(*listed, "--run-id", "listed")
        assert code == 0, output + errors
        nodes = [one["raylet"] for one in ask(f"{head.address}/nodes?view=summary", head.token)["data"]["summary"]]
        workers = {one["nodeId"] for one in nodes if not one["isHeadNode"]}
        assert head.jobs()[-1]["driver_node_id"] in workers, "a driver with a CPU of its own is not the head's"
        client = head.submit(*common, "--set", "output.path=s3://demo/damaged", "--run-id", "damaged")
        wait_until(lambda: bool(objects("s3://demo/damaged")), "the first object", 180)
        heads.run_script("lose", head.folder)
        assert client.poll() is None
        assert len(objects("s3://demo/damaged")) < chunks, "the node must go while there is work"
        code, output, errors = finish(client, 600)
        assert code == 0, output + errors
        compare("s3://demo/damaged", "s3://demo/whole")
        lives = [record_of(f"s3://demo/{name}", name)["this_run"]["num_actors"] for name in ("whole", "damaged")]
        assert lives[0] == 2 < lives[1], "the node that went had an actor"
    assert heads.left_over(head) == []
    with pytest.raises(OSError):
        urllib.request.urlopen(os.environ["AWS_ENDPOINT_URL"], timeout=10)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def compare(damaged: str, whole: str) -> None:
    """Raise `AssertionError` unless two outputs hold the same predictions."""
    tables = []
    for url in (damaged, whole):
        manifest = read_manifest(open_store(url))
        assert manifest is not None
        tables.append(read_rows(open_store(url), manifest))
    assert tables[0].num_rows == tables[1].num_rows > 0
    assert_alike(*tables)
