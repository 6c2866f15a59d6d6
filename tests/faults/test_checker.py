"""The checker of fault tests sees what it is there for: a published output, damaged in each way that it names."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from lib.storage import Store, open_store
from tests import fakes
from tests.faults.harness import Reader, check_nothing_lost, check_unpublished
from tests.publications import CHUNK_ROWS, OLD, night, publish_run, write_objects

SHARDS = {"a.parquet": 2, "b.parquet": 1}


@pytest.fixture
def output(tmp_path: Path) -> Store:
    """What a run published."""
    store = open_store(str(tmp_path / "scores"))
    publish_run(store, OLD, "run", night(1), write_objects(store, OLD, SHARDS, bad_rows=2))
    return store


@pytest.fixture
def archive(tmp_path: Path) -> str:
    """What it scored."""
    url = str(tmp_path / "archive")
    fakes.write_archive(url, {name: pa.table({"text": ["x"] * CHUNK_ROWS * chunks}) for name, chunks in SHARDS.items()})
    return url


def check(archive: str, output: Store, **changes: Any) -> pa.Table:
    return check_nothing_lost(archive, output.url, **{"faults": 1, "exit_code": 0, "run_id": "run", **changes})


def some_object(output: Store, letters: bool = False) -> Path:
    paths = [path for path in output.list()["path"].to_pylist() if "-of-" in path]
    return Path(output.full(next(path for path in paths if ("/_dead_letter/" in path) == letters)))


def touch(path: str) -> Callable[[Store], object]:
    return lambda output: output.replace(path, b"")


def test_what_is_whole_passes(archive: str, output: Store) -> None:
    rows = check(archive, output)
    with Reader(lambda: output) as reader:
        reader.look()
    check(archive, output, like=rows, reader=reader)
    check_unpublished(output.url, "another")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda output: some_object(output).unlink(), "is in the manifest and not in the storage"),
        (lambda output: some_object(output).write_bytes(b"short"), "5 bytes, the manifest says"),
        (touch(f"{OLD}/a.parquet-{'cd' * 6}-00000-of-00001.parquet"), "8: objects that no manifest names"),
        (touch(f"{OLD}/_dead_letter/c-{'cd' * 6}-00000-of-00001.parquet"), "8: dead letters without an object"),
        (touch(f"{OLD}/.a.tmp"), "8: unfinished files are left"),
        (touch("_probe-0123"), "8: unfinished files are left"),
        (lambda output: output.delete(f"{OLD}/_runs/run/_SUCCESS"), "7: exit code 0 without _SUCCESS"),
        (touch(f"{OLD}/_runs/run/manifest-2.parquet"), "4: the run's manifests are"),
    ],
)
def test_every_damage_is_seen(damage: Callable[[Store], object], message: str, archive: str, output: Store) -> None:
    damage(output)
    with pytest.raises(AssertionError, match=message):
        check(archive, output)


def test_a_fault_that_did_not_happen_and_a_run_that_lies_are_seen(archive: str, output: Store) -> None:
    with pytest.raises(AssertionError, match="9: the fault did not happen"):
        check(archive, output, faults=0)
    with pytest.raises(AssertionError, match="7: exit code 0, published is"):
        check(archive, output, run_id="later")
    with pytest.raises(AssertionError, match="7: exit code 4, published is"):
        check(archive, output, exit_code=4)
    with pytest.raises(AssertionError, match="7: run did not end well, and is published"):
        check_unpublished(output.url, "run")
    output.replace(f"{OLD}/_runs/later/_SUCCESS", b"")
    with pytest.raises(AssertionError, match="7: later did not end well, and says so"):
        check_unpublished(output.url, "later")


def test_rows_that_are_missing_extra_twice_or_other_ones_are_seen(archive: str, output: Store) -> None:
    rows = check(archive, output)
    other = rows.set_column(rows.column_names.index("score"), "score", pc.add(rows["score"], 1e-4))
    with pytest.raises(AssertionError, match=r"2: a score differs by 0\.0001"):
        check(archive, output, like=other)
    relabelled = rows.set_column(rows.column_names.index("label"), "label", pa.array(["b"] * rows.num_rows))
    with pytest.raises(AssertionError, match="2: label differs"):
        check(archive, output, like=relabelled)
    fakes.write_archive(archive, {"c.parquet": pa.table({"text": ["x"]})})
    with pytest.raises(AssertionError, match="1: rows are missing or extra"):
        check(archive, output)
    open_store(archive).delete("c.parquet")
    manifest = write_objects(output, OLD, SHARDS, bad_rows=2)
    publish_run(output, OLD, "twice", night(2), pa.concat_tables([manifest, manifest.slice(0, 1)]))
    with pytest.raises(AssertionError, match="1: rows stand there twice"):
        check(archive, output, run_id="twice")


def test_a_reader_that_saw_a_part_is_heard(archive: str, tmp_path: Path) -> None:
    output = open_store(str(tmp_path / "scores"))
    manifest = write_objects(output, OLD, SHARDS)
    with Reader(lambda: output) as reader:
        publish_run(output, OLD, "run", night(1), manifest.slice(0, 1))
        reader.look()
        publish_run(output, OLD, "second", night(2), manifest)
        reader.look()
    with pytest.raises(AssertionError, match="1: rows are missing or extra"):
        check(archive, output, run_id="second", reader=reader)

    some_object(output).unlink()
    broken = Reader(lambda: output)
    with pytest.raises(AssertionError, match="is in the manifest and not in the storage"), broken:
        broken.following.result()


def test_what_an_orphan_still_does_is_seen(archive: str, output: Store) -> None:
    def is_running() -> bool:
        output.replace(f"{OLD}/_runs/run/report.html", b"late")
        return False

    with pytest.raises(AssertionError, match="5: something changed after the end"):
        check(archive, output, zombies=[SimpleNamespace(is_running=is_running)])
