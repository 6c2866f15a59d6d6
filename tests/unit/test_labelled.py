"""Tokenizing tasks, in a process of their own: what they do, and what they do not import."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.cloudpickle
from transformers import AutoTokenizer

from lib.config import validate
from lib.corpus import find_corpus, prepare_corpus
from lib.labelled import find_sources, prepare
from lib.mapped import LabelledSet
from lib.pretrain_config import PretrainConfig
from lib.sources import share
from lib.storage import open_store
from lib.tokenization import load_tokenizer
from lib.train_config import TrainConfig
from tests import fakes
from tests.conftest import REPOSITORY
from tests.labelled import make_rows

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
