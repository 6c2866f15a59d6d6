"""`jobs.score` on a real S3 server and a real Ray: every row there, in order, once; a second run does nothing; bad data costs only itself."""

import dataclasses
import gc
import io
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import time_machine
import torch
from ray.exceptions import RayTaskError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from jobs import score
from jobs.demo_store import LoopbackS3
from lib import checkpoint, pipeline, tasks
from lib.config import validate
from lib.errors import IncompleteError, OverLimitError, StoppedError, UsageError
from lib.outcome import Outcome
from lib.planning import Chunk
from lib.progress import read_progress, start_progress
from lib.runtime import Cluster, Node, plan_layout
from lib.schema import Head, Task
from lib.score_config import ScoreConfig, ScoreResources
from lib.scoring import Run, prepare
from lib.storage import Store, open_store
from lib.versions import list_runs
from lib.watch import Running, Watch
from lib.windows import Windows
from tests import fakes
from tests.integration.test_equality import real_texts, score_singly
from tests.unit.test_embedding import vectors_singly
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("ray_session")


def run_score(archive: str, model: str, output: str, *settings: str, run_id: str = "run") -> None:
    """Run the job as its command line would."""
    values = [
        f"input.path={archive}",
        f"model.path={model}",
        f"output.path={output}",
        "planning.chunk_mb=0.02",
        "model.precision=fp32",
        *settings,
    ]
    score.main([*(word for value in values for word in ("--set", value)), "--run-id", run_id])


def read_json(store: Store, path: str) -> Any:
    raw = store.read(path)
    assert raw is not None, f"{store.url}/{path} is missing"
    return json.loads(raw)


def read_predictions(output: str) -> pa.Table:
    """What a reader sees: the objects that the pointer's manifest names, in its order."""
    store = open_store(output)
    manifest = pq.read_table(io.BytesIO(store.read(read_json(store, "_published.json")["manifest"]) or b""))
    tables = []
    for row in manifest.to_pylist():
        table = pq.read_table(io.BytesIO(store.read(row["path"]) or b""), page_checksum_verification=True)
        assert table.num_rows == row["rows"]
        tables.append(table.replace_schema_metadata())
    return pa.concat_tables(tables)


def writes(requests: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    return [request for request in requests if request[0] in ("PUT", "POST", "DELETE")]


def texts_table(count: int, offset: int = 0) -> pa.Table:
    texts = real_texts(500)
    return pa.table(
        {"id": range(offset, offset + count), "text": [texts[(offset + index) % 500] for index in range(count)]}
    )


def test_every_row_is_scored_once_in_order_and_like_transformers(s3: LoopbackS3, classifier: str) -> None:
    archive, output = f"{s3.bucket()}/archive", f"{s3.bucket()}/scores"
    shards = {
        "a/one.parquet": texts_table(400),
        "b-1-of-2.parquet": texts_table(150, 400),
        "c/two words.parquet": texts_table(30, 550),
    }
    fakes.write_archive(archive, shards, row_group_size=60)
    before = len(s3.requests())
    run_score(archive, classifier, output, "output.probabilities=true")
    requests = s3.requests()[before:]

    found = read_predictions(output).to_pandas()
    assert found.columns.tolist() == [
        "shard",
        "row",
        "label",
        "score",
        "probabilities",
        "num_tokens",
        "truncated",
        "error",
    ]
    assert found["error"].isna().all()
    model = checkpoint.load(classifier)
    for name, table in shards.items():
        mine = found[found["shard"] == name]
        assert mine["row"].tolist() == list(range(table.num_rows))
        expected = score_singly(classifier, table["text"].to_pylist(), model.card.max_length)
        assert np.abs(np.stack(mine["probabilities"].to_list()) - expected).max() <= 1e-5
        assert mine["label"].tolist() == [model.card.labels[best] for best in expected.argmax(axis=1)]
        assert np.abs(mine["score"] - expected.max(axis=1)).max() <= 1e-5

    version = read_json(open_store(output), "_published.json")["version"]
    run = open_store(output).at(f"{version}/_runs/run")
    record = read_json(run, "run.json")
    assert (record["exit_code"], record["this_run"]["rows"], record["published"]) == (0, 580, True)
    assert sum(record["this_run"]["labels"].values()) == 580
    assert read_json(run, "_SUCCESS")["manifest"] == f"{version}/_runs/run/manifest.parquet"
    assert b"<svg" in (run.read("report.html") or b"")

    paths = [(method, unquote(path.partition("?")[0])) for method, path, _ in requests]
    of_shard = Counter(method for method, path in paths if path.endswith("/archive/a/one.parquet"))
    objects = [method for method, path in paths if "/a/one.parquet-" in path and "-of-" in path]
    groups, chunks = 7, objects.count("PUT")
    assert 1 < chunks <= groups
    assert of_shard["GET"] <= 2 + chunks + groups, (
        "a footer for the columns, one for the plan, one a chunk, and its row groups"
    )
    assert of_shard["HEAD"] <= 2 + chunks
    assert len(objects) == 2 * chunks, "each object is looked for once, and written once"


def test_the_same_command_again_writes_nothing_and_a_new_shard_is_all_that_is_scored(
    s3: LoopbackS3, classifier: str
) -> None:
    archive, output = f"{s3.bucket()}/archive", f"{s3.bucket()}/scores"
    fakes.write_archive(archive, {"one.parquet": texts_table(90), "two.parquet": texts_table(80, 90)})
    run_score(archive, classifier, output, run_id="first")
    before = len(s3.requests())
    run_score(archive, classifier, output, run_id="second")
    assert writes(s3.requests()[before:]) == []

    fakes.write_archive(archive, {"three.parquet": texts_table(70, 170)})
    before = len(s3.requests())
    run_score(archive, classifier, output, run_id="third")
    requests = s3.requests()[before:]
    assert [path for method, path, _ in requests if method == "GET" and "two.parquet" in path] == []
    objects = [path for method, path, _ in writes(requests) if method == "PUT" and "-of-" in path]
    assert len(objects) > 0
    assert all("three.parquet" in path for path in objects)
    assert read_predictions(output).num_rows == 240


def test_a_changed_shard_is_scored_again(s3: LoopbackS3, classifier: str) -> None:
    archive, output = f"{s3.bucket()}/archive", f"{s3.bucket()}/scores"
    fakes.write_archive(archive, {"one.parquet": texts_table(50), "two.parquet": texts_table(40, 50)})
    run_score(archive, classifier, output, run_id="first")
    fakes.write_archive(archive, {"one.parquet": texts_table(60, 200)})
    run_score(archive, classifier, output, run_id="second")
    found = read_predictions(output).to_pandas()
    assert found.groupby("shard").size().to_dict() == {"one.parquet": 60, "two.parquet": 40}


def test_bad_rows_and_shards_cost_only_themselves(any_url: str, classifier: str) -> None:
    archive, output = f"{any_url}/archive", f"{any_url}/scores"
    texts = ["good one", None, "", " \n\t", "good two"]
    broken = pa.array([b"fine", b"\xff\xfe", b"\xed\xa0\x80"], pa.binary())
    shards = {
        "rows.parquet": pa.table({"key": ["a", "b", "c", "d", "e"], "text": texts}),
        "bytes.parquet": pa.table({"key": pa.array(["f", "g", "h"]).dictionary_encode(), "text": broken}),
        "nulls.parquet": pa.table({"key": ["i"], "text": pa.nulls(1)}),
        "empty.parquet": pa.table({"key": pa.array([], pa.string()), "text": pa.array([], pa.string())}),
        "broken.parquet": b"PAR1 this is not Parquet PAR1",
        "other.parquet": pa.table({"key": ["j"], "txt": ["no such column"]}),
    }
    fakes.write_archive(archive, shards)
    settings = ('input.key_columns=["key"]', "limits.max_bad_rows=6", "limits.max_bad_shards=2")
    run_score(archive, classifier, output, *settings)
    found = read_predictions(output)
    by_key = {row["key"]: row["error"] for row in found.to_pylist()}
    assert by_key == {
        "a": None, "b": "null", "c": "empty", "d": "empty", "e": None, "f": None, "g": "undecodable", "h": "undecodable", "i": "null",
    }  # fmt: skip
    assert [row["label"] is None for row in found.to_pylist()] == [
        row["error"] is not None for row in found.to_pylist()
    ]
    store = open_store(output)
    version = read_json(store, "_published.json")["version"]
    record = read_json(store, f"{version}/_runs/run/run.json")
    assert set(record["bad_shards"]) == {"broken.parquet", "other.parquet"}
    assert "'txt'" in record["bad_shards"]["other.parquet"] or "txt" in record["bad_shards"]["other.parquet"]
    letters = store.list(f"{version}/_dead_letter")["path"].to_pylist()
    rows = pa.concat_tables([pq.read_table(io.BytesIO(store.read(path) or b"")) for path in letters]).to_pylist()
    assert {(row["shard"], row["error"]) for row in rows if row["row"] is None} == set(record["bad_shards"].items())
    assert {(row["shard"], row["row"], row["error"]) for row in rows if row["row"] is not None} == {
        ("rows.parquet", 1, "null"), ("rows.parquet", 2, "empty"), ("rows.parquet", 3, "empty"),
        ("bytes.parquet", 1, "undecodable"), ("bytes.parquet", 2, "undecodable"), ("nulls.parquet", 0, "null"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "what"),
    [("limits.max_bad_rows=1", "2 of 4 new rows"), ("limits.max_bad_shards=0", "1 of 2 new shards")],
)
def test_over_a_limit_everything_is_finished_but_nothing_published(
    setting: str, what: str, tmp_path: Path, classifier: str
) -> None:
    archive, output = str(tmp_path / "archive"), str(tmp_path / "scores")
    fakes.write_archive(
        archive, {"rows.parquet": pa.table({"text": ["a", None, "", "b"]}), "broken.parquet": b"nothing"}
    )
    limits = ["limits.max_bad_rows=9", "limits.max_bad_shards=9", setting]
    with pytest.raises(OverLimitError, match=what):
        run_score(archive, classifier, output, *limits)
    store = open_store(output)
    assert store.read("_published.json") is None
    records = [path for path in store.list()["path"].to_pylist() if path.endswith("run.json")]
    assert read_json(store, records[0])["exit_code"] == 3
    assert not [path for path in store.list()["path"].to_pylist() if path.endswith("_SUCCESS")]
    run_score(archive, classifier, output, "limits.max_bad_rows=9", "limits.max_bad_shards=9", run_id="again")
    assert read_predictions(output).num_rows == 4


def test_multi_label_regression_and_pairs(tmp_path: Path) -> None:
    pairs = pa.table({"text": ["the harbour", "the market"], "second": ["was quiet", "is loud"]})
    fakes.write_archive(str(tmp_path / "archive"), {"one.parquet": pairs})
    fakes.make_classifier(tmp_path / "multi", "bert", ("joy", "anger", "fear"), "multi_label_classification")
    run_score(str(tmp_path / "archive"), str(tmp_path / "multi"), str(tmp_path / "out1"), "output.prefix=pred_")
    found = read_predictions(str(tmp_path / "out1")).to_pylist()
    assert all(
        len(row["pred_labels"]) == len(row["pred_scores"]) and all(value >= 0.5 for value in row["pred_scores"])
        for row in found
    )
    assert any(row["pred_labels"] for row in found)

    fakes.make_classifier(tmp_path / "one", "bert", ("value",))
    run_score(
        str(tmp_path / "archive"), str(tmp_path / "one"), str(tmp_path / "out2"), 'input.text_column=["text", "second"]'
    )
    predictions = read_predictions(str(tmp_path / "out2"))
    assert checkpoint.load(str(tmp_path / "one")).facts.task is Task.REGRESSION
    assert predictions.column_names == ["shard", "row", "score", "num_tokens", "truncated", "error"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one").eval()
    with torch.inference_mode():
        expected = [
            float(model(**tokenizer(row["text"], row["second"], return_tensors="pt")).logits)
            for row in pairs.to_pylist()
        ]
    assert predictions["score"].to_pylist() == pytest.approx(expected, abs=1e-5)


def write_card(folder: Path, **fields: Any) -> None:
    """Give a checkpoint the card of one that was trained here."""
    files = {name: checkpoint.digest_of(folder / name) for name in checkpoint.deciding_files(str(folder))}
    (folder / checkpoint.CARD_NAME).write_text(checkpoint.Card(files=files, **fields).model_dump_json())


def test_the_checkpoints_card_says_how_texts_are_cut_and_labels_are_given(tmp_path: Path) -> None:
    """Head and tail of long texts, a temperature, and a threshold for each label, against plain transformers."""
    texts = [" ".join(fakes.PROSE.split()[start : start + size]) for start, size in enumerate((3, 9, 40, 60, 15, 50))]
    fakes.write_archive(str(tmp_path / "archive"), {"one.parquet": pa.table({"text": texts, "second": texts})})
    labels, thresholds = ("joy", "anger", "fear"), (0.45, 0.55, 0.5)
    fakes.make_classifier(tmp_path / "model", "bert", labels, "multi_label_classification")
    decided = {"truncation": "head_tail", "temperature": 3.0, "thresholds": thresholds}
    write_card(tmp_path / "model", labels=labels, task=Task.MULTI_LABEL, max_length=16, **decided)
    run_score(str(tmp_path / "archive"), str(tmp_path / "model"), str(tmp_path / "out"), "output.probabilities=true")
    found = read_predictions(str(tmp_path / "out")).to_pylist()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    for row, text in zip(found, texts, strict=True):
        ids = tokenizer(text, verbose=False)["input_ids"]
        kept = ids if len(ids) <= 16 else [*ids[:5], *ids[-11:]]
        assert (row["num_tokens"], row["truncated"]) == (len(kept), len(ids) > 16)
        with torch.inference_mode():
            expected = (model(torch.tensor([kept])).logits[0] / 3).sigmoid().tolist()
        assert row["probabilities"] == pytest.approx(expected, abs=1e-5)
        given = [label for label, one, limit in zip(labels, expected, thresholds, strict=True) if one >= limit]
        assert row["labels"] == given
    assert any(row["truncated"] for row in found)

    pairs = 'input.text_column=["text", "second"]'
    with pytest.raises(
        UsageError, match=r"names two columns, but model\.path was trained to keep the head and the tail"
    ):
        run_score(str(tmp_path / "archive"), str(tmp_path / "model"), str(tmp_path / "other"), pairs)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_long_texts_are_scored_in_windows_if_the_card_says_so(tmp_path: Path, pooling: Literal["mean", "max"]) -> None:
    """Against transformers' own windows, each scored alone."""
    texts = [" ".join(fakes.PROSE.split()[start : start + size]) for start, size in enumerate((3, 9, 40, 60, 15, 200))]
    fakes.write_archive(str(tmp_path / "archive"), {"one.parquet": pa.table({"text": texts, "second": texts})})
    fakes.make_classifier(tmp_path / "model", "bert", ("good", "bad"))
    windows = Windows(stride=4, most=8, pooling=pooling)
    write_card(tmp_path / "model", labels=("good", "bad"), task=Task.MULTI_CLASS, max_length=16, windows=windows)
    run_score(str(tmp_path / "archive"), str(tmp_path / "model"), str(tmp_path / "out"), "output.probabilities=true")
    found = read_predictions(str(tmp_path / "out")).to_pylist()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    for row, text in zip(found, texts, strict=True):
        every = tokenizer(text, truncation=True, max_length=16, stride=4, return_overflowing_tokens=True)["input_ids"]
        assert (row["num_tokens"], row["truncated"]) == (sum(map(len, every[:8])), len(every) > 8)
        with torch.inference_mode():
            logits = torch.cat([model(torch.tensor([ids])).logits for ids in every[:8]])
        pooled = logits.mean(0) if pooling == "mean" else logits.amax(0)
        assert row["probabilities"] == pytest.approx(pooled.softmax(0).tolist(), abs=1e-5)
    assert any(row["truncated"] for row in found)
    assert any(row["num_tokens"] > 16 and not row["truncated"] for row in found)

    with pytest.raises(UsageError, match=r"names two columns, but model\.path was trained on windows of single texts"):
        run_score(
            str(tmp_path / "archive"),
            str(tmp_path / "model"),
            str(tmp_path / "other"),
            'input.text_column=["text", "second"]',
        )


def test_a_model_that_may_abstain_leaves_out_labels_it_is_unsure_of_and_says_how_many(tmp_path: Path) -> None:
    table = texts_table(60)
    fakes.write_archive(
        str(tmp_path / "archive"),
        {"one.parquet": table.set_column(1, "text", [[None, *table["text"].to_pylist()[1:]]])},
    )
    fakes.make_classifier(tmp_path / "model", "bert", ("good", "bad"))
    run_score(str(tmp_path / "archive"), str(tmp_path / "model"), str(tmp_path / "sure"), "limits.max_bad_rows=1")
    sure = read_predictions(str(tmp_path / "sure")).to_pandas()
    limit = sure["score"].median()
    write_card(
        tmp_path / "model", labels=("good", "bad"), task=Task.MULTI_CLASS, max_length=64, thresholds=(limit, limit)
    )
    run_score(str(tmp_path / "archive"), str(tmp_path / "model"), str(tmp_path / "unsure"), "limits.max_bad_rows=1")

    unsure = read_predictions(str(tmp_path / "unsure")).to_pandas()
    expected = sure["label"].where(sure["score"] >= limit, None)
    assert unsure["label"].tolist() == expected.tolist()
    assert unsure["score"].tolist() == pytest.approx(sure["score"].tolist(), nan_ok=True)
    assert unsure["error"].notna().tolist() == [True] + [False] * 59
    assert unsure["abstained"].tolist() == [None, *(sure["score"][1:] < limit)]
    assert "abstained" not in sure
    count = int(expected.isna().sum()) - 1
    assert 10 < count < 50
    folder = next((tmp_path / "unsure").glob("*/_runs/run"))
    assert json.loads((folder / "run.json").read_text())["this_run"]["abstained"] == count
    assert f"no label</th><td>{count} rows" in (folder / "report.html").read_text()


def test_vectors_are_a_column_of_a_classifier_and_all_that_a_plain_encoder_gives(tmp_path: Path) -> None:
    texts = [None, *texts_table(40)["text"].to_pylist()]
    fakes.write_archive(
        str(tmp_path / "archive"),
        {"one.parquet": pa.table({"text": texts}), "none.parquet": pa.table({"text": pa.array([], pa.string())})},
    )
    fakes.make_classifier(tmp_path / "model", "bert", ("good", "bad"))
    fakes.make_encoder(tmp_path / "encoder", "bert")
    shared = ("limits.max_bad_rows=1", "output.embedding=float16")
    run_score(str(tmp_path / "archive"), str(tmp_path / "model"), str(tmp_path / "both"), *shared)
    run_score(
        str(tmp_path / "archive"),
        str(tmp_path / "encoder"),
        str(tmp_path / "alone"),
        *shared,
        "output.embedding_pooling=first",
    )

    for name, pooling in (("both", "mean"), ("alone", "first")):
        files = list((tmp_path / name).glob("*/*-of-*.parquet"))
        assert len(files) == 2 and len({pq.read_schema(one).remove_metadata() for one in files}) == 1
        found = read_predictions(str(tmp_path / name))
        assert found.schema.field("embedding").type == pa.list_(pa.float16(), fakes.HIDDEN_SIZE)
        assert found["error"].to_pylist() == ["null", *[None] * 40]
        assert found["embedding"].null_count == 1 and found["embedding"][0].as_py() is None
        stored = np.array(found["embedding"].to_pylist()[1:])
        expected = vectors_singly(tmp_path / ("model" if name == "both" else "encoder"), texts[1:], pooling)
        assert np.abs(stored - expected).max() < 4e-3, "half precision keeps eleven bits"
    assert read_predictions(str(tmp_path / "alone")).column_names == [
        "shard",
        "row",
        "embedding",
        "num_tokens",
        "truncated",
        "error",
    ]
    assert {"label", "score"} < set(read_predictions(str(tmp_path / "both")).column_names)
    page = next((tmp_path / "alone").glob("*/_runs/run/report.html")).read_text()
    assert "<b>41</b><span>rows scored" in page and "Text lengths" in page
    assert "<h2>Labels" not in page and "<h2>Scores" not in page, "there are none"
    with pytest.raises(UsageError, match=r"output\.embedding_pooling is set, but no vector"):
        run_score(
            str(tmp_path / "archive"), str(tmp_path / "model"), str(tmp_path / "x"), "output.embedding_pooling=max"
        )
    with pytest.raises(UsageError, match=r"holds BertModel, .* output\.embedding=float16"):
        run_score(str(tmp_path / "archive"), str(tmp_path / "encoder"), str(tmp_path / "x"))


def test_planning_takes_no_cpu_that_a_cluster_would_have_to_add(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first readers start beside planning where CPUs are free: a job with nothing to do must not make a cluster grow."""
    started = []
    monkeypatch.setattr(tasks.start_reader, "remote", lambda: started.append("reader"))
    with pipeline.readers_started():
        assert started == ["reader"] * pipeline.FIRST_READERS
    monkeypatch.setattr(ray, "available_resources", lambda: {"memory": 1e9})
    with pipeline.readers_started():
        assert started == ["reader"] * pipeline.FIRST_READERS


# What a user gets wrong: one message, before any model is loaded


@pytest.fixture(scope="module")
def small_archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    archive = str(tmp_path_factory.mktemp("small") / "archive")
    fakes.write_archive(archive, {"one.parquet": pa.table({"id": [1, 2], "text": ["a", "b"], "num_tokens": [1, 2]})})
    return archive


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["input.text_column=txt"], r"'txt' is missing, did you mean 'text'\? \(there are: id, text, num_tokens\)"),
        (["input.text_column=id"], r"'id' is int64, expected text"),
        (['input.key_columns=["ID"]'], r"key column 'ID' is missing"),
        (
            ['input.key_columns=["num_tokens"]'],
            r"num_tokens: a key column and a column that scoring adds; set output\.prefix",
        ),
        (["input.path={tmp}/nowhere"], r"no Parquet file matches"),
        (["output.path={archive}/scores"], r"lies in the archive"),
        (["model.path={tmp}/nothing"], r"no such model folder"),
        (["model.path={encoder}"], r"BertModel, expected one that ends in ForSequenceClassification"),
        (["model.path={cut}"], r"model\.safetensors .* cannot be read as safetensors .*get it again"),
        (["resources.num_actors=99"], r"num_actors = 99 leaves .* CPUs for each, but the cluster has 1 nodes, 4 CPUs"),
        (["input.path=s3://no-such-bucket-here/archive"], r"the bucket does not exist"),
        (["output.path=s3://no-such-bucket-here/scores"], r"bucket .*does not exist"),
        (["output.path=/proc/scores"], r"not allowed to|No such file"),
    ],
)
def test_mistakes_get_one_clear_message(
    settings: list[str],
    message: str,
    small_archive: str,
    classifier: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fakes.make_encoder(tmp_path / "encoder", "bert")
    shutil.copytree(classifier, tmp_path / "cut")
    os.truncate(tmp_path / "cut/model.safetensors", 5_000)
    names = {"{tmp}": str(tmp_path), "{archive}": small_archive}
    names |= {"{encoder}": str(tmp_path / "encoder"), "{cut}": str(tmp_path / "cut")}
    for placeholder, value in names.items():
        settings = [setting.replace(placeholder, value) for setting in settings]
    monkeypatch.setattr(pipeline, "score", lambda *_: pytest.fail("work was started"))
    with pytest.raises(UsageError, match=message):
        run_score(small_archive, classifier, str(tmp_path / "scores"), *settings)


def test_another_archive_under_the_same_version_is_refused(small_archive: str, classifier: str, tmp_path: Path) -> None:
    run_score(small_archive, classifier, str(tmp_path / "scores"))
    fakes.write_archive(str(tmp_path / "other"), {"one.parquet": pa.table({"text": ["c"]})})
    with pytest.raises(UsageError, match=r"holds scores of the archive .*give each archive its own output\.path"):
        run_score(str(tmp_path / "other"), classifier, str(tmp_path / "scores"))


def prepared(archive: str, classifier: str, output: str) -> Run:
    """A run up to the point where work starts."""
    values = {"input": {"path": archive}, "model": {"path": classifier}, "output": {"path": output}}
    return prepare(validate(ScoreConfig, values), "run")


def test_a_model_that_changed_since_planning_ends_the_run_as_a_mistake(
    small_archive: str, classifier: str, tmp_path: Path
) -> None:
    run = prepared(small_archive, classifier, str(tmp_path / "scores"))
    job = dataclasses.replace(run.job, model_digest="of another model")
    layout = plan_layout(Cluster((Node(4, 0),)), ScoreResources())
    with pytest.raises(UsageError, match="not the model that the run was planned with"):
        pipeline.score(job, run.unfinished, layout, run.config.limits, lambda _: None)


def test_a_model_without_its_head_ends_the_run_as_a_mistake_and_leaves_no_object(
    small_archive: str, classifier: str, tmp_path: Path
) -> None:
    """What no listing shows is found by the first actor, before it is given work."""
    weights = Path(shutil.copytree(classifier, tmp_path / "model")) / "model.safetensors"
    save_file({name: one for name, one in load_file(weights).items() if name != "classifier.weight"}, weights)
    with pytest.raises(UsageError, match=r"1 weights are missing or have another shape \(classifier\.weight\)"):
        run_score(small_archive, str(tmp_path / "model"), str(tmp_path / "scores"))
    store = open_store(str(tmp_path / "scores"))
    written = [path.partition("/")[2] for path in store.list()["path"].to_pylist()]
    assert sorted(path for path in written if not path.startswith("_runs/")) == ["_archive.json"]
    assert [(one.state, one.exit_code) for one in list_runs(store)] == [("failed", 2)]


def test_a_bug_in_a_task_keeps_its_traceback(small_archive: str, classifier: str, tmp_path: Path) -> None:
    run = prepared(small_archive, classifier, str(tmp_path / "scores"))
    job = dataclasses.replace(
        run.job, schema=dataclasses.replace(run.job.schema, heads=(Head(task=Task.MULTI_CLASS, labels=("too", "few")),))
    )
    layout = plan_layout(Cluster((Node(4, 0),)), ScoreResources())
    with pytest.raises(RayTaskError, match="to_results"):
        pipeline.score(job, run.unfinished, layout, run.config.limits, lambda _: None)


def test_a_failed_run_gives_its_cpus_back_while_its_error_is_still_held(
    small_archive: str, classifier: str, tmp_path: Path
) -> None:
    run = prepared(small_archive, classifier, str(tmp_path / "scores"))
    job = dataclasses.replace(
        run.job, schema=dataclasses.replace(run.job.schema, heads=(Head(task=Task.MULTI_CLASS, labels=("too", "few")),))
    )
    layout = plan_layout(Cluster((Node(4, 0),)), ScoreResources())
    gc.disable()  # as when no collection happens to come along
    try:
        with pytest.raises(RayTaskError) as held:
            pipeline.score(job, run.unfinished, layout, run.config.limits, lambda _: None)
        wait_until(lambda: ray.available_resources().get("CPU") == 4, "all CPUs to be free")
    finally:
        gc.enable()
    assert held.value is not None


@ray.remote(num_cpus=4)
class Squatter:
    """Another job that holds every CPU."""

    def ready(self) -> None:
        """Return when the CPUs are taken."""


@pytest.fixture
def squatter() -> Iterator[None]:
    other = Squatter.remote()  # type: ignore[attr-defined]
    ray.get(other.ready.remote())
    yield
    ray.kill(other)
    wait_until(lambda: ray.available_resources().get("CPU") == 4, "all CPUs to be free")


@pytest.mark.usefixtures("squatter")
def test_a_cluster_without_a_free_cpu_ends_as_a_stall_that_says_so(
    small_archive: str, classifier: str, tmp_path: Path
) -> None:
    assert ray.available_resources().get("CPU", 0) == 0
    with pytest.raises(IncompleteError) as stalled:
        run_score(small_archive, classifier, str(tmp_path / "scores"), "limits.stall_seconds=2")
    assert "finished for 2 s (limits.stall_seconds): only 0 of 1 actors have started; no CPU is free" in str(
        stalled.value
    )
    assert "0 of 4 CPUs" in str(stalled.value)
    assert "run the same command again" in str(stalled.value)


def test_a_block_that_another_run_has_written_meanwhile_is_not_scored_again(
    small_archive: str, classifier: str, tmp_path: Path
) -> None:
    run = prepared(small_archive, classifier, str(tmp_path / "scores"))
    layout = plan_layout(Cluster((Node(4, 0),)), ScoreResources())
    store, run_blocks = open_store(str(tmp_path / "scores")), pipeline.run_blocks
    theirs: dict[str, Any] = {}

    def after_another(mine: Running, blocks: Any) -> bool:
        another = pipeline.start(run.job, layout, run.config.limits, lambda _: None)
        run_blocks(another, blocks[:1])
        theirs.update({name: store.info(name) for name in another.outcome.finished})
        return run_blocks(mine, blocks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "run_blocks", after_another)
        outcome = pipeline.score(run.job, run.unfinished, layout, run.config.limits, lambda _: None)
    assert theirs
    assert {name: store.info(name) for name in theirs} == theirs
    assert outcome.finished_chunks == outcome.planned_chunks >= len(theirs)
    assert not outcome.missing


def test_a_run_that_is_stopped_before_its_first_result_leaves_no_thread_inside_ray(
    small_archive: str, classifier: str, tmp_path: Path
) -> None:
    """One that waits inside Ray when Ray is left ends the process with exit code 1, and nothing is said."""
    run = prepared(small_archive, classifier, str(tmp_path / "scores"))
    layout = plan_layout(Cluster((Node(4, 0),)), ScoreResources())
    before = set(threading.enumerate())
    seen: list[str] = []
    squatters: list[Any] = []

    def stop(_: Outcome) -> None:
        seen.extend(thread.name for thread in threading.enumerate() if thread.name.startswith("StreamingExecutor"))
        if seen:
            raise StoppedError("stopped by a test")

    def take_cpus(*arguments: Any) -> Any:
        squatters.append(Squatter.remote())  # type: ignore[attr-defined]
        ray.get(squatters[0].ready.remote())
        return run_blocks(*arguments)

    run_blocks = pipeline.run_blocks
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(pipeline, "run_blocks", take_cpus)
        pipeline.score(run.job, run.unfinished, layout, run.config.limits, stop)
    left = {thread.name for thread in set(threading.enumerate()) - before}
    ray.kill(squatters[0])
    assert len(seen) == 1
    assert not [name for name in left if "Executor" in name or "consume" in name or "ray-data" in name], left


def test_a_pipeline_that_does_not_end_is_told_and_does_not_hold_the_driver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The executor is a fake: a thread that ignores its shutdown, beside a consumer that has ended."""
    monkeypatch.setattr(pipeline, "LEAVE_SECONDS", 0.3)
    over, ended, asked = threading.Event(), threading.Thread(target=str), []
    executor: Any = threading.Thread(target=over.wait, daemon=True)
    executor.shutdown = lambda force: asked.append(force)
    for one in (executor, ended):
        one.start()
    pipeline.leave(executor, ended)
    over.set()
    assert "Ray Data has not ended within 0.3 s" in capsys.readouterr().err
    assert 1 < len(asked) <= 10, "it waits between two looks"


def test_a_chunk_that_never_ends_ends_as_a_stall_that_names_it_and_what_tasks_reported(
    small_archive: str, classifier: str, tmp_path: Path
) -> None:
    """The actor is a fake: the progress actor is told that it has begun, and hears no more of it; a writer met a busy storage."""
    run = prepared(small_archive, classifier, str(tmp_path / "scores"))
    progress = start_progress()
    ray.get(progress.enlist.remote("an actor", None))
    ray.get(progress.begin.remote("an actor", None, ["part-007.parquet"]))
    ray.get(progress.fail.remote("storage failed to write s3://b/x: SlowDown", False, False))
    limits = run.config.limits.model_copy(update={"stall_seconds": 0.1})
    running = Running(
        job=run.job,
        layout=plan_layout(Cluster((Node(4, 0),)), ScoreResources()),
        limits=limits,
        tokenizer=None,
        progress=progress,
        outcome=Outcome(),
        show=lambda _: None,
    )
    watch = Watch(running)

    def is_over() -> bool:
        watch.look()
        return False

    with pytest.raises(
        IncompleteError,
        match=r": reported: storage failed to write s3://b/x: SlowDown.*; at work: part-007\.parquet; 4 of 4 CPUs",
    ):
        wait_until(is_over, "a stall")


def test_a_progress_actor_that_was_killed_comes_back_and_learns_of_the_actors_again() -> None:
    progress = start_progress()
    ray.get(progress.enlist.remote("an actor", "its handle"))
    ray.kill(progress, no_restart=False)

    def counts_from_zero() -> bool:
        """Killing returns at once: until the process is gone, it is the old one that answers."""
        counts = read_progress(progress)
        return counts is not None and counts.num_actors == 0

    wait_until(counts_from_zero, "the actor's return as another process")
    ray.get(progress.begin.remote("an actor", "its handle", ["part-007.parquet"]))
    ray.get(progress.fail.remote("storage failed to write s3://b/x: SlowDown", False, False))
    counts = read_progress(progress)
    assert counts is not None
    assert counts.busy == ("part-007.parquet",)
    assert ray.get(progress.dismiss.remote()) == ["its handle"]


@pytest.mark.parametrize("hours", [-24, 24, 365 * 24])
def test_a_clock_that_is_set_during_a_run_does_not_move_its_plan(
    hours: int, small_archive: str, classifier: str, tmp_path: Path
) -> None:
    run = prepared(small_archive, classifier, str(tmp_path / "scores"))
    age = datetime.now(UTC) - run.planned_at
    with time_machine.travel(datetime.now(UTC) + timedelta(hours=hours), tick=True):
        assert abs(datetime.now(UTC) - run.planned_at - age) < timedelta(minutes=1)


# The pipeline's shape


def test_ray_keeps_three_operators_apart(small_archive: str, classifier: str, tmp_path: Path) -> None:
    job = prepared(small_archive, classifier, str(tmp_path / "scores")).job
    chunk = Chunk("one.parquet", "0" * 12, 0, 1, 0, 2, 10)
    for cluster in (Cluster((Node(4, 0),)), Cluster((Node(1, 0),)), Cluster((Node(16, 2),))):
        layout = plan_layout(cluster, ScoreResources())
        progress = start_progress()
        names = pipeline.operator_names(pipeline.build_dataset(job, [(chunk,)], layout, None, progress))
        assert [name.split("(")[0].removesuffix("Chunks") for name in names] == ["Read", "MapBatches", "MapBatches"]


@pytest.mark.parametrize(
    "nodes",
    [(Node(2, 0),), (Node(1, 0),), (Node(0, 0), Node(8, 0), Node(8, 0)), (Node(16, 2), Node(16, 2)), (Node(4, 1),)],
)
def test_a_layout_always_leaves_cpus_to_read_and_write(nodes: tuple[Node, ...]) -> None:
    cluster = Cluster(nodes)
    layout = plan_layout(cluster, ScoreResources())
    assert layout.num_actors * layout.actor_cpus + layout.task_cpus <= cluster.cpus
    assert layout.num_actors * layout.actor_gpus <= cluster.gpus
    assert layout.actor_cpus != layout.task_cpus


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 16])
def test_actors_of_two_runs_never_hold_all_of_a_single_node(cpus: int) -> None:
    """Each would wait for a CPU to read with, which the other has."""
    layout = plan_layout(Cluster((Node(cpus, 0),)), ScoreResources())
    fit = int(cpus / layout.actor_cpus)
    assert cpus - fit * layout.actor_cpus >= layout.task_cpus


@pytest.mark.parametrize("cpus", [1, 2, 4, 16])
@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("per_node", [None, 1, 2])
def test_a_lost_nodes_actors_leave_a_cpu_on_the_others(cpus: int, count: int, per_node: int | None) -> None:
    """Ray may put them all on the same nodes."""
    if per_node and per_node * 0.5 > cpus / 2:
        pytest.skip("refused: too many actors")
    wanted = ScoreResources(num_actors=per_node and per_node * count)
    layout = plan_layout(Cluster((Node(cpus, 0),) * count), wanted)
    left = layout.num_actors
    free: list[float] = []
    for _ in range(count - 1):
        here = min(left, int(cpus / layout.actor_cpus))
        left, free = left - here, [*free, cpus - here * layout.actor_cpus]
    assert left == 0, "all actors fit"
    assert max(free) >= layout.task_cpus
