"""A shifted archive through the real pipeline: what is alike is published, what is not ends with 3, and readers keep the old run."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.demo_store import LoopbackS3
from lib.errors import OverLimitError, UsageError
from lib.storage import Store, open_store
from tests import fakes
from tests.integration.test_scoring import read_json, read_predictions, run_score, texts_table

pytestmark = pytest.mark.usefixtures("ray_session")

LIMIT = "drift.max_psi=0.5"


def record_of(output: Store, run: str) -> Any:
    (path,) = [path for path in output.list()["path"].to_pylist() if path.endswith(f"/_runs/{run}/run.json")]
    return read_json(output, path)


def test_a_shift_keeps_readers_at_the_old_run_until_it_is_accepted(
    s3: LoopbackS3, classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, url = f"{s3.bucket()}/archive", f"{s3.bucket()}/scores"
    output = open_store(url)

    def published() -> str:
        return str(read_json(output, "_published.json")["run"])

    fakes.write_archive(archive, {"monday.parquet": texts_table(300)})
    run_score(archive, classifier, url, LIMIT, run_id="monday")
    assert "drift: not judged: no run of this version is published yet" in capsys.readouterr().out

    # The same texts again: exactly the same distribution.
    fakes.write_archive(archive, {"tuesday.parquet": texts_table(300, 500)})
    run_score(archive, classifier, url, LIMIT, run_id="tuesday")
    record = record_of(output, "tuesday")
    assert record["drift"]["baseline"] == "monday"
    assert [shift["psi"] for shift in record["drift"]["shifts"]] == [0, 0, 0, 0]
    assert published() == "tuesday"

    fakes.write_archive(archive, {"wednesday.parquet": pa.table({"id": range(200), "text": ["no no no"] * 200})})
    with pytest.raises(
        OverLimitError, match=r"not distributed as in run tuesday: .*text lengths: .*drift\.max_psi = 0\.5"
    ):
        run_score(archive, classifier, url, LIMIT, run_id="wednesday")
    assert published() == "tuesday"
    assert read_predictions(url).num_rows == 600
    record = record_of(output, "wednesday")
    assert (record["exit_code"], record["published"], record["this_run"]["rows"]) == (3, False, 200)
    lengths = next(shift for shift in record["drift"]["shifts"] if shift["name"] == "text lengths")
    assert lengths["most_now"] == 1

    # All work is done, so the same command scores nothing: what it found is judged all the same.
    with pytest.raises(OverLimitError, match="not distributed as in run tuesday"):
        run_score(archive, classifier, url, LIMIT, run_id="again")
    again = record_of(output, "again")
    assert again["this_run"]["rows"] == 0
    assert again["new_rows"] == record["new_rows"]
    assert again["drift"]["shifts"] == record["drift"]["shifts"]
    assert published() == "tuesday"

    with pytest.raises(UsageError, match=r"drift\.baseline wednesdy: .*did you mean 'wednesday'"):
        run_score(archive, classifier, url, LIMIT, "drift.baseline=wednesdy")
    with pytest.raises(UsageError, match="no such file"):
        run_score(archive, classifier, url, LIMIT, f"drift.baseline={tmp_path}/none.json")
    (tmp_path / "else.json").write_text(json.dumps({"run_id": "x"}))
    with pytest.raises(UsageError, match=r"not the run\.json of a scoring run"):
        run_score(archive, classifier, url, LIMIT, f"drift.baseline={tmp_path}/else.json")

    run_score(archive, classifier, url, LIMIT, "drift.baseline=wednesday", run_id="accepted")
    assert published() == "accepted"
    assert read_predictions(url).num_rows == 800
    page = (
        output.at(read_json(output, "_published.json")["version"]).read("_runs/wednesday/report.html") or b""
    ).decode()
    assert '<td class="bad">large</td>' in page
    assert "Label mix, beside earlier runs" in page
    assert "no no no" not in page, "rows are named, not quoted"
