"""An archive that grows, changes and shrinks from night to night: what is scored, what readers see, what is removed."""

import datetime
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.demo_store import LoopbackS3
from lib import conclusion, pipeline
from lib.errors import IncompleteError, OverLimitError, UsageError
from lib.outcome import Outcome
from lib.storage import Store, open_store
from tests import fakes
from tests.integration.test_scoring import read_json, read_predictions, run_score, texts_table

pytestmark = pytest.mark.usefixtures("ray_session")

KEEP_NOTHING = "output.keep_stale_hours=0"


def objects(output: str) -> list[str]:
    """Names of all prediction objects below an output folder, current or not."""
    return [path for path in open_store(output).list()["path"].to_pylist() if "-of-" in path and "/_" not in path]


def shards_seen(output: str) -> dict[str, int]:
    """Rows that readers see, by shard."""
    counted: dict[str, int] = read_predictions(output).to_pandas().groupby("shard").size().to_dict()
    return counted


def manifest_of(output: str) -> pa.Table:
    store = open_store(output)
    return pq.read_table(io.BytesIO(store.read(read_json(store, "_published.json")["manifest"]) or b""))


def dead_letters(output: str) -> list[dict[str, Any]]:
    store = open_store(output)
    paths = [path for path in store.list()["path"].to_pylist() if "/_dead_letter/" in path]
    return [row for path in paths for row in pq.read_table(io.BytesIO(store.read(path) or b"")).to_pylist()]


def test_a_changed_shard_leaves_the_manifest_at_once_and_the_store_in_a_later_run(
    any_url: str, classifier: str
) -> None:
    archive, output = f"{any_url}/archive", f"{any_url}/scores"
    fakes.write_archive(archive, {"one.parquet": texts_table(50), "two.parquet": texts_table(40, 50)})
    run_score(archive, classifier, output, KEEP_NOTHING, run_id="first")
    first = objects(output)
    fakes.write_archive(archive, {"one.parquet": texts_table(60, 200)})
    run_score(archive, classifier, output, "output.keep_stale_hours=1", run_id="second")
    assert shards_seen(output) == {"one.parquet": 60, "two.parquet": 40}
    assert set(first) < set(objects(output)), "nothing is removed before its time"

    fakes.write_archive(archive, {"three.parquet": texts_table(10, 300)})
    run_score(archive, classifier, output, KEEP_NOTHING, run_id="third")
    assert sorted(objects(output)) == sorted(manifest_of(output)["path"].to_pylist())
    assert shards_seen(output) == {"one.parquet": 60, "two.parquet": 40, "three.parquet": 10}


def test_stale_objects_wait_for_their_time_from_when_they_became_stale(
    tmp_path: Path, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, output = str(tmp_path / "archive"), str(tmp_path / "scores")
    fakes.write_archive(archive, {"one.parquet": texts_table(20), "two.parquet": texts_table(10, 20)})
    run_score(archive, classifier, output, run_id="first")
    fakes.write_archive(archive, {"one.parquet": texts_table(30, 200)})
    run_score(archive, classifier, output, run_id="second")
    store = open_store(output)
    version = read_json(store, "_published.json")["version"]
    record = f"{version}/_runs/second/stale.parquet"
    stale = pq.read_table(io.BytesIO(store.read(record) or b"")).to_pylist()
    assert [row["shard"] for row in stale] == ["one.parquet"]

    # As if the second run had been nine days ago.
    stale[0]["since_ns"] -= int(datetime.timedelta(days=9).total_seconds() * 1e9)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(stale), sink)
    store.replace(record, sink.getvalue())
    fakes.write_archive(archive, {"two.parquet": texts_table(11, 300)})
    run_score(archive, classifier, output, run_id="third")
    left = [path for path in objects(output) if path not in manifest_of(output)["path"].to_pylist()]
    assert {path.partition("/")[2][:11] for path in left} == {"two.parquet"}, "one went, two has only just become stale"


def test_an_object_that_vanishes_during_a_run_makes_it_incomplete(
    tmp_path: Path, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, output = str(tmp_path / "archive"), str(tmp_path / "scores")
    fakes.write_archive(archive, {"one.parquet": texts_table(20)})
    run_score(archive, classifier, output, run_id="first")
    fakes.write_archive(archive, {"two.parquet": texts_table(10, 20)})
    score = pipeline.score

    def score_and_lose(*arguments: Any) -> Outcome:
        open_store(output).delete(objects(output)[0])
        return score(*arguments)

    monkeypatch.setattr(pipeline, "score", score_and_lose)
    with pytest.raises(IncompleteError, match=r"1 shards had all their objects .* one\.parquet"):
        run_score(archive, classifier, output, run_id="second")
    monkeypatch.undo()
    run_score(archive, classifier, output, run_id="third")
    assert shards_seen(output) == {"one.parquet": 20, "two.parquet": 10}


def test_predictions_of_a_deleted_shard_are_kept_or_removed_as_configured(any_url: str, classifier: str) -> None:
    archive, output = f"{any_url}/archive.parquet", f"{any_url}/scores"  # a folder, named as Spark names them
    fakes.write_archive(archive, {"one.parquet": texts_table(50), "two.parquet": texts_table(40, 50)})
    run_score(archive, classifier, output, KEEP_NOTHING, run_id="first")
    open_store(archive).delete("two.parquet")
    run_score(archive, classifier, output, KEEP_NOTHING, run_id="second")
    fakes.write_archive(archive, {"three.parquet": texts_table(10, 300)})
    run_score(archive, classifier, output, KEEP_NOTHING, run_id="third")
    assert shards_seen(output) == {"one.parquet": 50, "two.parquet": 40, "three.parquet": 10}

    with pytest.raises(UsageError, match="needs the whole archive listed"):
        run_score(f"{archive}/*.parquet", classifier, output, 'input.deleted="remove"')
    run_score(archive, classifier, output, KEEP_NOTHING, 'input.deleted="remove"', run_id="fourth")
    assert shards_seen(output) == {"one.parquet": 50, "three.parquet": 10}
    assert sorted(objects(output)) == sorted(manifest_of(output)["path"].to_pylist())


def test_a_run_over_part_of_the_archive_hides_and_removes_nothing(tmp_path: Path, classifier: str) -> None:
    archive, output = str(tmp_path / "archive"), str(tmp_path / "scores")
    fakes.write_archive(archive, {"a/one.parquet": texts_table(20), "b/two.parquet": texts_table(10, 20)})
    run_score(archive, classifier, output, run_id="first")
    fakes.write_archive(archive, {"b/three.parquet": texts_table(5, 50)})
    run_score(f"{archive}/b*/*.parquet", classifier, output, KEEP_NOTHING, run_id="second")
    assert shards_seen(output) == {"a/one.parquet": 20, "b/two.parquet": 10, "b/three.parquet": 5}


def test_a_shard_that_is_back_while_stale_objects_are_removed_keeps_its_own(
    tmp_path: Path, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, output = str(tmp_path / "archive"), str(tmp_path / "scores")
    fakes.write_archive(archive, {"one.parquet": texts_table(20), "two.parquet": texts_table(10, 20)})
    run_score(archive, classifier, output, run_id="first")
    gone = Path(archive, "two.parquet")
    hidden = gone.rename(tmp_path / "two.parquet")
    reconcile = conclusion.reconcile

    def reconcile_and_bring_back(*arguments: Any) -> pa.Table:
        manifest = reconcile(*arguments)
        hidden.rename(gone)
        return manifest

    monkeypatch.setattr(conclusion, "reconcile", reconcile_and_bring_back)
    run_score(archive, classifier, output, KEEP_NOTHING, 'input.deleted="remove"', run_id="second")
    assert gone.exists(), "the shard came back during the run"
    assert shards_seen(output) == {"one.parquet": 20}
    assert any("two.parquet" in path for path in objects(output)), "its objects are still good"
    monkeypatch.undo()
    run_score(archive, classifier, output, 'input.deleted="remove"', run_id="third")
    assert shards_seen(output) == {"one.parquet": 20, "two.parquet": 10}


def test_deleted_shards_are_remembered_by_their_own_version(tmp_path: Path, classifier: str) -> None:
    archive, output = str(tmp_path / "archive"), str(tmp_path / "scores")
    other = tmp_path / "other"
    fakes.make_classifier(other, "bert", ("down", "same", "up"), seed=1)
    fakes.write_archive(archive, {"one.parquet": texts_table(20), "two.parquet": texts_table(10, 20)})
    run_score(archive, classifier, output, run_id="first")
    Path(archive, "two.parquet").unlink()
    run_score(archive, str(other), output, run_id="second")
    assert shards_seen(output) == {"one.parquet": 20}
    run_score(archive, classifier, output, run_id="third")
    assert shards_seen(output) == {"one.parquet": 20, "two.parquet": 10}


def test_a_bad_shard_is_a_dead_letter_and_can_be_accepted_or_repaired(tmp_path: Path, classifier: str) -> None:
    archive, output = str(tmp_path / "archive"), str(tmp_path / "scores")
    fakes.write_archive(archive, {"one.parquet": texts_table(20), "broken.parquet": b"PAR1 not Parquet PAR1"})
    with pytest.raises(OverLimitError, match=r"broken\.parquet.*limits\.accept = \[\"[0-9a-f]{12}\"\]") as caught:
        run_score(archive, classifier, output, run_id="first")
    letters = dead_letters(output)
    assert [(row["shard"], row["row"]) for row in letters] == [("broken.parquet", None)]
    assert "not a readable Parquet file" in letters[0]["error"]

    accept = str(caught.value).partition("limits.accept = ")[2].partition("]")[0] + "]"
    run_score(archive, classifier, output, f"limits.accept={accept}", run_id="second")
    run_score(archive, classifier, output, f"limits.accept={accept}", run_id="third")
    assert shards_seen(output) == {"one.parquet": 20}

    fakes.write_archive(archive, {"broken.parquet": texts_table(7, 400)})
    run_score(archive, classifier, output, KEEP_NOTHING, run_id="fourth")
    assert shards_seen(output) == {"one.parquet": 20, "broken.parquet": 7}


def test_bad_rows_of_a_shard_can_be_accepted_by_its_identity(tmp_path: Path, classifier: str) -> None:
    archive, output = str(tmp_path / "archive"), str(tmp_path / "scores")
    rows = pa.table({"text": ["good", None, None]})
    fakes.write_archive(archive, {"one.parquet": texts_table(20), "nulls.parquet": rows})
    with pytest.raises(OverLimitError, match=r"most: 2 in nulls\.parquet") as caught:
        run_score(archive, classifier, output, run_id="first")
    accept = str(caught.value).partition("limits.accept = ")[2].partition("]")[0] + "]"
    run_score(archive, classifier, output, f"limits.accept={accept}", run_id="second")
    assert shards_seen(output) == {"one.parquet": 20, "nulls.parquet": 3}
    assert [row["row"] for row in dead_letters(output)] == [1, 2]


def test_counts_of_objects_that_no_record_holds_come_from_their_footers(s3: LoopbackS3, classifier: str) -> None:
    archive, output = f"{s3.bucket()}/archive", f"{s3.bucket()}/scores"
    fakes.write_archive(archive, {"one.parquet": texts_table(50), "two.parquet": pa.table({"text": ["a", None]})})
    limits = "limits.max_bad_rows=5"
    run_score(archive, classifier, output, limits, run_id="first")
    expected = manifest_of(output).drop_columns(["run"])
    store = open_store(output)
    forget(store)
    before = len(s3.requests())
    run_score(archive, classifier, output, limits, run_id="second")
    assert not [path for method, path, _ in s3.requests()[before:] if method == "PUT" and "-of-" in path]
    assert manifest_of(output).drop_columns(["run"]).equals(expected)


def forget(store: Store) -> None:
    """Remove every record of earlier runs; only the objects stay."""
    for path in store.list()["path"].to_pylist():
        if "/_runs/" in path or path == "_published.json":
            store.delete(path)


def test_dead_letters_are_scored_again_once_their_cause_is_mended(tmp_path: Path, classifier: str) -> None:
    """Here the cause was the wrong column."""
    archive, output, again = str(tmp_path / "archive"), str(tmp_path / "scores"), str(tmp_path / "again")
    table = texts_table(60)
    holes = [None if row % 7 == 3 else text for row, text in enumerate(table["text"].to_pylist())]
    table = table.append_column("draft", pa.array(holes))
    fakes.write_archive(
        archive, {"one.parquet": table, "two.parquet": texts_table(9).append_column("draft", texts_table(9)["text"])}
    )
    run_score(archive, classifier, output, "input.text_column=draft", "limits.max_bad_rows=50", run_id="first")
    bad = [(row["shard"], row["row"]) for row in dead_letters(output)]
    assert len(bad) == 9
    version = read_json(open_store(output), "_published.json")["version"]
    rows = f"input.rows={output}/{version}/_dead_letter"
    with pytest.raises(UsageError, match=r"input\.key_columns = \[\]"):
        run_score(archive, classifier, again, rows, 'input.key_columns=["id"]')
    run_score(archive, classifier, again, rows, run_id="again")
    found = read_predictions(again)
    assert [(row["shard"], row["row"]) for row in found.to_pylist()] == bad
    assert found["error"].null_count == 9
    run_score(archive, classifier, str(tmp_path / "whole"), run_id="whole")
    whole = {(row["shard"], row["row"]): row for row in read_predictions(str(tmp_path / "whole")).to_pylist()}
    assert [row["label"] for row in found.to_pylist()] == [whole[key]["label"] for key in bad]
    run_score(archive, classifier, again, rows, run_id="nothing")
    assert read_json(open_store(again), "_published.json")["run"] == "again"

    fakes.write_archive(archive, {"one.parquet": texts_table(30)})
    with pytest.raises(UsageError, match="9 are of shards that have changed since"):
        run_score(archive, classifier, again, rows, run_id="late")
