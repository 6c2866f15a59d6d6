"""Publishing under races and faults: readers see old or new whole states, and a later plan is never undone by an older one."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.demo_store import LoopbackS3
from lib import publishing
from lib.config import validate
from lib.errors import IncompleteError, UsageError
from lib.publishing import POINTER_NAME, Pointer, read_published
from lib.score_config import ScoreConfig
from lib.scoring import prepare
from lib.storage import Store, open_store
from lib.verification import verify
from lib.versions import delete_version
from tests import fakes
from tests.conftest import REPOSITORY
from tests.proxy import Fault, FaultyProxy
from tests.publications import NEW, OLD, night, publish_run, write_objects

ROUNDS = 12


@pytest.fixture
def output(any_url: str) -> Store:
    return open_store(any_url)


def pointer(output: Store) -> Pointer:
    published = read_published(output)
    assert published is not None
    return published.pointer


class Reader:
    """Polls the pointer all the time, as readers do, and keeps what it saw."""

    def __init__(self, output: Store) -> None:
        self.output, self.done = output, threading.Event()
        self.seen: list[tuple[str, int]] = []
        self.pool = ThreadPoolExecutor(1)

    def __enter__(self) -> "Reader":
        self.polling = self.pool.submit(self.poll)
        return self

    def poll(self) -> None:
        while not self.done.is_set():
            published = read_published(self.output)  # raises if the manifest is not there
            if published is not None:
                self.seen.append((published.pointer.run, published.manifest.num_rows))

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.polling.result(60)


def test_of_two_runs_that_publish_at_once_the_later_planned_stays(output: Store) -> None:
    manifests = {"older": write_objects(output, OLD, {"a": 1}), "later": write_objects(output, OLD, {"a": 1, "b": 2})}
    sizes: dict[str, int] = {}
    with Reader(output) as reader:
        for number in range(ROUNDS):
            start = threading.Barrier(2)

            def run(kind: str, number: int = number, start: threading.Barrier = start) -> bool:
                planned_at = night(number) + timedelta(seconds=1 if kind == "later" else 0)
                sizes[f"{kind}-{number}"] = manifests[kind].num_rows
                start.wait()
                return publish_run(output, OLD, f"{kind}-{number}", planned_at, manifests[kind])

            with ThreadPoolExecutor(2) as pool:
                _, later = pool.map(run, ("older", "later"))
            assert later, "nothing later was planned"
            assert pointer(output).run == f"later-{number}"
    assert len(reader.seen) >= ROUNDS
    assert all(sizes[run] == rows for run, rows in reader.seen), "a reader saw a manifest that is not the run's"
    # Never back in time, whatever was read when.
    nights = [int(run.partition("-")[2]) for run, _ in reader.seen]
    assert nights == sorted(nights)


def test_processes_that_publish_at_once_leave_the_latest_plan(tmp_path: Path) -> None:
    output = open_store(str(tmp_path))
    manifest = write_objects(output, OLD, {"a": 1})
    runs = [f"{process}-{number}" for process in range(3) for number in range(8)]
    for run in runs:
        publishing.write_manifest(output.at(f"{OLD}/_runs/{run}"), manifest)
    code = """
import sys
from datetime import UTC, datetime
from lib.publishing import publish
from lib.storage import open_store
url, version, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for number in range(8):
    publish(open_store(url), version, f"{process}-{number}", datetime(2026, 11, 1 + 3 * number + process, tzinfo=UTC))
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, output.url, OLD, str(process)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert pointer(output).run == "2-7"


def test_a_slower_older_run_is_a_success_and_does_not_move_the_pointer_back(output: Store) -> None:
    manifest = write_objects(output, OLD, {"a": 1})
    assert publish_run(output, OLD, "tuesday", night(2), manifest)
    assert not publish_run(output, OLD, "monday", night(1), manifest)
    assert pointer(output).run == "tuesday"
    assert output.read(f"{OLD}/_runs/monday/_SUCCESS")


def test_an_older_attempt_of_the_same_run_does_not_move_the_pointer_back(output: Store) -> None:
    # A driver that was believed dead, and its retry under the same run id.
    few, more = write_objects(output, OLD, {"a": 1}), write_objects(output, OLD, {"a": 1, "b": 1})
    assert publish_run(output, OLD, "monday", night(1) + timedelta(hours=1), more)
    assert not publish_run(output, OLD, "monday", night(1), few)
    published = read_published(output)
    assert published is not None
    assert published.manifest.num_rows == 2


def test_the_same_run_published_twice_is_published_once(output: Store) -> None:
    manifest = write_objects(output, OLD, {"a": 1})
    assert publish_run(output, OLD, "monday", night(1), manifest)
    before = output.read(POINTER_NAME)
    assert publish_run(output, OLD, "monday", night(1), manifest)
    assert output.read(POINTER_NAME) == before
    assert [path for path in output.list()["path"].to_pylist() if "manifest" in path] == [pointer(output).manifest]


def test_a_manifest_that_readers_use_is_never_written_over(output: Store) -> None:
    first, second = write_objects(output, OLD, {"a": 1}), write_objects(output, OLD, {"a": 1, "b": 1})
    publish_run(output, OLD, "monday", night(1), first)
    seen = pointer(output).manifest
    before = output.read(seen)
    publish_run(output, OLD, "monday", night(2), second)
    assert output.read(seen) == before
    assert pointer(output).manifest == f"{OLD}/_runs/monday/manifest-2.parquet"


# two versions


def test_a_rescore_that_took_days_replaces_the_nights_published_meanwhile(output: Store) -> None:
    manifests = {version: write_objects(output, version, {"a": 1}) for version in (OLD, NEW)}
    for number in (0, 2, 3):
        publish_run(output, OLD, f"night-{number}", night(number), manifests[OLD])
    assert publish_run(output, NEW, "rescore", night(1), manifests[NEW])
    assert pointer(output).version == NEW


def test_a_slow_run_of_the_old_model_does_not_undo_the_new_one(output: Store) -> None:
    manifests = {version: write_objects(output, version, {"a": 1}) for version in (OLD, NEW)}
    publish_run(output, OLD, "night-0", night(0), manifests[OLD])
    publish_run(output, NEW, "night-2", night(2), manifests[NEW])
    publish_run(output, NEW, "night-3", night(3), manifests[NEW])
    assert not publish_run(output, OLD, "night-1", night(1), manifests[OLD])
    assert pointer(output).run == "night-3"
    assert publish_run(output, OLD, "night-4", night(4), manifests[OLD]), "the old model, on purpose"


# clocks


@pytest.mark.parametrize("ahead", [timedelta(days=365), timedelta(hours=-5)], ids=["a year ahead", "hours behind"])
def test_a_wrong_clock_of_one_driver_keeps_no_other_from_publishing(
    ahead: timedelta, output: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, right = write_objects(output, OLD, {"a": 1}), publishing.now
    before = right()
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "now", lambda: right() + ahead)  # a fake: this driver's clock
        publish_run(output, OLD, "wrong", publishing.now(), manifest)
    assert publish_run(output, OLD, "right", right() + timedelta(seconds=2), manifest)
    mark = Pointer.model_validate_json(output.read(f"{OLD}/_runs/wrong/_SUCCESS") or b"")
    assert (
        publishing.stamp(before - timedelta(seconds=30))
        < mark.planned_at
        < publishing.stamp(right() + timedelta(seconds=30))
    )


def test_a_clock_that_is_right_is_left_alone(output: Store) -> None:
    manifest = write_objects(output, OLD, {"a": 1})
    publish_run(output, OLD, "monday", night(1) + timedelta(microseconds=7), manifest)
    assert pointer(output).planned_at == "2026-11-21T02:00:00.000007+00:00"
    assert not [path for path in output.list()["path"].to_pylist() if "_probe" in path]


# what networks and stores do


def test_a_lost_answer_to_the_pointer_is_our_own_success(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    output = open_store(f"{s3.bucket()}/scores")
    manifest = write_objects(output, OLD, {"a": 1})
    for number in range(3):
        lost: list[str] = []

        def rule(method: str, path: str, headers: dict[str, str], lost: list[str] = lost) -> Fault:
            if method != "PUT" or not path.endswith(POINTER_NAME) or lost:
                return Fault.NONE
            lost.append(path)
            return Fault.LOST_ANSWER

        proxy.rule = rule
        assert publish_run(output, OLD, f"night-{number}", night(number), manifest)
        assert lost
        assert pointer(output).run == f"night-{number}"


def test_a_lost_answer_to_an_object_is_no_lost_object(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    output = open_store(f"{s3.bucket()}/scores")
    lost: list[str] = []

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault:
        if method != "PUT" or "-of-" not in path or path in lost:
            return Fault.NONE
        lost.append(path)
        return Fault.LOST_ANSWER

    proxy.rule = rule
    manifest = write_objects(output, OLD, {"a": 2, "b": 1}, bad_rows=1)
    assert len(lost) == 6, "three objects, and their dead letters"
    assert verify(output, manifest, lambda *_: None) == []
    assert len([path for path in output.list()["path"].to_pylist() if "-of-" in path]) == 6


def test_a_store_whose_swap_lies_is_refused_before_anything_is_written(
    s3: LoopbackS3, proxy: FaultyProxy, classifier: str, tmp_path: Path
) -> None:
    fakes.write_archive(str(tmp_path / "archive"), {"one.parquet": pa.table({"text": ["a"]})})
    url = f"{s3.bucket()}/scores"
    values = {"input": {"path": str(tmp_path / "archive")}, "model": {"path": classifier}, "output": {"path": url}}
    proxy.rule = lambda method, path, headers: (
        Fault.CHECKED_FIRST if method == "PUT" and "if-match" in headers else Fault.NONE
    )
    with pytest.raises(UsageError, match=r"[2-8] of 8 that swapped one object at once .*output\.single_writer = true"):
        prepare(validate(ScoreConfig, values), "run").start()
    assert open_store(url).list().num_rows == 0
    values["output"] = {"path": url, "single_writer": True}  # type: ignore[dict-item]
    prepare(validate(ScoreConfig, values), "run").start()


def test_one_writer_publishes_without_conditions(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    output = open_store(f"{s3.bucket()}/scores")
    manifest = write_objects(output, OLD, {"a": 1})
    conditions: list[str] = []

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault:
        if method == "PUT" and path.endswith(POINTER_NAME):
            conditions.extend(name for name in ("if-match", "if-none-match") if name in headers)
        return Fault.NONE

    proxy.rule = rule
    assert publish_run(output, OLD, "monday", night(1), manifest, single_writer=True)
    assert publish_run(output, OLD, "tuesday", night(2), manifest, single_writer=True)
    assert not publish_run(output, OLD, "sunday", night(0), manifest, single_writer=True)
    assert conditions == []
    assert pointer(output).run == "tuesday"


def test_a_pointer_that_is_none_is_named(output: Store) -> None:
    output.replace(POINTER_NAME, b'{"some": "thing"}')
    with pytest.raises(UsageError, match=r"_published\.json is not a pointer"):
        read_published(output)


# deletion meets publication


def test_a_reader_between_a_move_and_a_deletion_reads_the_new_state(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    output = open_store(f"{s3.bucket()}/scores")
    publish_run(output, OLD, "monday", night(1), write_objects(output, OLD, {"a": 1}))
    new = write_objects(output, NEW, {"a": 1, "b": 1})
    met: list[str] = []

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault:
        if method == "GET" and path.endswith("monday/manifest.parquet") and not met:
            met.append(path)  # the reader has read the pointer: now it moves, and what it named goes
            publish_run(output, NEW, "tuesday", night(2), new)
            delete_version(output, OLD, lambda *_: None, single_writer=False)
        return Fault.NONE

    proxy.rule = rule
    published = read_published(output)
    assert met
    assert published is not None
    assert (published.pointer.run, published.manifest.num_rows) == ("tuesday", 2)


def test_a_manifest_that_is_lost_is_named(output: Store) -> None:
    publish_run(output, OLD, "monday", night(1), write_objects(output, OLD, {"a": 1}))
    output.delete(f"{OLD}/_runs/monday/manifest.parquet")
    with pytest.raises(IncompleteError, match=r"names .*monday/manifest\.parquet, which is not there; roll back"):
        read_published(output)


def test_a_version_that_is_deleted_while_it_is_published_stays_unpublished(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    output = open_store(f"{s3.bucket()}/scores")
    publish_run(output, OLD, "monday", night(1), write_objects(output, OLD, {"a": 1}))
    new = write_objects(output, NEW, {"a": 1})
    met: list[str] = []

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault:
        if method == "PUT" and path.endswith(POINTER_NAME) and not met:
            met.append(path)  # the run has looked at everything and is about to swap
            delete_version(output, NEW, lambda *_: None, single_writer=False)
        return Fault.NONE

    proxy.rule = rule
    with pytest.raises(IncompleteError, match="was deleted while this run was under way"):
        publish_run(output, NEW, "tuesday", night(2), new)
    assert met
    assert pointer(output).run == "monday"


def test_a_version_that_is_published_while_it_is_deleted_stays(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    output = open_store(f"{s3.bucket()}/scores")
    publish_run(output, OLD, "monday", night(1), write_objects(output, OLD, {"a": 1}))
    new = write_objects(output, NEW, {"a": 1})
    archive = json.loads(output.read(f"{NEW}/_archive.json") or b"")
    met: list[str] = []

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault:
        if method == "PUT" and path.endswith("_archive.json") and not met:
            met.append(path)  # the deletion has seen that it is not published, and is about to mark it
            publish_run(output, NEW, "tuesday", night(2), new)
        return Fault.NONE

    proxy.rule = rule
    with pytest.raises(UsageError, match="is published"):
        delete_version(output, NEW, lambda *_: None, single_writer=False)
    assert met
    assert verify(output, new, lambda *_: None) == []
    assert json.loads(output.read(f"{NEW}/_archive.json") or b"") == archive, "it can be scored as before"
