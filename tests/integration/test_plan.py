"""`jobs.plan` says what the next `jobs.score` plans, from little reading, writes nothing, and knows how fast it will be."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from jobs import plan
from jobs.demo_store import LoopbackS3
from lib import checkpoint
from lib.archive import WatchedFile
from lib.sampling import STEP_BYTES, Window, sample_shard
from lib.storage import open_store
from tests import fakes
from tests.integration.test_budget import record_of
from tests.integration.test_growth import objects
from tests.integration.test_scoring import prepared, run_score, texts_table, writes

pytestmark = pytest.mark.usefixtures("ray_session")

SCORE = ("planning.chunk_mb=0.02", "model.precision=fp32", "model.engine=torch")
"""What `run_score` sets, and the engine that starts fastest."""

NO_MEASURING = "forecast.measure_seconds=0"


def run_plan(
    capsys: pytest.CaptureFixture[str], archive: str, model: str, output: str, *settings: str
) -> dict[str, Any]:
    """Run the job as its command line would; returns what --json prints."""
    values = [f"input.path={archive}", f"model.path={model}", f"output.path={output}", *SCORE, *settings]
    capsys.readouterr()
    plan.main([*(word for value in values for word in ("--set", value)), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def read_object(output: str, path: str) -> pa.Table:
    """A predictions object."""
    return pq.read_table(io.BytesIO(open_store(output).read(path) or b""))


def test_a_plan_is_what_the_next_run_plans_whatever_is_there_already(
    s3: LoopbackS3, classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, output = f"{s3.bucket()}/archive", f"{s3.bucket()}/scores"
    limits = ("model.engine=torch", "limits.max_bad_shards=5", "limits.max_bad_rows=5")
    shards = {f"{name}.parquet": texts_table(100, 100 * number) for number, name in enumerate("abd")}
    shards["c.parquet"] = texts_table(600)
    fakes.write_archive(archive, shards, row_group_size=20)
    run_score(archive, classifier, output, *limits, run_id="first")

    fakes.write_archive(archive, {"b.parquet": texts_table(70, 500)}, row_group_size=10)
    added = {"new.parquet": pa.table({"text": ["one", None, "two"]}), "empty.parquet": texts_table(0)}
    fakes.write_archive(archive, {**added, "bad.parquet": b"PAR1 no Parquet PAR1"})
    open_store(archive).delete("d.parquet")
    of_c = [path for path in objects(output) if "/c.parquet-" in path]
    open_store(output).delete_all(random.Random(0).sample(of_c, len(of_c) // 2))
    before, kept = len(s3.requests()), set(objects(output))
    found = run_plan(capsys, archive, classifier, output, *limits, "forecast.cpu_hour=1", NO_MEASURING)
    assert writes(s3.requests()[before:]) == [], "a plan writes nothing"

    run_score(archive, classifier, output, *limits, run_id="second")
    record = record_of(output, "second")["this_run"]
    assert (found["chunks_planned"], found["rows_planned"]) == (record["chunks_planned"], record["rows_planned"])
    assert record["chunks_finished"] == record["chunks_planned"]
    written = sorted(set(objects(output)) - kept)
    assert found["chunks"] == len([path for path in written if "/empty.parquet" not in path])
    tables = [read_object(output, path) for path in written]
    assert found["rows"] == sum(table.num_rows for table in tables)
    tokens = sum(sum(filter(None, table["num_tokens"].to_pylist())) for table in tables)
    assert found["tokens"] == {"value": tokens, "low": tokens, "high": tokens}, "so few rows are all read"
    assert found["sampled_errors"] == 1
    assert set(found["bad_shards"]) == {"bad.parquet"}
    assert found["shards"] == {
        "all": 6, "finished": 1, "to_do": 5, "new": 3, "changed": 1, "begun": 1, "deleted": 1, "bad": 1,
    }  # fmt: skip
    assert " of this version" in found["speed"]["source"]
    assert found["cost"]["value"] == pytest.approx(found["seconds"]["value"] * 4 / 3_600, abs=0.02)


def test_tokens_of_a_skewed_archive_are_estimated_from_little_reading(
    s3: LoopbackS3, classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two shards hold nine tenths of the rows and more of the tokens; plain transformers says how many there are."""
    chance, words = np.random.default_rng(0), fakes.PROSE.split()

    def texts(count: int, mean: float) -> list[str]:
        sizes = np.maximum(1, mean * chance.lognormal(0, 0.6, count)).astype(int)
        return [" ".join(chance.choice(words, size)) for size in sizes]

    shards = {f"short-{number:02d}.parquet": texts(60, 3) for number in range(30)}
    shards |= {f"long-{number}.parquet": texts(8_000, 15) for number in range(2)}
    archive, output = f"{s3.bucket()}/archive", f"{s3.bucket()}/scores"
    fakes.write_archive(
        archive, {name: pa.table({"text": found}) for name, found in shards.items()}, row_group_size=500
    )
    before = len(s3.requests())
    given = ("forecast.gpus=32", "forecast.gpu_hour=3.5", "forecast.tokens_per_second=1000", "limits.budget=0.5")
    found = run_plan(capsys, archive, classifier, output, *given)
    requests = s3.requests()[before:]

    tokenizer = AutoTokenizer.from_pretrained(classifier)
    every = [text for some in shards.values() for text in some]
    truth = sum(map(len, tokenizer(every, truncation=True, max_length=fakes.MAX_TOKENS)["input_ids"]))
    tokens = found["tokens"]
    assert tokens["value"] == pytest.approx(truth, rel=0.15)
    assert tokens["low"] <= truth <= tokens["high"]
    assert tokens["high"] <= 1.3 * tokens["low"]
    assert found["rows"] == len(every)
    assert 900 <= found["sampled_rows"] <= 1_024
    assert writes(requests) == []
    of_shards = [method for method, path, _ in requests if "/archive/" in path and path.endswith(".parquet")]
    assert of_shards.count("GET") <= 1 + 32 + 32 + 62, "the columns; footers of the plan and of the sample; row groups"
    assert of_shards.count("HEAD") <= 1 + 32 + 32
    assert found["cluster"] == {"nodes": 4, "cpus": 256, "gpus": 32, "actors": 32}
    assert found["speed"] == {"actor_tokens_per_second": 1_000, "source": "forecast.tokens_per_second", "device": None}
    assert found["cost"]["value"] == pytest.approx(found["seconds"]["value"] * 32 * 3.5 / 3_600, abs=0.02)


def test_of_a_large_row_group_few_pages_are_read(
    tmp_path: Path, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = np.random.default_rng(0)
    texts = ["".join(map(chr, row)) for row in chance.integers(97, 123, (12_000, 1_000))]
    fakes.write_archive(str(tmp_path / "archive"), {"one.parquet": pa.table({"text": texts, "other": texts})})
    run = prepared(str(tmp_path / "archive"), classifier, str(tmp_path / "scores"))
    read = []
    before = WatchedFile.read

    def counted(file: WatchedFile, size: int = -1) -> bytes:
        found = before(file, size)
        read.append(len(found))
        return found

    monkeypatch.setattr(WatchedFile, "read", counted)
    tokenizer = checkpoint.tokenizer_of(checkpoint.load(classifier))
    content = run.shards["identity"][0].as_py()
    windows = [Window(0, 50, 8), Window(1, 11_000, 8)]
    sampled = sample_shard(run.job, "one.parquet", content, windows, tokenizer, whole=False)
    assert [(number, rows, errors) for number, rows, _, errors in sampled.counts] == [(0, 8, 0), (1, 8, 0)]
    expected = AutoTokenizer.from_pretrained(classifier)(texts[50:58], truncation=True, max_length=fakes.MAX_TOKENS)
    assert sampled.counts[0][2] == sum(map(len, expected["input_ids"]))
    assert sum(read) < 6 * STEP_BYTES, "of 12 MB of text, and as much in the other column"
    assert sample_shard(run.job, "one.parquet", "0" * 12, windows, tokenizer, whole=False).counts == ()


def test_how_fast_it_will_be_comes_from_the_same_model_or_is_measured_or_is_asked_for(
    tmp_path: Path, classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, output = str(tmp_path / "archive"), str(tmp_path / "scores")
    fakes.write_archive(archive, {"one.parquet": texts_table(60)})
    measured = run_plan(capsys, archive, classifier, output, "forecast.measure_seconds=0.2")
    assert measured["speed"]["source"].startswith("measured here for")
    assert measured["speed"]["actor_tokens_per_second"] > 0
    assert measured["seconds"]["value"] > 0
    assert not Path(output).exists(), "a plan writes nothing"

    unknown = run_plan(capsys, archive, classifier, output, "forecast.gpus=8")
    assert (unknown["seconds"], unknown["speed"], unknown["rows"]) == (None, None, 60)
    assert "set forecast.tokens_per_second to the tokens a second of one GPU" in unknown["problem"]

    run_score(archive, classifier, output, "model.engine=torch", run_id="first")
    other = run_plan(capsys, archive, classifier, output, "output.prefix=pred_", NO_MEASURING)
    assert other["speed"]["source"].startswith("run first of another version of this model")
    fp32 = run_plan(capsys, archive, classifier, output, "model.precision=auto", NO_MEASURING)
    assert fp32["speed"] is None, "computed in another way"
    done = run_plan(capsys, archive, classifier, output, NO_MEASURING)
    assert (done["is_published"], done["rows"], done["shards"]["finished"]) == (True, 0, 1)

    capsys.readouterr()
    settings = [
        f"input.path={archive}",
        f"model.path={classifier}",
        f"output.path={output}",
        "output.prefix=x_",
        *SCORE,
    ]
    plan.main([word for one in (*settings, "forecast.node_hour=36") for word in ("--set", one)])
    text = capsys.readouterr().out
    assert "1 shards: 0 finished, 1 to do (1 new, 0 changed, 0 begun; 0 of them bad), 0 deleted" in text
    assert "to score: 60 rows in" in text
    assert "tokens/s an actor: run first of another version of this model, whose actors worked for" in text
    assert "time on 1 nodes, 4 CPUs, 0 GPUs, 1 actors: " in text
    assert "cost: " in text
