"""Few labels on a real Ray: contrastive tuning up to its checkpoint against scikit-learn, a worker that dies in it, no rows set aside."""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
import transformers
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from lib import checkpoint
from lib.config import validate
from lib.errors import UsageError
from lib.predictor import Predictor
from lib.runtime import cluster_facts
from lib.train_config import TrainConfig
from lib.training import train
from tests import fakes
from tests.labelled import LABELS, make_rows

ROWS, TEST_ROWS = 24, 30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, and rows of three labels."""
    folder = tmp_path_factory.mktemp("few")
    fakes.make_encoder(folder / "base", "bert")
    for name, count, seed in (("train", ROWS, 1), ("test", TEST_ROWS, 2)):
        texts, labels = make_rows(count, seed)
        fakes.write_archive(str(folder), {f"{name}.parquet": pa.table({"text": texts, "label": labels})})
    return folder


def configure(data: Path, output: Path, **sections: dict[str, Any]) -> TrainConfig:
    values: dict[str, dict[str, Any]] = {
        "train": {"path": f"{data}/train.parquet"},
        "valid": {"fraction": 0.0},
        "test": {"path": f"{data}/test.parquet"},
        "model": {"base": f"{data}/base", "precision": "fp32"},
        "output": {"path": str(output)},
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    return validate(TrainConfig, values)


PAIRS: dict[str, dict[str, Any]] = {
    "contrastive": {"iterations": 10, "epochs": 3, "batch_size": 16, "learning_rate": 3e-3}
}


@pytest.fixture(scope="module")
def tuned(data: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("tuned") / "checkpoint"
    return output, train(configure(data, output, **PAIRS), "night-1", cluster_facts())


def test_the_checkpoint_answers_as_scikit_learn_on_the_tuned_features(
    tuned: tuple[Path, dict[str, Any]], data: Path
) -> None:
    """The features by plain transformers, one text at a time; learned from all rows, also the one evaluation is of them."""
    folder, found = tuned
    assert found["rows"] == {"train": ROWS, "valid": ROWS, "test": TEST_ROWS}
    assert found["known_from_training"] == {"test": 0}
    assert [one["step"] for one in found["history"]] == [3 * ROWS * 10 * 2 // 16]
    assert 0 < found["history"][0]["train_loss"] < 0.5
    assert found["test"]["accuracy"] > 0.6, "a third by chance"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.AutoModel.from_pretrained(data / "base").eval()
    weights = load_file(folder / "model.safetensors")
    inner = {name.removeprefix("encoder."): one for name, one in weights.items() if name.startswith("encoder.")}
    assert not encoder.load_state_dict(inner, strict=False).unexpected_keys

    def features(texts: list[str]) -> Any:
        with torch.no_grad():
            states = [encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)[0] for text in texts]
        return torch.stack(states).numpy()

    texts, labels = make_rows(ROWS, 1)
    asked, _ = make_rows(TEST_ROWS, 2)
    expected = LogisticRegression(max_iter=1000).fit(features(texts), labels).predict_proba(features(asked))
    model = checkpoint.load(str(folder))
    assert model.facts.labels == LABELS
    tokens = checkpoint.tokenizer_of(model).encode(asked)
    for engine in ("torch", "openvino"):
        probabilities = Predictor(model, "fp32", engine).probabilities(tokens.ids, tokens.offsets)
        assert np.abs(probabilities - expected).max() < 1e-3
    assert "none were set aside" in (folder / "README.md").read_text()
    assert "No rows were set aside" in (folder / "report.html").read_text()


@pytest.fixture
def killer() -> Iterator[list[int]]:
    """Kills the worker once that makes a folder for its pairs."""
    killed: list[int] = []
    done = threading.Event()
    before = set(Path(tempfile.gettempdir()).glob("pairs-*"))

    def watch() -> None:
        while not done.wait(0.01) and not killed:
            if set(Path(tempfile.gettempdir()).glob("pairs-*")) - before:
                for one in psutil.Process().children(recursive=True):
                    if one.name().startswith("ray::RayTrainWo"):
                        os.kill(one.pid, signal.SIGKILL)
                        killed.append(one.pid)

    thread = threading.Thread(target=watch)
    thread.start()
    yield killed
    done.set()
    thread.join()


def test_a_worker_that_dies_among_the_pairs_begins_them_again(
    tuned: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path, killer: list[int]
) -> None:
    found = train(configure(data, tmp_path / "killed", **PAIRS), "night-1", cluster_facts())
    assert len(killer) == 1
    assert len(found["history"]) == 1
    first, second = (load_file(folder / "model.safetensors") for folder in (tuned[0], tmp_path / "killed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(one, second[name]) for name, one in first.items())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, r'valid.fraction = 0 with stopping.keep = "best": .* give valid.path or a valid.fraction'),
        (PAIRS | {"decision": {"temperature": True}}, r"valid.fraction = 0 with decision.temperature"),
        (PAIRS | {"train": {"regression": True, "label_column": "number"}}, r"those of this data are regression"),
    ],
    ids=["best", "decision", "regression"],
)
def test_what_needs_rows_of_its_own_is_refused(
    sections: dict[str, Any], message: str, data: Path, ray_session: None, tmp_path: Path
) -> None:
    numbers = pa.table({"text": ["a", "b"], "number": [0.5, 1.5]})
    fakes.write_archive(str(tmp_path), {"numbers.parquet": numbers})
    config = configure(data, tmp_path / "out", **sections)
    if config.train.regression:
        train_section = config.train.model_copy(update={"path": f"{tmp_path}/numbers.parquet"})
        config = config.model_copy(
            update={"train": train_section, "test": config.test.model_copy(update={"path": None})}
        )
    with pytest.raises(UsageError, match=message):
        train(config, "night-1", cluster_facts())
