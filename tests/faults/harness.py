"""A cluster of several nodes that tests may damage, jobs on it as processes of their own, and the check that nothing was lost."""

import contextlib
import io
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ray.cluster_utils import Cluster

from jobs import score
from jobs.demo_store import LoopbackS3
from lib.storage import Store, open_store
from tests.conftest import REPOSITORY
from tests.faults import injection
from tests.preloaded import Forked, Preloaded
from tests.waiting import wait_until

NODE: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 200 * 2**20}
DEADLINE_SECONDS = 240
SHARDS, ROWS = 12, 100
"""of the archive that fault tests damage runs on"""
POLL_SECONDS = 0.2


class Bench:
    """A head without CPUs and two worker nodes; `heal` puts back what a test broke."""

    def __init__(self, folder: Path, workers: Preloaded, drivers: Preloaded) -> None:
        self.folder, self.forked, self.drivers = folder, workers, drivers
        os.environ[injection.VARIABLE] = str(folder)  # Ray's processes, and so all workers, inherit it
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.heal()

    def heal(self) -> None:
        """Two worker nodes, no faults."""
        for name in ("spec.json", "events.txt"):
            (self.folder / name).unlink(missing_ok=True)
        while len(self.cluster.worker_nodes) < 2:
            self.cluster.add_node(**NODE)
        self.cluster.wait_for_nodes()

    def lose_node(self) -> None:
        """One worker node is gone without a word."""
        self.cluster.remove_node(next(iter(self.cluster.worker_nodes)), allow_graceful=False)

    def lose_node_of(self, worker: psutil.Process) -> None:
        """The node of a worker process is gone without a word."""
        mine = self.raylet_of(worker)
        lost = [one for one in self.cluster.worker_nodes if one.all_processes["raylet"][0].process.pid == mine]
        assert len(lost) == 1, f"{worker} is no process of a worker node"
        self.cluster.remove_node(lost[0], allow_graceful=False)

    def add_node(self, **settings: str) -> Any:
        """Add a worker node whose Ray has some settings of its own, given as it reads them from the environment."""
        with mock.patch.dict(os.environ, settings):
            return self.cluster.add_node(**NODE)

    def plant(self, **faults: Any) -> None:
        """Set the faults that workers do from now on."""
        (self.folder / "spec.json").write_text(json.dumps(faults))

    @property
    def events(self) -> list[str]:
        """What workers did."""
        path = self.folder / "events.txt"
        return path.read_text().splitlines() if path.exists() else []

    def workers(self, name: str) -> list[psutil.Process]:
        """Worker processes by a part of their title, such as PredictBlock; raises none away that end meanwhile."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if name in " ".join(process.cmdline()) and self.raylet_of(process) in self.raylets:
                    found.append(process)
        return found

    @property
    def raylets(self) -> set[int]:
        """The processes that own the workers of the nodes that are there."""
        nodes: list[Any] = self.cluster.list_all_nodes()
        return {node.all_processes["raylet"][0].process.pid for node in nodes}

    def raylet_of(self, worker: psutil.Process) -> int | None:
        """The process id of the raylet that a worker belongs to; None for other processes."""
        is_ours = self.forked.process.pid in [process.pid for process in worker.parents()]
        return self.forked.raylets.get(worker.pid) if is_ours else None

    def close(self) -> None:
        """End all nodes."""
        self.cluster.shutdown()
        os.environ.pop(injection.VARIABLE, None)


@dataclass
class Job:
    """One run of a job as a process."""

    process: Forked
    log: Path

    def wait(self, seconds: float = DEADLINE_SECONDS) -> int:
        """Wait for its end and return its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job did not end in {seconds} s: {self.text[-3000:]}") from None

    @property
    def text(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")


@contextmanager
def running(bench: Bench, module: str, arguments: Sequence[str], run_id: str, endpoint: str = "") -> Iterator[Job]:
    """Run a module as a job on the bench's cluster; ended, if need be, by its process id. `endpoint`: another S3 address."""
    log = bench.folder / f"{run_id}.log"
    environment = {**os.environ, "RAY_ADDRESS": bench.cluster.address}
    if endpoint:
        environment["AWS_ENDPOINT_URL"] = endpoint
    process = bench.drivers.start(module, arguments, environment, REPOSITORY, log)
    try:
        yield Job(process, log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def scoring(
    bench: Bench, archive: str, model: str, output: str, *settings: str, run_id: str, endpoint: str = ""
) -> Iterator[Job]:
    """Run `jobs.score`, whose workers may be told to break."""
    arguments = command(archive, model, output, *settings, run_id=run_id)
    with running(bench, "tests.faults.driver", arguments, run_id, endpoint) as job:
        yield job


def command(archive: str, model: str, output: str, *settings: str, run_id: str) -> list[str]:
    """The arguments of `jobs.score`."""
    values = [
        f"input.path={archive}",
        f"model.path={model}",
        f"output.path={output}",
        "planning.chunk_mb=0.2",
        "model.precision=fp32",
        *settings,
    ]
    return [*(word for value in values for word in ("--set", value)), "--run-id", run_id]


# what a reader sees


def read_manifest(store: Store) -> pa.Table | None:
    """The manifest that the pointer names, None before anything is published."""
    pointer = store.read("_published.json")
    if pointer is None:
        return None
    raw = store.read(json.loads(pointer)["manifest"])
    assert raw is not None, f"the pointer names a manifest that is not there: {pointer!r}"
    return pq.read_table(io.BytesIO(raw))


def read_rows(store: Store, manifest: pa.Table) -> pa.Table:
    """All rows that a manifest names, after checking each object against its line: size, rows, checksums."""
    tables = []
    for line in manifest.to_pylist():
        raw = store.read(line["path"])
        assert raw is not None, f"{line['path']} is in the manifest and not in the storage"
        assert len(raw) == line["bytes"], f"{line['path']}: {len(raw)} bytes, the manifest says {line['bytes']}"
        table = pq.read_table(io.BytesIO(raw), page_checksum_verification=True).replace_schema_metadata()
        assert table.num_rows == line["rows"]
        assert pc.sum(pc.is_valid(table["error"])).as_py() in (line["errors"], None if not line["errors"] else -1)
        assert table["row"].to_pylist() == list(range(line["start"], line["start"] + line["rows"]))
        tables.append(table)
    return pa.concat_tables(tables)


def in_order(rows: pa.Table) -> pa.Table:
    """Rows by shard and row."""
    return rows.sort_by([("shard", "ascending"), ("row", "ascending")])


def assert_alike(rows: pa.Table, like: pa.Table) -> None:
    """Raise `AssertionError` unless two runs gave the same predictions: labels and errors equal, scores within 1e-5."""
    rows, like = in_order(rows), in_order(like)
    for name in ("shard", "row", "label", "error", "num_tokens", "truncated"):
        assert rows[name].to_pylist() == like[name].to_pylist(), f"2: {name} differs from a run without faults"
    worst = pc.max(pc.abs(pc.subtract(rows["score"], like["score"]))).as_py()
    assert worst is None or worst <= 1e-5, f"2: a score differs by {worst} from a run without faults"


@dataclass
class Reader:
    """A reader that follows the pointer all the time, and reads all that it names at once, as readers do.

    What it meets that is not whole is raised at the end of its `with` block.
    """

    find_store: Callable[[], Store]
    """a scenario may choose where the output is"""
    states: dict[bytes, pa.Table] = field(default_factory=dict)
    """by the pointer's content: all rows that it leads to"""
    looks: int = 0
    over: threading.Event = field(default_factory=threading.Event)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def follow(self) -> None:
        """Look until it is over."""
        while not self.over.wait(POLL_SECONDS):
            self.look()

    def look(self) -> None:
        """Follow the pointer once; a state that was not seen before is read whole."""
        store = self.find_store()
        pointer = store.read("_published.json")
        self.looks += 1
        if pointer is not None and pointer not in self.states:
            manifest = read_manifest(store)
            assert manifest is not None
            self.states[pointer] = read_rows(store, manifest)

    def __enter__(self) -> "Reader":
        self.following = self.pool.submit(self.follow)
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.pool.shutdown()
        self.following.result()


def expected_rows(archive: str) -> dict[str, int]:
    """Rows of every shard, from the archive itself."""
    store = open_store(archive)
    return {
        path: pq.read_metadata(io.BytesIO(store.read(path) or b"")).num_rows
        for path in store.list()["path"].to_pylist()
    }


def check_nothing_lost(
    archive: str,
    output: str,
    *,
    faults: int,
    exit_code: int,
    run_id: str,
    reader: Reader | None = None,
    like: pa.Table | None = None,
    changed: Sequence[str] = (),
    killed: bool = False,
    zombies: Sequence[psutil.Process] = (),
    stale_allowed: bool = False,
) -> pa.Table:
    """Check a finished run against the nine points of what nothing lost means; returns all predictions.

    1 complete and exclusive, 2 equal to a run without faults (`like`, its predictions) but for shards that `changed`, 3 atomic for
    a reader, 4 committed once, 5 unchanged while orphans of the run still live, 7 truthful exit code, 8 tidy, 9 the fault
    happened. Point 6, that the next run does nothing, is `check_idempotent`; of a run that failed, 7 is `check_unpublished`.
    """
    assert faults > 0, "9: the fault did not happen"
    store = open_store(output)
    pointer = json.loads(store.read("_published.json") or b"{}")
    assert (exit_code == 0) == (pointer.get("run") == run_id), f"7: exit code {exit_code}, published is {pointer}"
    manifest = read_manifest(store)
    assert manifest is not None
    before = contents_of(store)
    rows = read_rows(store, manifest)
    check_complete(rows, expected_rows(archive))
    assert len(set(manifest["path"].to_pylist())) == manifest.num_rows, "4: an object is in the manifest twice"
    if exit_code == 0:
        folder = f"{pointer['version']}/_runs/{run_id}/"
        assert f"{folder}_SUCCESS" in before, "7: exit code 0 without _SUCCESS"
        made = [path for path in before if path.startswith(folder) and "manifest" in path]
        assert made == [pointer["manifest"]], f"4: the run's manifests are {made}"
    if like is not None:
        assert_alike(without_shards(rows, changed), without_shards(like, changed))
    if reader is not None:
        assert reader.looks > 0
        assert len(reader.states) <= 2, "3: a reader saw more than the old and the new state"
        for state in reader.states.values():
            check_complete(without_shards(state, changed), without(expected_rows(archive), changed))
    objects = {path for path in before if "-of-" in path}
    named, letters = set(manifest["path"].to_pylist()), {path for path in objects if "/_dead_letter/" in path}
    unnamed = objects - letters - named
    assert stale_allowed or changed or not unnamed, f"8: objects that no manifest names: {sorted(unnamed)[:3]}"
    alone = {path.replace("/_dead_letter/", "/") for path in letters} - objects
    assert not alone, f"8: dead letters without an object: {sorted(alone)[:3]}"
    unfinished = [path for path in before if path.endswith(".tmp") or "_probe" in path]
    assert killed or not unfinished, f"8: unfinished files are left: {unfinished[:3]}"
    wait_until(lambda: not any(zombie.is_running() for zombie in zombies), "orphans to end", 60)
    assert contents_of(store) == before, "5: something changed after the end"
    return rows


def check_unpublished(output: str, run_id: str) -> None:
    """Point 7 of a run that failed, was stopped or was killed: readers were not moved to it, and nothing says that it succeeded."""
    store = open_store(output)
    pointer = json.loads(store.read("_published.json") or b"{}")
    assert pointer.get("run") != run_id, f"7: {run_id} did not end well, and is published: {pointer}"
    marks = [path for path in contents_of(store) if path.endswith(f"/_runs/{run_id}/_SUCCESS")]
    assert not marks, f"7: {run_id} did not end well, and says so: {marks}"


def check_complete(rows: pa.Table, expected: dict[str, int]) -> None:
    """Point 1: every row of these shards once, and nothing else."""
    counted = rows.group_by("shard").aggregate([("row", "count_distinct"), ("row", "max")]).to_pylist()
    found = {one["shard"]: one["row_count_distinct"] for one in counted}
    expected = {name: count for name, count in expected.items() if count}
    assert found == expected, "1: rows are missing or extra"
    assert rows.num_rows == sum(expected.values()), "1: rows stand there twice"


def without_shards(rows: pa.Table, shards: Sequence[str]) -> pa.Table:
    """The rows of all other shards."""
    return rows.filter(pc.invert(pc.is_in(rows["shard"], pa.array(shards, pa.string()))))


def without(counts: dict[str, int], shards: Sequence[str]) -> dict[str, int]:
    """The counts of all other shards."""
    return {name: count for name, count in counts.items() if name not in shards}


def contents_of(store: Store) -> dict[str, Any]:
    """Every file and which content it has, what a listing leaves out included."""
    found = {info["path"]: info["etag"] or info["mtime_ns"] for info in store.list().to_pylist()}
    hidden = Path(store.root).rglob(".*.tmp") if store.is_local else ()
    return found | {str(path.relative_to(store.root)): path.stat().st_mtime_ns for path in hidden}


def check_idempotent(s3: LoopbackS3, archive: str, model: str, output: str) -> None:
    """Point 6: the same command again does nothing, and writes nothing. Here and without a cluster, which it does not need."""
    before = len(s3.requests())
    said = io.StringIO()
    too_much = AssertionError("6: a run with nothing to do wants a cluster")
    with contextlib.redirect_stdout(said), mock.patch.object(score, "ray_session", side_effect=too_much):
        score.main(command(archive, model, output, run_id="again"))
    assert "nothing to do" in said.getvalue(), said.getvalue()
    written = [request for request in s3.requests()[before:] if request[0] in ("PUT", "POST", "DELETE")]
    assert not written, f"6: a run with nothing to do wrote {written[:3]}"
