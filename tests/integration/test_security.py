"""Who can reach a run, and what it tells: listening sockets, secrets and texts in everything that is written."""

import io
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed

from jobs.demo_store import LoopbackS3
from lib.fitting import Job
from lib.storage import open_store
from lib.workers import run_workers
from tests import fakes
from tests.conftest import REPOSITORY
from tests.faults.test_killed import started
from tests.waiting import wait_until

SOCKETS = """
import json, os, psutil
from lib.runtime import ray_session
with ray_session():
    import ray
    ray.get(ray.remote(lambda: 1).remote())
    address = ray.get_runtime_context().gcs_address
    sockets = [
        (process.name(), one.laddr.ip)
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
        for one in process.net_connections("inet")
        if not one.raddr
    ]
    import subprocess, sys
    stranger = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).get_all_node_info()"
    tokens = {"none": {"RAY_AUTH_MODE": "disabled"}, "wrong": {"RAY_AUTH_TOKEN": "0" * 64}, "right": {}}
    codes = {
        name: subprocess.run([sys.executable, "-c", stranger, address], env={**os.environ, **one}, capture_output=True).returncode
        for name, one in tokens.items()
    }
    print("found", json.dumps({"sockets": sockets, "codes": codes}))
"""


def test_a_local_ray_listens_on_loopback_alone_and_asks_for_a_token() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SOCKETS], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found"))[6:])
    processes = {name for name, _ in found["sockets"]}
    assert {"gcs_server", "raylet"} <= processes, "the test must see Ray's own processes"
    assert {(name, ip) for name, ip in found["sockets"] if ip not in ("127.0.0.1", "::ffff:127.0.0.1")} == set()
    assert found["codes"]["right"] == 0
    assert found["codes"]["none"] != 0
    assert found["codes"]["wrong"] != 0


def test_workers_of_a_training_listen_on_one_address_alone(ray_session: None, tmp_path: Path) -> None:
    """Ray's own ports, Gloo's, and the first worker's store."""

    def look() -> None:
        sockets = [one.laddr.ip for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN]
        (tmp_path / str(torch.distributed.get_rank())).write_text(json.dumps(sockets))
        torch.distributed.barrier()

    resources = SimpleNamespace(num_workers=2, min_workers=None)
    job = SimpleNamespace(
        folder=open_store(str(tmp_path / "run")), config=SimpleNamespace(resources=resources), cpus_per_worker=1
    )
    run_workers(look, cast(Job, job), use_gpu=False)
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert all(len(sockets) >= 2 for sockets in found), "one of Gloo's and Ray's own"
    assert len(found[0]) > len(found[1]), "the store's is among them"
    assert {ip.removeprefix("::ffff:") for sockets in found for ip in sockets} == {"127.0.0.1"}


# one run whose traces are searched


@dataclass
class Traces:
    """What a run left behind, by place, and the command lines that were seen while it ran."""

    written: dict[str, bytes] = field(default_factory=dict)
    commands: set[str] = field(default_factory=set)

    def places(self, needle: str) -> list[str]:
        """Where a string stands."""
        found = [place for place, content in self.written.items() if needle.encode() in content]
        return found + [f"command line: {one[:200]}" for one in self.commands if needle in one]


SECRET_KEY, SESSION_TOKEN = f"secret-{secrets.token_hex(16)}", f"session-{secrets.token_hex(24)}"
GOOD, BROKEN, BLANK_PAIR, NOTES = (f"{kind}{secrets.token_hex(8)}" for kind in ("good", "broken", "pair", "notes"))
"""Words that stand in texts: of a row that is scored, of one that is not UTF-8, beside an empty one, of no Parquet file."""

DEAD_LETTERS = (None, "false", "true")


def texts_of(store_path: str, content: bytes) -> bytes:
    """What stands in an object; of Parquet, which is compressed, every value and all metadata."""
    if not store_path.endswith(".parquet"):
        return content
    table = pq.read_table(io.BytesIO(content))
    return f"{table.to_pylist()} {table.schema.metadata}".encode()


def run_and_watch(s3: LoopbackS3, model: str, folder: Path, *settings: str) -> tuple[int, Traces]:
    """Run `jobs.score` on an archive of good and bad rows and shards, and collect all it says and writes."""
    archive, output = f"{s3.bucket()}/archive", f"{s3.bucket()}/scores"
    texts = [f"a word {GOOD} of many".encode(), f"{BROKEN} ".encode() + b"\xff\xfe", b"\xc2\xa0", None]
    shards: dict[str, pa.Table | bytes] = {
        "a.parquet": pa.table({"text": pa.array(texts, pa.binary()), "second": ["x", "y", BLANK_PAIR, "z"]}),
        "b.parquet": f"PAR1 {NOTES} ".encode() * 20,
        "c.parquet": fakes.to_parquet(pa.table({"text": [NOTES] * 50}), compression="none")[:-30],
        "d.parquet": pa.table({"text": [[NOTES]]}),
    }
    fakes.write_archive(archive, shards)
    pairs = 'input.text_column=["text", "second"]'
    values = [
        f"input.path={archive}",
        f"model.path={model}",
        f"output.path={output}",
        *("limits.max_bad_rows=9", "limits.max_bad_shards=9", pairs, *settings),
    ]
    command = [sys.executable, "-m", "jobs.score", *(word for value in values for word in ("--set", value))]
    log, traces = folder / "job.log", Traces()

    def watch() -> bool:
        for other in psutil.process_iter():
            try:
                traces.commands.add(" ".join(other.cmdline()))
            except psutil.Error:
                continue
        return process.poll() is not None

    with started(command, log) as process:
        wait_until(watch, "the job to end", seconds=240)
        sessions = list((Path(tempfile.gettempdir()) / "ray").glob(f"session_*_{process.pid}"))
        code = process.wait()
    assert len(sessions) == 1, "the run must have a Ray of its own"
    for path in sessions[0].rglob("*"):
        if path.is_file() and not path.is_symlink():
            traces.written[f"ray: {path.relative_to(sessions[0])}"] = path.read_bytes()
    store = open_store(output)
    for name in store.list()["path"].to_pylist():
        traces.written[f"output: {name}"] = name.encode() + texts_of(name, store.read(name) or b"")
    traces.written["stdout and stderr"] = log.read_bytes()
    return code, traces


@pytest.fixture(scope="module")
def traces(s3: LoopbackS3, classifier: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traces]:
    folder = tmp_path_factory.mktemp("secrets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.setenv("AWS_SESSION_TOKEN", SESSION_TOKEN)
        code, found = run_and_watch(s3, classifier, folder)
    assert code == 0, found.written["stdout and stderr"].decode()[-2000:]
    yield found


def test_the_search_would_find_what_stands_there(traces: Traces) -> None:
    assert any(place.startswith("output: ") and "_dead_letter" in place for place in traces.places("undecodable"))
    assert any(place.endswith("report.html") for place in traces.places("d.parquet"))
    assert any("gcs_server" in place for place in traces.written), sorted(traces.written)
    assert "stdout and stderr" in traces.places("done: ")
    assert any("jobs.score" in command for command in traces.commands)


def test_no_secret_is_written_anywhere(traces: Traces) -> None:
    assert traces.places(SECRET_KEY) == []
    assert traces.places(SESSION_TOKEN) == []
    assert traces.places(os.environ["RAY_AUTH_TOKEN"]) == []


@pytest.mark.parametrize("word", [GOOD, BROKEN, BLANK_PAIR, NOTES], ids=["good", "not UTF-8", "pair", "bad shard"])
def test_no_text_is_written_anywhere(traces: Traces, word: str) -> None:
    assert traces.places(word) == []
