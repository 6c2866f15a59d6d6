"""A run that is killed or stopped loses at most what was in flight; the next one finishes it and scores nothing twice."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import psutil
import pyarrow as pa
import pytest

from jobs.demo_store import LoopbackS3
from lib.planning import parse_objects
from lib.storage import open_store
from lib.versions import list_runs
from tests import fakes
from tests.conftest import REPOSITORY
from tests.faults.harness import check_nothing_lost, check_unpublished
from tests.integration.test_equality import real_texts

SHARDS, ROWS = 24, 120
DEADLINE_SECONDS = 240


@pytest.fixture
def archive(s3: LoopbackS3) -> str:
    """Many small shards of long texts: a run takes long enough to be killed in the middle."""
    url = f"{s3.bucket()}/archive"
    texts = [" ".join(real_texts(500)[index % 400 : index % 400 + 20]) for index in range(SHARDS * ROWS)]
    shards = {
        f"part-{shard:03d}.parquet": pa.table({"text": texts[shard * ROWS : (shard + 1) * ROWS]})
        for shard in range(SHARDS)
    }
    fakes.write_archive(url, shards)
    return url


def command(archive: str, model: str, output: str, run_id: str) -> list[str]:
    settings = [
        f"input.path={archive}",
        f"model.path={model}",
        f"output.path={output}",
        "planning.chunk_mb=0.2",
        "model.precision=fp32",
    ]
    return [
        sys.executable,
        "-m",
        "jobs.score",
        *(word for setting in settings for word in ("--set", setting)),
        "--run-id",
        run_id,
    ]


@contextmanager
def started(arguments: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a job with a Ray of its own; at the end nothing of it is left running."""
    with log.open("wb") as output:
        process = subprocess.Popen(arguments, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
    family = [psutil.Process(process.pid)]
    try:
        yield process
    finally:
        if family[0].is_running():
            family += family[0].children(recursive=True)
        family += [other for other in psutil.process_iter() if belongs_to(other, process.pid)]
        for member in family:
            if member.is_running():
                member.kill()
        process.wait()


def belongs_to(process: psutil.Process, driver: int) -> bool:
    """Whether a process is part of the Ray that a driver, dead or alive, started: its session is named after the driver."""
    try:
        return bool(re.search(rf"session_[0-9_-]+_{driver}\b", " ".join(process.cmdline())))
    except psutil.Error:
        return False


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, f"the job ended too early: {log.read_text()[-2000:]}"
        assert time.monotonic() < deadline, f"nothing happened in {DEADLINE_SECONDS} s: {log.read_text()[-2000:]}"
        time.sleep(0.05)


def objects(output: str) -> set[str]:
    return {unquote(path) for path in open_store(output).list()["path"].to_pylist() if "-of-" in path}


def contents(output: str) -> dict[str, bytes | None]:
    """Every prediction object with its bytes."""
    return {name: open_store(output).read(name) for name in objects(output)}


def run_to_end(arguments: Sequence[str], log: Path) -> int:
    with started(arguments, log) as process:
        return process.wait(DEADLINE_SECONDS)


def interrupt(stop: signal.Signals, arguments: Sequence[str], output: str, log: Path) -> int:
    """Start a job, send it a signal once it has made three objects more than there are; returns its exit code."""
    kept = len(objects(output))
    with started(arguments, log) as process:
        wait_for(lambda: len(objects(output)) >= kept + 3, process, log)
        process.send_signal(stop)
        code = process.wait(30)
    assert len(objects(output)) < SHARDS, "the fault must hit a run that has begun and has not ended"
    return code


def test_stopped_then_killed_in_the_middle_and_run_again(
    s3: LoopbackS3, archive: str, classifier: str, tmp_path: Path
) -> None:
    output = f"{s3.bucket()}/scores"
    log = tmp_path / "stopped.log"
    assert interrupt(signal.SIGTERM, command(archive, classifier, output, "stopped"), output, log) == 5, log.read_text()
    assert "run the same command again" in log.read_text()
    check_unpublished(output, "stopped")
    assert [(one.run, one.state) for one in list_runs(open_store(output))] == [("stopped", "stopped")]
    stopped = contents(output)
    log = tmp_path / "killed.log"
    assert interrupt(signal.SIGKILL, command(archive, classifier, output, "killed"), output, log) == -signal.SIGKILL
    survivors = contents(output)
    assert stopped.items() < survivors.items(), "what a stopped run has made is kept, and the next one goes on"
    check_unpublished(output, "killed")

    before = len(s3.requests())
    log = tmp_path / "third.log"
    assert run_to_end(command(archive, classifier, output, "third"), log) == 0, log.read_text()[-2000:]
    requests = s3.requests()[before:]
    finished = set(parse_objects(pa.chunked_array([sorted(survivors)]))["shard"].to_pylist())
    finished = {shard.rpartition("/")[2] for shard in finished}
    read_again = [
        path
        for method, path, _ in requests
        if method == "GET" and path.partition("?")[0].rpartition("/")[2] in finished
    ]
    assert len(read_again) <= 1, "only the schema of the first shard is looked at again"
    assert survivors.items() < contents(output).items()

    check_nothing_lost(archive, output, faults=2, exit_code=0, run_id="third", killed=True)
    before = len(s3.requests())
    assert run_to_end(command(archive, classifier, output, "fourth"), tmp_path / "fourth.log") == 0
    assert "nothing to do" in (tmp_path / "fourth.log").read_text()
    assert [request for request in s3.requests()[before:] if request[0] in ("PUT", "POST", "DELETE")] == []


def test_processes_are_found_by_their_driver() -> None:
    assert not belongs_to(psutil.Process(os.getpid()), 999_999_999)
