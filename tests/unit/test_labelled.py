"""Tokenizing tasks, in a process of their own: what they do, and what they do not import; the ids are those of scoring."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray.cloudpickle
from transformers import AutoTokenizer

from lib import blocks
from lib.checkpoint import Card, commit, tokenizer_of
from lib.checkpoint import load as load_checkpoint
from lib.config import validate
from lib.corpus import find_corpus, prepare_corpus
from lib.labelled import find_sources, prepare
from lib.mapped import LabelledSet
from lib.planning import chunks_of
from lib.pretrain_config import PretrainConfig
from lib.score_config import ScoreConfig
from lib.scoring import prepare as prepare_run
from lib.sources import share
from lib.storage import open_store
from lib.tokenization import load_tokenizer
from lib.train_config import TrainConfig
from tests import fakes
from tests.conftest import REPOSITORY
from tests.labelled import LABELS, make_rows

TASK = """
import json, pickle, sys
tokenize_block, items = pickle.load(sys.stdin.buffer)
reports = [tokenize_block(item) for item in items]
print(json.dumps([reports, "torch" in sys.modules, "transformers" in sys.modules]))
"""

MAX_LENGTH = 64


def run_elsewhere(
    items: list[dict[str, Any]], tokenize_block: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """What `tokenize_all` does, in one process that is none of Ray's."""
    task = ray.cloudpickle.dumps((tokenize_block, items))
    done = subprocess.run([sys.executable, "-c", TASK], input=task, capture_output=True, check=True, cwd=REPOSITORY)
    reports: list[dict[str, Any]]
    reports, *imported = json.loads(done.stdout)
    assert imported == [False, False], "torch and transformers"
    return reports


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Of the one set that stands in `tmp_path`."""
    texts, labels = make_rows(30, 1)
    fakes.write_archive(str(tmp_path), {"rows.parquet": pa.table({"text": texts, "label": labels})})
    return texts


def settings(base: str, folder: Path, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    paths = {"train": {"path": f"{folder}/rows.parquet"}, "model": {"base": base}}
    return {**paths, "output": {"path": f"{folder}/out"}, **sections}


def test_labelled_rows_are_tokenized_without_torch(
    base: str, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.labelled.tokenize_all", run_elsewhere)
    config = validate(TrainConfig, settings(base, tmp_path, valid={"path": f"{tmp_path}/rows.parquet"}))
    data = open_store(str(tmp_path / "data"))
    index = prepare(config, find_sources(config), base, MAX_LENGTH, data)
    rows = LabelledSet(
        [str(tmp_path / "data" / name) for name in index.files["train"]], index.labels, index.task, 0, MAX_LENGTH
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = [tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"] for text in texts]
    assert [list(rows.ids_of(row)) for row in range(len(rows))] == expected


@pytest.mark.parametrize(
    "cut",
    [
        {},
        {"truncation": "tail"},
        {"truncation": "head_tail"},
        {"window_stride": 3, "max_windows": 3},
        {"pair": True},
        {"pair": True, "truncation": "tail"},
    ],
    ids=str,
)
def test_training_and_scoring_see_the_same_ids(
    cut: dict[str, Any], base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last byte, from the same Parquet on both ways; most texts are longer than what is kept of them."""
    monkeypatch.setattr("lib.labelled.tokenize_all", lambda items, tokenize_block: [*map(tokenize_block, items)])
    texts, labels = make_rows(60, 3)
    texts[3], texts[4] = "Ünïcödé ẞtraße 東京 🦊 " * 9, "a"
    rows = pa.table({"text": texts, "second": texts[::-1], "label": labels})
    fakes.write_archive(str(tmp_path / "archive"), {"rows.parquet": rows})
    columns: Any = ["text", "second"] if cut.get("pair") else "text"
    model = {"base": base, **{key: value for key, value in cut.items() if key != "pair"}}
    values = {
        "train": {"path": f"{tmp_path}/archive", "text_column": columns},
        "model": model,
        "output": {"path": f"{tmp_path}/out"},
    }
    config = validate(TrainConfig, values)
    index = prepare(config, find_sources(config), base, 16, open_store(str(tmp_path / "data")))
    with pa.ipc.open_file(str(tmp_path / "data" / index.files["train"][0])) as reader:
        learned = reader.read_all()

    fakes.make_classifier(tmp_path / "model", "bert", LABELS)
    card = Card(
        labels=LABELS,
        task=index.task,
        max_length=16,
        truncation=config.model.truncation,
        windows=config.model.windows,
    )
    commit(open_store(str(tmp_path / "checkpoint")), str(tmp_path / "model"), card)
    scoring = {
        "input": {"path": f"{tmp_path}/archive", "text_column": columns},
        "model": {"path": f"{tmp_path}/checkpoint", "precision": "fp32", "engine": "torch"},
        "output": {"path": f"{tmp_path}/scores"},
    }
    run = prepare_run(validate(ScoreConfig, scoring), "run")
    footer = blocks.read_footer(run.job.archive, run.job.columns, "rows.parquet")
    identity = run.shards["identity"][0].as_py()
    block = tuple(chunks_of(footer.shard, identity, footer.row_groups, run.job.chunk_bytes))
    (scored,) = blocks.read_block(run.job, block, tokenizer_of(load_checkpoint(f"{tmp_path}/checkpoint")), print)

    names = [("ids", blocks.IDS)] + ([("type_ids", blocks.TYPE_IDS)] if cut.get("pair") else [])
    for name, other in names:
        left, right = (table[one].combine_chunks() for table, one in ((learned, name), (scored, other)))
        assert left.type == right.type
        assert left.values.to_numpy().tobytes() == right.values.to_numpy().tobytes()
        assert left.offsets.equals(right.offsets)
    lengths = np.diff(learned["ids"].combine_chunks().offsets)
    assert np.count_nonzero(lengths >= 16) > 40


@pytest.mark.parametrize("packing", [True, False])
def test_texts_without_labels_are_tokenized_without_torch(
    packing: bool, base: str, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.corpus.tokenize_all", run_elsewhere)
    config = validate(PretrainConfig, settings(base, tmp_path, mlm={"packing": packing}, valid={"fraction": 0.2}))
    index = prepare_corpus(config, find_corpus(config), base, MAX_LENGTH, open_store(str(tmp_path / "data")))
    assert sum(index.texts.values()) == len(texts)
    if not packing:
        tokenizer = AutoTokenizer.from_pretrained(base)
        expected = sum(len(tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"]) for text in texts)
        assert sum(index.tokens.values()) == expected


def test_a_tokenizer_that_is_written_in_python_is_loaded_by_each_process(base: str) -> None:
    """It is the fast one here, with what makes it fast taken out."""
    tokenizer = load_tokenizer(base, MAX_LENGTH)

    def load() -> tuple[Any, ...]:
        return (tokenizer,)

    assert share(load) is not load
    assert share(load)() == (tokenizer,)
    slow = object.__new__(type(tokenizer))
    slow.__dict__ = tokenizer.__dict__ | {"backend": None}

    def load_slow() -> tuple[Any, ...]:
        return (slow,)

    assert share(load_slow) is load_slow
