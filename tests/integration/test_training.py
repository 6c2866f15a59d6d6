"""Training on a real Ray against independent oracles: plain torch, plain transformers one row at a time, scikit-learn."""

import contextlib
import functools
import io
import json
import math
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lxml.html
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray
import torch
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file
from sklearn.metrics import confusion_matrix, f1_score, mean_absolute_error, mean_squared_error
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from jobs.demo_store import LoopbackS3
from jobs.train import main
from lib import checkpoint
from lib.config import validate
from lib.errors import IncompleteError, UsageError
from lib.model import load_classifier
from lib.predictor import Predictor
from lib.rendezvous import OneAddressBackend, OneAddressConfig
from lib.runtime import Cluster, Node, cluster_facts
from lib.schema import Task
from lib.states import STATES_FOLDER, STATES_NAME
from lib.storage import open_store
from lib.train_config import TrainConfig
from lib.training import train
from lib.training_report import length_counts, training_report
from lib.windows import Windows
from lib.workers import RUNS_FOLDER, claim, place_workers, run_workers
from tests import fakes
from tests.killing import killing, states_of, train_workers
from tests.labelled import LABELS, Weights, difference, make_rows
from tests.tracked import assert_same_numbers, assert_tracked, scalars, vanishing_server

TRAIN_ROWS, VALID_ROWS, TEST_ROWS = 81, 40, 101
BATCH_ROWS = 16
"""81 rows: the last batch of an epoch has one row, so that one of two workers has none."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Train, valid and test; of the rows of train six cannot be used."""
    folder = tmp_path_factory.mktemp("labelled")
    texts, labels = make_rows(TRAIN_ROWS, 1)
    bad = [("", "bad"), (" \n", "good"), (None, "good"), ("no label", None), (b"\xff\xfe", "bad"), (None, None)]
    raw: list[bytes | None] = [one.encode() for one in texts]
    raw[10:10] = [one.encode() if isinstance(one, str) else one for one, _ in bad]
    marks: list[str | None] = [*labels[:10], *(label for _, label in bad), *labels[10:]]
    weights: list[float | None] = [0.5 + index % 3 for index in range(len(marks))]
    weights[0], weights[1] = None, float("nan")
    fakes.write_archive(
        str(folder / "train"),
        {
            "a.parquet": pa.table(
                {"text": pa.array(raw[:50], pa.binary()), "label": marks[:50], "weight": pa.array(weights[:50])}
            ),
            "b.parquet": pa.table(
                {
                    "text": pa.array(raw[50:], pa.binary()),
                    "label": pa.array(marks[50:]).dictionary_encode(),
                    "weight": pa.array(weights[50:], pa.float32()),
                }
            ),
        },
    )
    for name, count, seed in (("valid", VALID_ROWS, 2), ("test", TEST_ROWS, 3)):
        texts, labels = make_rows(count, seed)
        fakes.write_archive(str(folder), {f"{name}.parquet": pa.table({"text": texts, "label": labels})})
    rotated = dict(zip(LABELS, [*LABELS[1:], LABELS[0]], strict=True))
    texts, labels = make_rows(VALID_ROWS, 4)
    wrong = pa.table({"text": texts, "label": [rotated[label] for label in labels]})
    fakes.write_archive(str(folder), {"wrong.parquet": wrong})
    return {
        "train": f"{folder}/train/*.parquet",
        **{name: f"{folder}/{name}.parquet" for name in ("valid", "test", "wrong")},
    }


def configure(paths: dict[str, str], base: str, output: str, **sections: dict[str, Any]) -> TrainConfig:
    """A configuration of the tests' usual run, with changes."""
    values: dict[str, dict[str, Any]] = {
        "train": {"path": paths["train"]},
        "valid": {"path": paths["valid"]},
        "test": {"path": paths["test"]},
        "model": {"base": base, "precision": "fp32", "dropout": 0.0},
        "optim": {"batch_size": BATCH_ROWS, "epochs": 2, "learning_rate": 5e-4},
        "stopping": {"metric": "loss"},
        "output": {"path": output},
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    return validate(TrainConfig, values)


def weights_of(url: str) -> Weights:
    return load_file(Path(checkpoint.fetch(url)) / "model.safetensors")


def score_plainly(folder: str, texts: Sequence[str]) -> torch.Tensor:
    """Logits (N, C) by plain transformers, one row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.cat(
            [model(**tokenizer(text, truncation=True, max_length=64, return_tensors="pt")).logits for text in texts]
        )


# one worker, two workers, accumulation


@pytest.fixture(scope="module")
def one(
    data: dict[str, str], base: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, dict[str, Any]]:
    """One worker, to a local folder."""
    tracking = {"to": ["mlflow", "tensorboard"]}
    config = configure(data, base, str(tmp_path_factory.mktemp("one") / "checkpoint"), tracking=tracking)
    return config, train(config, "night-1", cluster_facts())


@pytest.fixture(scope="module")
def two(data: dict[str, str], base: str, ray_session: None, s3: LoopbackS3) -> tuple[TrainConfig, dict[str, Any]]:
    """Two workers and the same global batch, to S3."""
    config = configure(
        data, base, f"{s3.bucket()}/models/two", resources={"num_workers": 2}, tracking={"to": "tensorboard"}
    )
    return config, train(config, "night-1", cluster_facts())


def assert_same_learning(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Adam hides a gradient that is too large by a factor; its norm and the loss do not."""
    assert len(first["history"]) == len(second["history"]) == 2
    for left, right in zip(first["history"], second["history"], strict=True):
        for name in ("grad_norm", "train_loss", "loss"):
            assert left[name] == pytest.approx(right[name], rel=1e-4), name


def test_two_workers_learn_what_one_learns(
    one: tuple[TrainConfig, dict[str, Any]], two: tuple[TrainConfig, dict[str, Any]]
) -> None:
    assert_same_learning(one[1], two[1])
    assert difference(weights_of(one[0].output.path), weights_of(two[0].output.path)) < 1e-5


def test_accumulation_changes_nothing(
    one: tuple[TrainConfig, dict[str, Any]], data: dict[str, str], base: str, tmp_path: Path
) -> None:
    """Nor does a tracking server that is gone after the first look at it."""
    with vanishing_server() as uri:
        tracking = {"to": "mlflow", "uri": uri}
        config = configure(data, base, str(tmp_path / "checkpoint"), optim={"accumulation_steps": 3}, tracking=tracking)
        found = train(config, "night-1", cluster_facts())
    assert_same_learning(one[1], found)
    assert difference(weights_of(one[0].output.path), weights_of(config.output.path)) < 1e-5


def test_two_workers_evaluate_every_row_once(two: tuple[TrainConfig, dict[str, Any]], data: dict[str, str]) -> None:
    """101 rows: with an equal split one would be lost, with padding one would count twice."""
    texts, labels = make_rows(TEST_ROWS, 3)
    logits = score_plainly(checkpoint.fetch(two[0].output.path), texts)
    truth = [LABELS.index(label) for label in labels]
    tested = two[1]["test"]
    assert tested["rows"] == TEST_ROWS
    assert tested["confusion"] == confusion_matrix(truth, logits.argmax(1)).tolist()
    assert tested["macro_f1"] == pytest.approx(f1_score(truth, logits.argmax(1), average="macro"))
    assert tested["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, torch.tensor(truth))), abs=1e-5
    )


def test_unusable_rows_are_left_out_and_counted(one: tuple[TrainConfig, dict[str, Any]]) -> None:
    assert one[1]["rows"] == {"train": TRAIN_ROWS, "valid": VALID_ROWS, "test": TEST_ROWS}
    assert one[1]["dropped"]["train"] == {"empty text": 2, "null text": 2, "undecodable text": 1, "null label": 1}


def test_a_checkpoint_is_plain_transformers_and_says_what_it_was_made_from(
    two: tuple[TrainConfig, dict[str, Any]], base: str
) -> None:
    config, found = two
    loaded = checkpoint.load(config.output.path)
    assert loaded.facts.labels == loaded.card.labels == LABELS
    trained = loaded.card.trained
    assert trained["run_id"] == "night-1"
    assert trained["config"] == config.model_dump(mode="json", exclude={"resources", "tracking"})
    assert trained["label_counts"]["train"].keys() == set(LABELS)
    assert set(trained["versions"]) == {"python", "torch", "transformers", "ray"}
    card = (open_store(config.output.path).read("README.md") or b"").decode()
    page = MarkdownIt().enable("table").parse(card.partition("---\n")[2].partition("---\n")[2])
    cells = [one.content for one in page if one.type == "inline"]
    assert cells[0] == "3 labels, multi-class"
    for one in found["test"]["per_class"]:
        numbers = [f"{one[name]:.3f}" for name in ("precision", "recall", "f1")]
        place = cells.index(one["label"])
        assert cells[place : place + 5] == [one["label"], *numbers, str(one["support"])]
    assert f"{found['test']['accuracy']:.4f}" == cells[cells.index("test") + 2]
    texts, _ = make_rows(5, 9)
    ours, plain = load_classifier(loaded.folder), score_plainly(loaded.folder, texts)
    tokenizer, original = AutoTokenizer.from_pretrained(loaded.folder), AutoTokenizer.from_pretrained(base)
    for index, text in enumerate(texts):
        batch = tokenizer(text, return_tensors="pt")
        assert batch["input_ids"].tolist()[0] == original(text)["input_ids"]
        assert torch.allclose(ours(**batch).logits[0], plain[index], atol=1e-6)


def test_the_report_shows_the_numbers_of_metrics_json_and_no_text(
    one: tuple[TrainConfig, dict[str, Any]], data: dict[str, str]
) -> None:
    config, found = one
    page = (Path(config.output.path) / "report.html").read_text()
    tables = pd.read_html(io.StringIO(page))
    labels = next(table for table in tables if "average precision" in table.columns).set_index("label")
    assert set(labels.index) == set(LABELS)
    for each in found["test"]["per_class"]:
        assert labels.loc[each["label"], "F1"] == pytest.approx(each["f1"], abs=5e-4)
        assert labels.loc[each["label"], "test rows"] == each["support"]
    sets = next(table for table in tables if "known from training" in table.columns).set_index("set")
    assert sets["rows"].to_dict() == found["rows"]
    assert page.count("<svg") == 6
    assert not re.search(r"<script|<link|src=|https?://(?!www\.w3\.org)(?!purl\.org)(?!creativecommons\.org)", page)

    texts, truth = make_rows(TEST_ROWS, 3)
    logits = score_plainly(config.output.path, texts)
    losses = torch.nn.functional.cross_entropy(
        logits, torch.tensor([LABELS.index(label) for label in truth]), reduction="none"
    )
    answers = [LABELS[index] for index in logits.argmax(1)]
    wrong = sorted((row for row in range(TEST_ROWS) if answers[row] != truth[row]), key=lambda row: -float(losses[row]))
    assert len(wrong) > 5
    assert [each["row"] for each in found["errors"]] == wrong[:20]
    assert [(each["expected"], each["answered"]) for each in found["errors"]] == [
        (truth[row], answers[row]) for row in wrong[:20]
    ]
    assert all("text" not in each and "explained" not in each for each in found["errors"])
    assert found["unexplained"] is None and "<mark" not in page

    tokenizer = AutoTokenizer.from_pretrained(config.output.path)
    counts = [len(tokenizer(text)["input_ids"]) for text in make_rows(TRAIN_ROWS, 1)[0]]
    assert found["lengths"]["rows"] == TRAIN_ROWS
    for limit, count in found["lengths"]["longer_than"].items():
        assert count == sum(length > int(limit) for length in counts)
    assert 0 < found["lengths"]["longer_than"]["32"] < TRAIN_ROWS
    drawn = length_counts(found["lengths"])
    edges = np.array([0, 16, 32, 64, 128, 256])[: len(drawn) + 1]
    assert list(drawn.values()) == list(np.histogram(counts, edges + 0.5)[0])
    assert list(drawn)[1] == "17 to 32" and "17 to 32" in page
    assert f"Tokens of {TRAIN_ROWS:,} training rows" in page
    assert f"(chance alone: {found['test']['chance_calibration_error']:.4f})" in page


def test_names_in_the_report_are_text_and_nothing_else(one: tuple[TrainConfig, dict[str, Any]]) -> None:
    config, found = one
    card = checkpoint.load(config.output.path).card
    names = {"good": "<script>alert(1)</script>", "bad": "$\\frac{$", "odd": 'a $b$ & "c"'}
    renamed = json.loads(json.dumps(found))
    for each in renamed["test"]["per_class"]:
        each["label"] = names.get(each["label"], each["label"])
    renamed["label_counts"] = {"train": {names.get(label, label): 5 for label in LABELS}}
    page = training_report(
        card.model_copy(update={"labels": tuple(names.get(label, label) for label in LABELS)}), renamed
    )
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page


def test_what_the_time_went_for_is_kept(one: tuple[TrainConfig, dict[str, Any]]) -> None:
    found = one[1]
    spent = found["spent_seconds"]
    assert spent.keys() == {"steps", "reading", "evaluation", "saving"}
    assert 0 < spent["reading"] < spent["steps"]
    assert spent["evaluation"] > 0 and spent["saving"] > 0
    assert spent["steps"] <= found["seconds"]


def test_a_run_leaves_nothing_but_its_checkpoint(
    one: tuple[TrainConfig, dict[str, Any]], two: tuple[TrainConfig, dict[str, Any]]
) -> None:
    for config, result in (one, two):
        store = open_store(config.output.path)
        names = set(store.list()["path"].to_pylist())
        assert names == {
            "README.md",
            "config.json",
            "metrics.json",
            "model.safetensors",
            "report.html",
            "textsweep.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert json.loads(store.read("metrics.json") or b"") == result
    assert not (Path(one[0].output.path) / "_train").exists()


def test_a_run_is_shown_in_mlflow_and_tensorboard(
    one: tuple[TrainConfig, dict[str, Any]], two: tuple[TrainConfig, dict[str, Any]], tmp_path: Path
) -> None:
    config, found = one
    run = assert_tracked(config, "night-1", found)
    assert run.data.params["optim.learning_rate"] == "0.0005"
    assert run.data.params["train.path"] == config.train.path
    assert not Path("mlruns").exists()
    events = open_store(f"{two[0].output.path.rpartition('/')[0]}/tensorboard/two/night-1")
    for name in events.list()["path"].to_pylist():
        (tmp_path / name).write_bytes(events.read(name) or b"")
    assert_same_numbers(scalars(tmp_path), two[1])
    train(config, "night-1", cluster_facts())  # is committed
    assert assert_tracked(config, "night-1", found).info.end_time == run.info.end_time


def test_a_finished_run_returns_at_once_and_another_is_refused(
    two: tuple[TrainConfig, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result = two
    monkeypatch.setattr("lib.training.run_to_commit", None)  # nothing is run again
    output = open_store(config.output.path)
    output.replace(f"{RUNS_FOLDER}/night-1/data/train-00000.arrow", b"left by a driver that died after the commit")
    output.replace(f"{RUNS_FOLDER}/night-2/run.json", b"{}")  # another one's
    assert train(config, "night-1", cluster_facts()) == result
    assert "committed this checkpoint already" in capsys.readouterr().out
    assert [name for name in output.list()["path"].to_pylist() if RUNS_FOLDER in name] == [
        f"{RUNS_FOLDER}/night-2/run.json"
    ]
    output.fs.rm(f"{output.root}/{RUNS_FOLDER}", recursive=True)
    with pytest.raises(UsageError, match=r"checkpoint of run 'night-1', this is run 'night-2'"):
        train(config, "night-2", cluster_facts())
    other = config.model_copy(update={"optim": config.optim.model_copy(update={"seed": 1})})
    with pytest.raises(UsageError, match=r"run 'night-1' with another configuration"):
        train(other, "night-1", cluster_facts())
    fewer = config.model_copy(update={"resources": config.resources.model_copy(update={"num_workers": 1})})
    assert train(fewer, "night-1", cluster_facts()) == result


# best, stopping, multi-label


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_best_weights_are_kept_and_training_stops_early(
    keep: str, data: dict[str, str], base: str, ray_session: None, tmp_path: Path
) -> None:
    """The validation labels are rotated: the better the model learns, the worse it gets there. `last` takes no notice."""
    config = configure(
        data | {"valid": data["wrong"]},
        base,
        str(tmp_path / "checkpoint"),
        optim={"epochs": 20 if keep == "best" else 6, "learning_rate": 3e-3},
        stopping={"metric": "loss", "keep": keep, **({"patience": 3} if keep == "best" else {})},
    )
    found = train(config, "night-1", cluster_facts())
    history = found["history"]
    losses = [entry["loss"] for entry in history]
    best = int(np.argmin(losses))
    if keep == "last":
        assert len(history) == 6 > best + 1
        assert found["best"] == history[-1]
        best = 5
    else:
        assert len(history) == best + 1 + 3 < 20
        assert found["best"] == history[best] != history[-1]
        assert abs(losses[-1] - losses[best]) > 1e-2

    rotated = {label: (index + 1) % 3 for index, label in enumerate(LABELS)}
    texts, labels = make_rows(VALID_ROWS, 4)
    logits = score_plainly(config.output.path, texts)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([rotated[label] for label in labels]))
    assert float(loss) == pytest.approx(losses[best], abs=1e-5)


def test_checkpoints_are_averaged_and_the_model_may_abstain(
    data: dict[str, str], base: str, one: tuple[TrainConfig, dict[str, Any]], tmp_path: Path
) -> None:
    config = configure(
        data, base, str(tmp_path / "mean"), stopping={"metric": "loss", "average": 2}, decision={"abstain": 0.8}
    )
    found = train(config, "night-1", cluster_facts())
    before, after = (entry["step"] for entry in found["history"])
    assert (found["averaged_steps"], one[1]["best"]["step"]) == ([after, before], after)
    mean, last = weights_of(config.output.path), weights_of(one[0].output.path)
    first = {name: 2 * value - last[name] for name, value in mean.items()}
    assert difference(first, last) > 1e-3
    shutil.copytree(config.output.path, tmp_path / "first")
    save_file(first, tmp_path / "first" / "model.safetensors", {"format": "pt"})
    texts, labels = make_rows(VALID_ROWS, 2)
    targets = torch.tensor([LABELS.index(label) for label in labels])
    loss = torch.nn.functional.cross_entropy(score_plainly(str(tmp_path / "first"), texts), targets)
    assert float(loss) == pytest.approx(found["history"][0]["loss"], abs=1e-4)

    logits = score_plainly(config.output.path, texts)
    assert found["best"]["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), abs=1e-5)
    scores, answers = logits.softmax(1).max(1)
    limit = found["thresholds"][0]
    assert found["thresholds"] == [limit] * 3 and 0 < limit < 1
    assert (answers == targets)[scores >= limit].float().mean() >= 0.8 > (answers == targets).float().mean()


def test_lists_of_numbers_train_a_multi_label_model_with_a_split_of_its_own(
    base: str, ray_session: None, tmp_path: Path
) -> None:
    """With a head of our own, weights for rare labels, and what the validation rows decide at the end."""
    texts, labels = make_rows(100, 5)
    numbers = [[10] if label == "bad" else [2, 10] if label == "good" else [] for label in labels]
    table = pa.table({"title": texts, "body": texts, "tags": pa.array([*numbers[:99], None], pa.list_(pa.int16()))})
    fakes.write_archive(str(tmp_path), {"all.parquet": table})
    config = configure(
        {"train": f"{tmp_path}/all.parquet", "valid": "", "test": f"{tmp_path}/all.parquet"},
        base,
        str(tmp_path / "checkpoint"),
        train={"text_column": ["title", "body"], "label_column": "tags"},
        valid={"path": None, "fraction": 0.25},
        optim={"epochs": 8, "learning_rate": 3e-3},
        stopping={"metric": "micro_f1"},
        head={"pooling": "mean", "hidden_sizes": [16]},
        loss={"positive_weights": "balanced"},
        decision={"temperature": True, "thresholds": "f1"},
    )
    found = train(config, "night-1", cluster_facts())
    assert found["rows"] == {"train": 74, "valid": 25, "test": 99}
    loaded = checkpoint.load(config.output.path)
    assert loaded.facts.labels == ("2", "10")
    assert loaded.facts.task is Task.MULTI_LABEL

    tokenizer = AutoTokenizer.from_pretrained(loaded.folder)
    model, card = load_classifier(loaded.folder), loaded.card
    assert card.temperature != 1.0 and card.thresholds is not None and card.thresholds != (0.5, 0.5)
    truth = np.array([["2" in map(str, one), "10" in map(str, one)] for one in map(set, numbers[:99])])
    with torch.no_grad():
        batches = [tokenizer(text, text, truncation=True, max_length=64, return_tensors="pt") for text in texts[:99]]
        scores = np.concatenate([(model(**batch).logits / card.temperature).sigmoid().numpy() for batch in batches])
    answers = scores >= np.array(card.thresholds)
    assert found["test"]["micro_f1"] == pytest.approx(f1_score(truth, answers, average="micro"))
    assert found["test"]["micro_f1"] > 0.7


# killed workers


@pytest.fixture
def killer(tmp_path: Path) -> Iterator[list[int]]:
    """Kills a worker of the run in `tmp_path` once three of its checkpoints were seen; gives the killed process ids."""
    with killing(tmp_path / "killed", 3) as killed:
        yield killed


INTERRUPTED: dict[str, dict[str, Any]] = {
    "model": {"dropout": 0.2},
    "optim": {"epochs": 3, "ema_decay": 0.8, "layer_decay": 0.9, "rdrop": 1.0, "accumulation_steps": 2},
    "stopping": {"metric": "loss", "evaluations_per_epoch": 6, "patience": 100, "average": 100},
}
"""A run with all that has a state."""


@pytest.fixture(scope="module")
def uninterrupted(
    data: dict[str, str], base: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Weights, dict[str, Any]]:
    """By two workers that hold all weights each."""
    folder = str(tmp_path_factory.mktemp("whole") / "checkpoint")
    config = configure(data, base, folder, **INTERRUPTED, resources={"num_workers": 2})
    found = train(config, "night-1", cluster_facts())
    return weights_of(folder), found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_worker_resumes_to_the_same_weights(
    strategy: str,
    data: dict[str, str],
    base: str,
    uninterrupted: tuple[Weights, dict[str, Any]],
    tmp_path: Path,
    killer: list[int],
) -> None:
    """With dropout, and in the middle of epochs: order, rates, moments, averages, weights kept before and randomness must all go on.

    Weights in parts learn and resume as whole ones do.
    """
    resources = {"num_workers": 2, "strategy": strategy}
    tracking = {"to": ["mlflow", "tensorboard"]}
    config = configure(data, base, str(tmp_path / "killed"), **INTERRUPTED, resources=resources, tracking=tracking)
    weights, expected = uninterrupted
    found = train(config, "night-1", cluster_facts())

    assert len(killer) == 1
    assert len(found["resumed_after"]) == 1
    assert 0 < found["resumed_after"][0] < 18
    assert expected["resumed_after"] == []
    assert expected["averaged_steps"] == found["averaged_steps"]
    assert difference(weights, weights_of(config.output.path)) < 1e-6
    assert json.loads((tmp_path / "killed" / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    assert [entry["step"] for entry in found["history"]] == list(range(1, 19))
    for left, right in zip(expected["history"], found["history"], strict=True):
        for name in ("train_loss", "grad_norm", "loss"):
            assert left[name] == pytest.approx(right[name], abs=1e-5)
    assert_tracked(config, "night-1", found)


KILLS = 10


@pytest.mark.trial
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_killed_at_ten_random_moments_give_the_same_weights_to_the_last_bit(
    num_workers: int, data: dict[str, str], base: str, ray_session: None, tmp_path: Path
) -> None:
    """Any worker, at any moment: while it starts, in the middle of an epoch or of an accumulation, while it saves."""
    chance, killed, done = random.Random(num_workers), list[float](), threading.Event()
    settings = {
        **INTERRUPTED,
        "optim": {**INTERRUPTED["optim"], "epochs": 20},
        "stopping": {**INTERRUPTED["stopping"], "average": 3},
    }
    runs = {}

    def saved() -> set[str]:
        return {path.name for path in tmp_path.glob("killed/_train/*/checkpoints/checkpoint_*")}

    def kill() -> None:
        begun = time.monotonic()
        while len(killed) < KILLS:
            # One in four dies while it starts, the others some time after this attempt has saved for the first time.
            early, wait, before, ready = chance.random() < 0.25, chance.uniform(0, 4), saved(), None
            while ready is None or time.monotonic() - ready < wait:
                if done.wait(0.01):
                    return
                found = train_workers()
                if len(found) != num_workers:
                    ready = None
                elif ready is None and (early or saved() - before):
                    ready = time.monotonic()
            os.kill(chance.choice(found), signal.SIGKILL)
            killed.append(time.monotonic() - begun)

    for name in ("whole", "killed"):
        config = configure(
            data, base, str(tmp_path / name), **settings, resources={"num_workers": num_workers}, tracking={}
        )
        killer = threading.Thread(target=kill)
        if name == "killed":
            killer.start()
        while name not in runs:  # a run gives up after a few restarts; the same command goes on
            with contextlib.suppress(IncompleteError):
                runs[name] = train(config, "night-1", cluster_facts())
    done.set()
    killer.join()
    assert len(killed) == KILLS, f"only {len(killed)} workers died before the run ended: {killed}"
    assert len(set(runs["killed"]["resumed_after"])) >= 3, "hardly an attempt went on from a checkpoint of its own"
    whole, after = (weights_of(str(tmp_path / name)) for name in runs)
    assert whole.keys() == after.keys()
    assert max(float((whole[name] - after[name]).abs().max()) for name in whole) == 0.0
    for left, right in zip(runs["whole"]["history"], runs["killed"]["history"], strict=True):
        timed = {"seconds", "rows_per_second"}
        assert {name: left[name] for name in left if name not in timed} == {
            name: right[name] for name in right if name not in timed
        }
    print(f"{num_workers} workers: killed at {[round(one, 1) for one in killed]} s, {runs['killed']['resumed_after']}")


def die_once(marker: str) -> None:
    """End this process if it is one of Ray's, and the first one to come here."""
    if Path("/proc/self/cmdline").read_bytes().startswith(b"ray::"):
        with contextlib.suppress(FileExistsError):
            Path(marker).touch(exist_ok=False)
            os._exit(1)


class DiesWhereItArrives:
    """Work whose first worker dies as it takes it over."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __call__(self) -> None:
        Path(self.marker).with_suffix(".done").touch()

    def __reduce__(self) -> tuple[Any, ...]:
        return arrive, (self.marker,)


def arrive(marker: str) -> DiesWhereItArrives:
    die_once(marker)
    return DiesWhereItArrives(marker)


class DyingBackend(OneAddressBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(die_once, backend_config.marker)
        super().on_start(worker_group, backend_config)


@dataclass
class DyingConfig(OneAddressConfig):
    """A process group whose first worker dies while it is made."""

    marker: str = ""

    @property
    def backend_cls(self) -> Any:
        return DyingBackend


@pytest.mark.parametrize("moment", ["the workers find each other", "the work is handed over"])
def test_a_worker_that_dies_while_it_starts_is_replaced_in_its_own_place(
    moment: str, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker takes all of the CPUs: a new one has room only if the dead one's was given back."""
    marker = str(tmp_path / "died")
    config = SimpleNamespace(resources=SimpleNamespace(num_workers=1, min_workers=None))
    job: Any = SimpleNamespace(folder=open_store(str(tmp_path / "run")), config=config, cpus_per_worker=4)
    if moment == "the work is handed over":
        work: Any = DiesWhereItArrives(marker)
    else:
        monkeypatch.setattr("lib.workers.OneAddressConfig", functools.partial(DyingConfig, marker=marker))
        work = Path(tmp_path / "died.done").touch
    run_workers(work, job, use_gpu=False)
    assert Path(marker).exists(), "no worker died"
    assert Path(marker).with_suffix(".done").exists(), "no worker worked"


def test_an_unfinished_run_goes_on_only_as_it_was_started(
    data: dict[str, str], base: str, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    config = configure(data, base, str(tmp_path / "checkpoint"), optim={"epochs": 1})
    with monkeypatch.context() as patch:
        patch.setattr("lib.training.run_to_commit", die)
        with pytest.raises(KeyboardInterrupt):
            train(config, "night-1", cluster_facts())
    other = config.model_copy(update={"optim": config.optim.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(UsageError, match=r"optim.learning_rate = 0.5, it was 0.0005"):
        train(other, "night-1", cluster_facts())
    monkeypatch.setattr("lib.labelled.tokenize_all", None)  # nothing is tokenized again
    assert len(train(config, "night-1", cluster_facts())["history"]) == 1


# mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["train.text_column=txt"],
            r"column 'txt' is missing, did you mean 'text'\? \(there are: text, label, weight\)",
        ),
        (["train.label_column=labels"], r"label column 'labels' is missing, did you mean 'label'\?"),
        (["train.path=NOWHERE/*.parquet"], r"train.path .*no Parquet file matches"),
        (
            ["valid.path=STRANGE"],
            r"valid.path: 2 labels do not occur in the training rows: 'god' \(2 rows\), 'odd' \(1 rows\)",
        ),
        (["train.path=FLOATS"], r"label column 'label' is double, expected strings, whole numbers, or lists"),
        (["train.weight_column=label"], r"weight column 'label' is string, expected numbers"),
        (["train.weight_column=wight"], r"column 'wight' is missing, did you mean 'weight'"),
        (["loss.positive_weights=balanced"], r"each row of this data has one label; use loss.class_weights"),
        (
            ["model.truncation=head_tail", "train.text_column=['text', 'text']"],
            r"head_tail with two text columns: which of the two would lose its middle",
        ),
        (["optim.unfreeze_layers=1", "resources.strategy=fsdp"], r"which weights learn is fixed when they are divided"),
        (["model.compile=true", "resources.strategy=fsdp"], r"model.compile with resources.strategy = \"fsdp\""),
        (["model.window_stride=4", "train.text_column=['text', 'text']"], r"windows are of one text"),
        (["model.window_stride=4", "model.truncation=tail"], r"windows begin at the head; leave one of the two out"),
        (["model.max_windows=4"], r"model.max_windows is set, but there are no windows; set model.window_stride"),
        (
            ["model.window_stride=62", "model.max_length=64"],
            r"max_length = 64 hold 62 tokens .* lower model.window_stride",
        ),
        (["decision.thresholds=f1"], r"decision.thresholds: each row of this data has one label"),
        (["lora.alpha=8"], r"there are no adapters; set lora.rank"),
        (["valid.path=NUMBERS_AS_LISTS"], r"valid.path .* is multi_label, in train.path it is multi_class"),
        (
            ["resources.num_workers=64"],
            r"num_workers = 64 .* the cluster has 1 nodes, 4 CPUs, 0 GPUs; lower .* at most 4",
        ),
        (["resources.use_gpu=true"], r"num_workers = 1 with a GPU and a CPU each, the cluster has room for 0"),
        (["model.base=/nowhere"], r"/nowhere: there is no such model folder"),
        (["model.base=package:no_such_package"], r"no such Python package is installed here"),
        (["model.base=EMPTY"], r"no config.json in it"),
        (["output.path=/proc/none"], r"output /proc/none: "),
    ],
)
def test_mistakes_end_before_any_weights_are_loaded(
    changes: list[str],
    message: str,
    data: dict[str, str],
    base: str,
    ray_session: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = {
        "STRANGE": pa.table({"text": ["a", "b", "c", "d"], "label": ["good", "god", "odd", "god"]}),
        "FLOATS": pa.table({"text": ["a", "b"], "label": [0.5, 1.5]}),
        "NUMBERS_AS_LISTS": pa.table({"text": ["a", "b"], "label": [["good"], ["bad"]]}),
    }
    fakes.write_archive(str(tmp_path), {f"{name}.parquet": table for name, table in tables.items()})
    (tmp_path / "EMPTY").mkdir()
    places = {name: f"{tmp_path}/{name}.parquet" for name in tables} | {
        "NOWHERE": f"{tmp_path}/none",
        "EMPTY": f"{tmp_path}/EMPTY",
    }
    argv = [
        f"train.path={data['train']}",
        f"valid.path={data['valid']}",
        f"model.base={base}",
        f"output.path={tmp_path}/out",
    ]
    for change in changes:
        key, _, value = change.partition("=")
        head, slash, rest = value.partition("/")
        argv.append(f"{key}={places.get(head, head)}{slash}{rest}")
    monkeypatch.setattr("lib.training.run_to_commit", None)
    with pytest.raises(UsageError, match=message) as caught:
        main([word for assignment in argv for word in ("--set", assignment)])
    assert caught.value.exit_code == 2


def test_a_base_without_safetensors_is_refused(
    base: str, data: dict[str, str], ray_session: None, tmp_path: Path
) -> None:
    for path in Path(base).iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no \*\.safetensors weights in it \(there are: config\.json"):
        train(configure(data, str(tmp_path), str(tmp_path / "out")), "night-1", cluster_facts())


def test_workers_get_as_many_cpus_as_fit() -> None:
    def place(num_workers: int, *nodes: Node, least: int | None = None) -> tuple[bool, int]:
        resources = {"num_workers": num_workers, "min_workers": least}
        config = configure({"train": "t", "valid": "v", "test": "t"}, "b", "o", resources=resources)
        return place_workers(config, Cluster(nodes))

    assert place(1, Node(4, 0)) == (False, 4)
    assert place(2, Node(4, 0)) == (False, 2)
    assert place(3, Node(4, 0)) == (False, 1)
    assert place(3, Node(8, 0), Node(4, 0)) == (False, 4)
    assert place(2, Node(0, 0), Node(8, 1), Node(8, 1)) == (True, 1)
    with pytest.raises(UsageError, match="room for 1"):
        place(2, Node(1, 4))
    assert place(8, Node(2, 0), Node(2, 0), least=2) == (False, 1)
    assert place(2, Node(8, 1), least=1) == (True, 1)
    with pytest.raises(
        UsageError, match=r"min_workers = 2 with a CPU each, .* lower resources.min_workers to at most 1"
    ):
        place(8, Node(1, 0), least=2)
    with pytest.raises(UsageError, match=r"min_workers = 3 is more than resources.num_workers = 2"):
        place(2, Node(8, 0), least=3)


# recipes


def workers_started() -> int:
    """Training workers that this session's Ray has had."""
    actors: dict[str, dict[str, Any]] = ray._private.state.actors()
    return sum(one["ActorClassName"] == "RayTrainWorker" for one in actors.values())


def test_rows_that_are_known_from_training_are_counted_dropped_or_refused(
    data: dict[str, str], base: str, ray_session: None, tmp_path: Path
) -> None:
    """Two thirds of the validation rows are training rows here, and two of the others test rows."""
    texts, labels = make_rows(TRAIN_ROWS, 1)
    mixed, answers = make_rows(10, 6)
    known, truth = make_rows(TEST_ROWS, 3)
    table = pa.table({"text": [*texts[:20], *known[:2], *mixed[2:]], "label": [*labels[:20], *truth[:2], *answers[2:]]})
    fakes.write_archive(str(tmp_path), {"mixed.parquet": table})
    places = data | {"valid": f"{tmp_path}/mixed.parquet"}

    def run(duplicates: str) -> dict[str, Any]:
        config = configure(
            places, base, str(tmp_path / duplicates), data={"duplicates": duplicates}, optim={"epochs": 1}
        )
        return train(config, "night-1", cluster_facts())

    found = run("drop")
    assert found["known_from_training"] == {"valid": 20, "test": 0}
    assert found["known_from_validation"] == {"test": 2}
    assert found["rows"] == {"train": TRAIN_ROWS - 20, "valid": 28, "test": TEST_ROWS}
    before = workers_started()
    with pytest.raises(UsageError, match=r"20 of 30 valid rows have the text of a training row, expected at most 0.1%"):
        run("refuse")
    assert workers_started() - before == 1, "it would be refused again"


def test_a_run_whose_list_of_states_was_cut_off_begins_anew(
    data: dict[str, str], base: str, ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a driver leaves it that is killed while Ray Train writes it."""
    config = configure(data, base, str(tmp_path / "out"), optim={"epochs": 1})
    folder = open_store(f"{tmp_path}/out/{RUNS_FOLDER}/night-1")
    claim(folder, config, "night-1")
    folder.replace(STATES_NAME, b'{"ray_version": "2.60.0", "checkpoint_results": [{"checkpoint_dir')
    assert train(config, "night-1", cluster_facts())["history"]
    assert "was cut off while it was written" in capsys.readouterr().err


@pytest.mark.parametrize("cut_off", [1, 2])
def test_a_state_that_was_cut_off_is_passed_over(
    cut_off: int,
    data: dict[str, str],
    base: str,
    uninterrupted: tuple[Weights, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The last one, by a full disk: the one before it is gone on from. Without any, training begins anew, and says so."""
    monkeypatch.setattr("lib.workers.MAX_FAILURES", 0)
    config = configure(data, base, str(tmp_path / "killed"), **INTERRUPTED, resources={"num_workers": 2})
    with killing(tmp_path / "killed", 2, listed=2), pytest.raises(IncompleteError, match="workers died"):
        train(config, "night-1", cluster_facts())
    states = tmp_path / "killed" / RUNS_FOLDER / "night-1" / STATES_FOLDER
    listed = states_of(tmp_path / "killed")
    assert len(listed) == 2
    steps = [torch.load(states / name / "state.pt", weights_only=True)["progress"]["step"] for name in listed]
    for name in listed[-cut_off:]:
        os.truncate(states / name / "state.pt", 1_000)
    found = train(config, "night-1", cluster_facts())
    assert found["resumed_after"] == steps[:-cut_off]
    assert [entry["step"] for entry in found["history"]] == list(range(1, 19))
    assert difference(uninterrupted[0], weights_of(config.output.path)) < 1e-6
    said = capfd.readouterr()
    text = said.out + said.err
    assert f"{listed[-1]}/state.pt cannot be read (" in text
    assert ("the one before it is taken" in text, "training begins anew" in text) == (True, cut_off == 2)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_no_number_ends_the_run_with_its_batch(
    precision: str, data: dict[str, str], base: str, ray_session: None, tmp_path: Path
) -> None:
    config = configure(
        data,
        base,
        str(tmp_path / "nan"),
        model={"precision": precision},
        optim={"learning_rate": 1e30, "warmup_fraction": 0.0},
        resources={"num_workers": 2},
    )
    said = r"no finite number from step [2-6] \(epoch 1\) on; its batch were the training rows [ab]\.parquet: [0-9, ]+.* and 8 more; "
    said += "lower optim" if precision == "fp32" else "set model.precision to bf16 or fp32, .* or lower optim"
    with pytest.raises(UsageError, match=said):
        train(config, "night-1", cluster_facts())


def test_two_workers_unfreeze_and_weigh_as_one_does(
    data: dict[str, str], base: str, ray_session: None, tmp_path: Path
) -> None:
    """One layer more each epoch: what gradients two workers exchange changes in between."""
    found = []
    for workers in (1, 2):
        config = configure(
            data,
            base,
            str(tmp_path / str(workers)),
            train={"weight_column": "weight"},
            data={"label_noise": True},
            loss={"class_weights": "balanced"},
            optim={"unfreeze_layers": 1, "schedule": "cosine"},
            resources={"num_workers": workers},
        )
        found.append((train(config, "night-1", cluster_facts()), weights_of(config.output.path)))
    assert found[0][0]["dropped"]["train"]["no weight"] == 2
    assert_same_learning(found[0][0], found[1][0])
    assert difference(found[0][1], found[1][1]) < 1e-5
    noise = [metrics["label_noise"] for metrics, _ in found]
    assert noise[0]["rows"] == found[0][0]["rows"]["train"]
    assert [one["row"] for one in noise[0]["listed"]] == [one["row"] for one in noise[1]["listed"]]
    assert "Labels that look wrong" in (tmp_path / "2" / "report.html").read_text()
    before = load_file(Path(base) / "model.safetensors")
    same = {name for name, one in before.items() if torch.equal(one, found[0][1][f"bert.{name}"])}
    assert {name.split(".")[0] for name in same} == {"embeddings", "encoder"}
    assert not [name for name in same if "layer.1." in name], "the second epoch's layer has learned"
    assert [name for name in before if "layer.0." in name and name not in same] == []


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_windows_are_learned_from_and_stand_in_the_card(
    strategy: str, base: str, ray_session: None, tmp_path: Path
) -> None:
    """What decides stands behind the length that the model takes, in another window; against transformers' windows."""
    rows: dict[str, tuple[list[str], list[str]]] = {}
    for name, count in (("train", 96), ("valid", 40), ("test", 40)):
        texts, labels = make_rows(count, len(rows))
        rows[name] = ([f"{fakes.PROSE[:60]} {text}" for text in texts], labels)
        fakes.write_archive(str(tmp_path), {f"{name}.parquet": pa.table({"text": rows[name][0], "label": labels})})
    paths = {name: f"{tmp_path}/{name}.parquet" for name in rows}
    windows = {"max_length": 16, "window_stride": 4, "window_pooling": "max", "max_windows": 12}
    config = configure(
        paths, base, f"{tmp_path}/out", model=windows, resources={"num_workers": 2, "strategy": strategy}
    )
    with_texts = config.output.model_copy(update={"report_text": True})
    config = config.model_copy(update={"output": with_texts})
    found = train(config, "night-1", cluster_facts())
    card = checkpoint.load(str(tmp_path / "out")).card
    assert card.windows == Windows(4, 12, "max")
    assert "at most 12 windows of 16 tokens that share 4" in (tmp_path / "out" / "README.md").read_text()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    texts, labels = rows["test"]
    assert found["errors"], "a model of twelve steps errs"
    for each in found["errors"]:
        ids = tokenizer(texts[each["row"]])["input_ids"]
        assert each["text"] == tokenizer.decode(ids, skip_special_tokens=True)
        explained = each["explained"]
        assert (explained["label"], explained["steps"] <= 64) == (each["answered"], True)
        assert explained["value"] == pytest.approx(math.log(each["score"] / (1 - each["score"])), abs=1e-3)
        values = [value for _, _, value in explained["words"]]
        assert sum(values) == pytest.approx(explained["value"] - explained["without"], abs=0.02 * sum(map(abs, values)))
    assert found["unexplained"] is None
    report = lxml.html.fromstring((tmp_path / "out" / "report.html").read_text())
    assert [cell.text_content() for cell in report.find_class("text")] == [each["text"] for each in found["errors"]]
    assert report.xpath("//td[@class='text']/mark")
    logits = []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, truncation=True, max_length=16, stride=4, return_overflowing_tokens=True)["input_ids"]
            assert 2 < len(ids) <= 12, "several windows, and nothing cut off"
            logits.append(torch.cat([model(torch.tensor([one])).logits for one in ids]).amax(0))
    targets = torch.tensor([LABELS.index(label) for label in labels])
    loss = torch.nn.functional.cross_entropy(torch.stack(logits), targets)
    assert found["test"]["loss"] == pytest.approx(float(loss), abs=1e-4)


def test_adapters_are_merged_into_a_plain_checkpoint(
    data: dict[str, str], base: str, ray_session: None, tmp_path: Path
) -> None:
    config = configure(
        data,
        base,
        str(tmp_path / "lora"),
        model={"max_length": 12, "truncation": "head_tail"},
        lora={"rank": 4},
        optim={"learning_rate": 5e-3, "epochs": 4},
        resources={"num_workers": 2},
    )
    metrics = train(config, "night-1", cluster_facts())
    texts, labels = make_rows(TEST_ROWS, 3)
    whole = AutoTokenizer.from_pretrained(config.output.path)
    plain = AutoModelForSequenceClassification.from_pretrained(config.output.path).eval()
    logits = []
    for text in texts:
        ids = whole(text, verbose=False)["input_ids"]
        kept = ids if len(ids) <= 12 else [*ids[:4], *ids[-8:]]
        with torch.no_grad():
            logits.append(plain(torch.tensor([kept])).logits[0])
    truth = [LABELS.index(label) for label in labels]
    assert metrics["test"]["confusion"] == confusion_matrix(truth, torch.stack(logits).argmax(1)).tolist()
    loaded = checkpoint.load(config.output.path)
    tokens = checkpoint.tokenizer_of(loaded).encode(texts)
    found = Predictor(loaded, "fp32").probabilities(tokens.ids, tokens.offsets)
    assert np.abs(found - torch.stack(logits).softmax(-1).numpy()).max() < 1e-4, "scoring cuts as training did"
    before, after = load_file(Path(base) / "model.safetensors"), weights_of(config.output.path)
    changed = {name for name, one in before.items() if not torch.equal(one, after[f"bert.{name}"])}
    assert {name.rpartition("self.")[2] for name in changed if "layer" in name} == {"query.weight", "value.weight"}


def test_a_number_is_learned_and_scored(base: str, ray_session: None, tmp_path: Path) -> None:
    """How good a text is, in whole numbers with a few that are none, from a set without validation rows; then an archive is scored."""
    texts, labels = make_rows(TRAIN_ROWS, 1)
    numbers: list[float | None] = [float(LABELS.index(label)) - 1 for label in labels]
    numbers[:3] = [None, float("nan"), float("inf")]
    tested, answers = make_rows(TEST_ROWS, 3)
    truth = [LABELS.index(label) - 1 for label in answers]
    fakes.write_archive(
        str(tmp_path),
        {
            "train.parquet": pa.table({"text": texts, "stars": pa.array(numbers, pa.float32())}),
            "test.parquet": pa.table({"text": tested, "stars": pa.array(truth, pa.int8())}),
        },
    )
    paths = {"train": f"{tmp_path}/train.parquet", "valid": "", "test": f"{tmp_path}/test.parquet"}
    config = configure(
        paths,
        base,
        str(tmp_path / "model"),
        train={"label_column": "stars", "regression": True},
        valid={"path": None, "fraction": 0.25},
        optim={"epochs": 6, "learning_rate": 3e-3},
        stopping={"metric": None},
    )
    found = train(config, "night-1", cluster_facts())
    assert found["dropped"]["train"] == {"null label": 1, "label that is no finite number": 2}
    assert (found["metric"], found["labels"], found["rows"]["valid"]) == ("loss", ["stars"], 20)

    expected = score_plainly(config.output.path, tested)[:, 0].numpy()
    assert found["test"]["loss"] == pytest.approx(mean_squared_error(truth, expected), abs=1e-5)
    assert found["test"]["mean_absolute_error"] == pytest.approx(mean_absolute_error(truth, expected), abs=1e-5)
    assert found["test"]["pearson"] == pytest.approx(np.corrcoef(truth, expected)[0, 1], abs=1e-5)
    ranks = pd.Series(expected).corr(pd.Series(truth), method="spearman")
    assert found["test"]["spearman"] == pytest.approx(ranks, abs=1e-5)
    assert ranks > 0.5
    loaded = checkpoint.load(config.output.path)
    assert (loaded.facts.task, loaded.card.labels) == (Task.REGRESSION, ("stars",))
    tokens = checkpoint.tokenizer_of(loaded).encode(tested)
    scores = Predictor(loaded, "fp32", "auto").probabilities(tokens.ids, tokens.offsets)
    assert scores[:, 0] == pytest.approx(expected, abs=1e-4)

    for changes, said in (
        ({"train": {"label_column": "stars"}}, r"'stars' is float, expected strings.*train.regression = true"),
        ({"train": {"label_column": "text", "regression": True}}, "'text' is string, train.regression expects numbers"),
        ({"stopping": {"metric": "accuracy"}}, "stopping.metric = accuracy: this data is regression; choose from loss"),
        ({"decision": {"abstain": 0.9}}, r"decision.abstain: it is for classes"),
        ({"data": {"label_noise": True}}, r"data.label_noise looks at rows with one label each, .* are regression"),
    ):
        values: dict[str, Any] = {
            "train": {"label_column": "stars", "regression": True},
            "valid": {"path": None},
            **changes,
        }
        with pytest.raises(UsageError, match=said):
            train(configure(paths, base, str(tmp_path / "other"), **values), "night-1", cluster_facts())
