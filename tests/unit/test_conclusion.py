"""How a run ends: what it is compared with, what keeps it from being published, and what is left of it if something fails then."""

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lib import report
from lib.errors import IncompleteError, OverLimitError
from lib.history import COUNTS_KEY
from lib.publishing import write_table
from lib.storage import Store, open_store
from lib.versions import read_json, roll_back
from tests.stand_in import add, prepared, published, run_night

LIMIT = {"max_psi": 0.5}


def mixed(rows: int) -> list[str]:
    """Texts of all three labels."""
    return [("down", "same", "up")[row % 3] for row in range(rows)]


def test_a_refused_run_is_refused_again_under_its_own_id(tmp_path: Path, classifier: str) -> None:
    """An orchestrator runs the same command again: its run.json then holds what was refused, not what was published."""
    add(tmp_path, "a.parquet", *mixed(300))
    run_night(tmp_path, classifier, "x", drift=LIMIT)
    assert published(tmp_path) == "x"
    add(tmp_path, "b.parquet", *["down"] * 300)
    for _ in range(2):
        with pytest.raises(OverLimitError, match="not distributed as in run x: labels: "):
            run_night(tmp_path, classifier, "x", drift=LIMIT)
    found = open_store(f"{tmp_path}/scores")
    manifest = found.read(f"{prepared(tmp_path, classifier, 'x').job.version}/_runs/x/manifest.parquet") or b""
    assert pq.read_metadata(io.BytesIO(manifest)).num_rows == 1
    run_night(tmp_path, classifier, "y", drift=LIMIT | {"baseline": "x"})
    assert published(tmp_path) == "y", "accepted"


def test_runs_without_new_rows_hand_on_what_they_were_compared_with(
    tmp_path: Path, classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add(tmp_path, "a.parquet", *mixed(300))
    add(tmp_path, "b.parquet", *mixed(60))
    run_night(tmp_path, classifier, "x", drift=LIMIT)
    assert "drift: not judged: no run of this version is published yet" in capsys.readouterr().out
    removing = {"input": {"path": f"{tmp_path}/archive", "deleted": "remove"}}
    (tmp_path / "archive/b.parquet").unlink()
    run_night(tmp_path, classifier, "removed", drift=LIMIT, **removing)
    assert published(tmp_path) == "removed"
    add(tmp_path, "c.parquet", *["down"] * 300)
    with pytest.raises(OverLimitError, match="not distributed as in run x: labels: "):
        run_night(tmp_path, classifier, "y", drift=LIMIT, **removing)
    run_night(tmp_path, classifier, "y", drift={"baseline": "y", **LIMIT}, **removing)
    # Rolled back, and planned again: what was accepted is compared with the run that readers see now.
    roll_back(open_store(f"{tmp_path}/scores"), "removed", None, single_writer=False)
    assert prepared(tmp_path, classifier, "z", **removing).baseline.name == "x"
    with pytest.raises(OverLimitError, match="not distributed as in run x: "):
        run_night(tmp_path, classifier, "z", drift=LIMIT, **removing)


def test_an_old_manifest_is_judged_by_what_run_json_says_or_not_published(
    tmp_path: Path, classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add(tmp_path, "a.parquet", *mixed(300))
    run_night(tmp_path, classifier, "x")
    run = prepared(tmp_path, classifier, "x").job.output.at("_runs/x")
    manifest = pq.read_table(io.BytesIO(run.read("manifest.parquet") or b""))
    assert COUNTS_KEY in manifest.schema.metadata
    write_table(run, "manifest.parquet", manifest.replace_schema_metadata(None))
    assert prepared(tmp_path, classifier, "y").baseline.name == "x"
    assert "keeps no counts, it is an old one; those in run.json of x are taken" in capsys.readouterr().err
    run.delete("run.json")
    add(tmp_path, "b.parquet", *mixed(60))
    with pytest.raises(OverLimitError, match=r"cannot be compared: .* keeps no counts, and no run\.json"):
        run_night(tmp_path, classifier, "y", drift=LIMIT)
    assert published(tmp_path) == "x"
    run_night(tmp_path, classifier, "z")
    assert published(tmp_path) == "z"


def test_a_run_has_its_record_though_earlier_ones_cannot_be_read(
    tmp_path: Path, classifier: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(version: Store, but: str) -> None:
        assert read_json(version.at(f"_runs/{but}"), "run.json")["published"]
        raise IncompleteError("storage failed to list: 503 SlowDown")

    monkeypatch.setattr(report, "recent_runs", fail)
    add(tmp_path, "a.parquet", *mixed(30))
    run_night(tmp_path, classifier, "x")
    run = prepared(tmp_path, classifier, "x").job.output.at("_runs/x")
    assert {"run.json", "config.json", "report.html"} <= set(run.list()["path"].to_pylist())
    assert "WARNING: the report shows no earlier runs, they cannot be read: storage failed" in capsys.readouterr().err
