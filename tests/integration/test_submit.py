"""`jobs.submit` against a real head with token authentication: one job for one command, its own exit code, whatever breaks."""

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs.demo_store import LoopbackS3
from lib.storage import open_store
from tests import fakes, heads
from tests.faults.conftest import make_shards
from tests.faults.harness import assert_alike, read_manifest, read_rows
from tests.heads import Head, finish
from tests.proxy import Fault, FaultyProxy
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def head(s3: LoopbackS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """One node with two CPUs, whose Ray would kill a job that is stopped after 2 s unless the job says otherwise."""
    folder = tmp_path_factory.mktemp("head")
    with heads.started(folder, "--nodes", "1", "--cpus", "2", "--no-s3", RAY_JOB_STOP_WAIT_TIME_S="2") as made:
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


def info(head: Head, path: str = "") -> str:
    """What the job server answers about a job, or all jobs."""
    request = urllib.request.Request(
        f"{head.address}/api/jobs/{path}", headers={"Authorization": f"Bearer {head.token}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


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
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=30)
    assert refused.value.code == 401


def test_a_job_ends_as_itself_and_is_answered_or_resumed(head: Head, tmp_path: Path) -> None:
    """Success, exit codes 2, 3, 4 and the driver's death, at the same time; then all of them again."""
    cases = {"0": "[0]", "2": "[2, 0]", "3": "[3, 0]", "4": "[4, 0]"}
    started = {name: head.submit(*scripted(tmp_path / name, f"step.codes={codes}")) for name, codes in cases.items()}
    killed = head.submit(*scripted(tmp_path / "killed", "step.waits=true"))
    wait_until(lambda: runs(tmp_path / "killed") == 1, "the job's driver")
    wait_until(lambda: (tmp_path / "killed" / "run-1").read_text() != "", "its id")
    os.kill(int((tmp_path / "killed" / "run-1").read_text()), signal.SIGKILL)
    for name, process in started.items():
        code, output, errors = finish(process)
        assert code == int(name), errors
        assert output.count("run 1 of 2026-11-19 at work") == 1, "the job's own log"
    code, _, errors = finish(killed)
    assert code == 4
    assert "the driver was killed by SIGKILL" in errors.splitlines()[-1]

    again = {name: head.submit(*scripted(tmp_path / name, f"step.codes={cases[name]}")) for name in ("0", "3")}
    for name, process in again.items():
        code, _, errors = finish(process)
        assert code == 0, errors
        assert runs(tmp_path / name) == (1 if name == "0" else 2)
        assert ("done already" in errors) == (name == "0")
    code, output, _ = head.run(*scripted(tmp_path / "3", "step.codes=[3, 0]"), "--status", "--json")
    assert code == 0
    found = json.loads(output)
    assert (found["status"], found["exit_code"], found["attempt"]) == ("SUCCEEDED", 0, 2)
    assert runs(tmp_path / "3") == 2, "looking starts nothing"


def test_two_people_one_job_which_a_stop_lets_end(head: Head, tmp_path: Path) -> None:
    command = scripted(tmp_path / "job", "step.waits=true", "step.stopping_seconds=6")
    first, second = head.submit(*command), head.submit(*command)
    wait_until(lambda: runs(tmp_path / "job") == 1, "the job's driver")
    code, output, errors = head.run(*command, "--detach")
    assert code == 0
    assert "nothing was sent" in errors, "attached"
    assert not output
    # A client without a terminal that is ended leaves the job running.
    second.send_signal(signal.SIGTERM)
    code, _, errors = finish(second)
    assert code == 5
    assert "is not followed any more and goes on" in errors.splitlines()[-1]
    assert "--run-id 2026-11-19" in errors.splitlines()[-1], "how to follow it again"
    code, output, _ = head.run(*command, "--status", "--json")
    assert json.loads(output)["status"] == "RUNNING"

    code, output, errors = head.run(*command, "--stop")
    assert code == 0, errors
    code, output, errors = finish(first, 60)
    assert code == 5, errors
    assert "stopped well" in output, "the job had the 6 s that it needed, not the cluster's 2"
    assert runs(tmp_path / "job") == 1, "two commands, one job"


def test_ctrl_c_on_a_terminal_asks_and_stops(head: Head, tmp_path: Path) -> None:
    controller, terminal = os.openpty()
    process = head.submit(*scripted(tmp_path / "job", "step.waits=true"), stdin=terminal)
    wait_until(lambda: runs(tmp_path / "job") == 1, "the job's driver")
    process.send_signal(signal.SIGINT)
    os.write(controller, b"stop\n")
    code, _, errors = finish(process)
    os.close(controller)
    os.close(terminal)
    assert code == 5
    assert "Stop the job on the cluster, or leave it running?" in errors
    assert (
        json.loads(head.run(*scripted(tmp_path / "job", "step.waits=true"), "--status", "--json")[1])["status"]
        == "STOPPED"
    )


def test_a_lost_acknowledgement_is_no_second_job(head: Head, tmp_path: Path) -> None:
    with FaultyProxy(head.address) as proxy:
        lost: list[str] = []

        def rule(method: str, path: str, headers: dict[str, str]) -> Fault:
            if (method, path) == ("POST", "/api/jobs/") and not lost:
                lost.append(path)
                return Fault.LOST_ANSWER
            return Fault.NONE

        proxy.rule = rule
        # The proxy knows no websockets: the log is the one that is read at the end.
        code, output, errors = finish(head.submit(*scripted(tmp_path / "job"), address=proxy.url))
    assert lost
    assert code == 0, errors
    assert "submitted already" in errors
    assert "run 1 ends with 0" in output
    assert runs(tmp_path / "job") == 1


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
    before = info(head)
    code, output, errors = head.run("scripted", *words, extra=variables)
    assert code == 2, errors
    assert not output
    assert says in errors
    assert len(errors.splitlines()) == 1, errors
    assert len(json.loads(info(head))) == len(json.loads(before))


def test_a_real_job_works_and_no_secret_is_shown(head: Head, s3: LoopbackS3) -> None:
    """A job that reads S3 on the cluster; token and keys of whoever submits stand nowhere, whatever is told about it."""
    secret = "planted-secret-8d1f"
    words = ["publish", "list", "--set", f"output.path={s3.bucket()}/scores", "--run-id", "nightly:1"]
    code, output, errors = head.run(*words, extra={"AWS_SECRET_ACCESS_KEY": secret})
    assert code == 0, output + errors
    assert "0 runs below s3://" in output

    shown = info(head)
    assert "nightly:1" in shown, "the search must see the job"
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


@pytest.mark.trial
def test_a_scoring_run_as_every_night(head: Head, s3: LoopbackS3, classifier: str) -> None:
    url = s3.bucket()
    fakes.write_archive(f"{url}/archive", make_shards(2, 20))
    words = ["score", "--config", "jobs/configs/score_cpu.toml", "--run-id", "2026-11-19"]
    for value in (f"input.path={url}/archive", f"model.path={classifier}", f"output.path={url}/scores"):
        words += ["--set", value]
    code, output, errors = head.run(*words)
    assert code == 0, output + errors
    manifest = read_manifest(open_store(f"{url}/scores"))
    assert manifest is not None
    assert sum(manifest["rows"].to_pylist()) == 40
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


@pytest.mark.trial
def test_three_nodes_of_which_one_is_lost(
    s3: LoopbackS3, classifier: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The local cluster from start to end: the same predictions as without a fault, and no process is left."""
    folder = tmp_path_factory.mktemp("local")
    url = s3.bucket()
    fakes.write_archive(f"{url}/archive", make_shards())
    with heads.started(folder, "--nodes", "3", "--cpus", "2", "--no-s3") as head:
        common = ["score", "--config", "jobs/configs/demo_score.toml", "--set", f"input.path={url}/archive"]
        common += ["--set", "input.key_columns=[]", "--set", "planning.chunk_mb=0.2", "--set", "model.precision=fp32"]
        common += ["--set", f"model.path={classifier}"]
        code, output, errors = head.run(*common, "--set", f"output.path={url}/whole", "--run-id", "whole")
        assert code == 0, output + errors
        client = head.submit(*common, "--set", f"output.path={url}/damaged", "--run-id", "damaged")
        store = open_store(f"{url}/damaged")
        wait_until(
            lambda: any(".parquet" in name for name in store.list()["path"].to_pylist()), "the first object", 180
        )
        heads.run_script("lose", head.folder)
        code, output, errors = finish(client, 240)
        assert code == 0, output + errors
    assert heads.left_over(head) == []
    compare(f"{url}/damaged", f"{url}/whole")


def compare(damaged: str, whole: str) -> None:
    """Raise `AssertionError` unless two outputs hold the same predictions."""
    tables = []
    for url in (damaged, whole):
        manifest = read_manifest(open_store(url))
        assert manifest is not None
        tables.append(read_rows(open_store(url), manifest))
    assert tables[0].num_rows == tables[1].num_rows > 0
    assert_alike(*tables)
