"""A rescore with a new model that fails or is killed leaves what the old one published as it was, and readable."""

import signal
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.demo_store import LoopbackS3
from lib.errors import OverLimitError
from lib.publishing import POINTER_NAME, read_published
from lib.storage import Store, open_store
from lib.verification import verify
from tests import fakes
from tests.faults.harness import check_nothing_lost, check_unpublished
from tests.faults.test_killed import SHARDS, archive, command, objects, started, wait_for
from tests.integration.test_scoring import read_predictions, run_score, texts_table

__all__ = ["archive"]  # a fixture


def snapshot(output: Store, version: str) -> dict[str, bytes | None]:
    """Every byte of what is published."""
    paths = [POINTER_NAME, *(f"{version}/{path}" for path in output.at(version).list()["path"].to_pylist())]
    return {path: output.read(path) for path in paths}


@pytest.mark.usefixtures("ray_session")
def test_a_rescore_over_its_limit_changes_nothing_that_readers_see(
    s3: LoopbackS3, classifier: str, tmp_path: Path
) -> None:
    archive, output = f"{s3.bucket()}/archive", open_store(f"{s3.bucket()}/scores")
    fakes.write_archive(archive, {"one.parquet": texts_table(60)})
    run_score(archive, classifier, output.url, run_id="old")
    published = read_published(output)
    assert published is not None
    before, predictions = snapshot(output, published.pointer.version), read_predictions(output.url)

    fakes.write_archive(archive, {"bad.parquet": pa.table({"id": [1, 2], "text": [None, ""]})})
    fakes.make_classifier(tmp_path / "new", "bert", ("down", "same", "up"), seed=7)
    with pytest.raises(OverLimitError):
        run_score(archive, str(tmp_path / "new"), output.url, run_id="new")
    assert len([name for name in output.folders() if not name.startswith("_")]) == 2, "the new version was scored"
    assert snapshot(output, published.pointer.version) == before
    assert read_predictions(output.url) == predictions
    assert verify(output, published.manifest, lambda *_: None) == []
    check_unpublished(output.url, "new")


@pytest.mark.usefixtures("ray_session")
def test_a_run_executed_again_under_its_id_and_over_its_limit_changes_nothing_that_readers_see(
    classifier: str, tmp_path: Path
) -> None:
    # An orchestrator runs a night again, under the same run id; meanwhile a bad shard came.
    archive, output = str(tmp_path / "archive"), open_store(str(tmp_path / "scores"))
    fakes.write_archive(archive, {"one.parquet": texts_table(60)})
    run_score(archive, classifier, output.url, run_id="2026-11-20")
    predictions = read_predictions(output.url)
    before = read_published(output)
    fakes.write_archive(archive, {"bad.parquet": pa.table({"id": [1, 2], "text": [None, ""]})})
    with pytest.raises(OverLimitError):
        run_score(archive, classifier, output.url, run_id="2026-11-20")
    assert read_published(output) == before
    assert read_predictions(output.url) == predictions
    run_score(archive, classifier, output.url, "limits.max_bad_rows=9", run_id="2026-11-20")
    assert read_predictions(output.url).num_rows == 62


@pytest.mark.usefixtures("ray_session")
def test_a_killed_rescore_changes_nothing_that_readers_see(
    s3: LoopbackS3, archive: str, classifier: str, tmp_path: Path
) -> None:
    output = open_store(f"{s3.bucket()}/scores")
    run_score(archive, classifier, output.url, "planning.chunk_mb=0.2", run_id="old")
    published = read_published(output)
    assert published is not None
    version = published.pointer.version
    before = snapshot(output, version)
    fakes.make_classifier(tmp_path / "new", "bert", ("down", "same", "up"), seed=7)
    log = tmp_path / "new.log"
    with started(command(archive, str(tmp_path / "new"), output.url, "new"), log) as process:
        wait_for(lambda: len(objects(output.url)) >= SHARDS + 3, process, log)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert SHARDS < len(objects(output.url)) < 2 * SHARDS, "the kill must hit a run that has begun and has not ended"
    assert snapshot(output, version) == before
    assert verify(output, published.manifest, lambda *_: None) == []
    check_unpublished(output.url, "new")
    check_nothing_lost(archive, output.url, faults=1, exit_code=0, run_id="old", killed=True, stale_allowed=True)
