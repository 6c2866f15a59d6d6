"""Contrastive tuning: which pairs are drawn, what the head answers, the same weights for the same seed, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn.linear_model import LogisticRegression

from lib.config import validate
from lib.contrastive import check_contrastive, draw_pairs, fit_head, head_of, tune
from lib.errors import UsageError
from lib.learning import Team
from lib.mapped import Subset
from lib.model import new_classifier
from lib.schema import Task
from lib.train_config import ContrastiveSection, HeadSection, TrainConfig
from tests import fakes
from tests.labelled import LABELS, make_set

ALONE = Team(rank=0, size=1, device=torch.device("cpu"), dtype=torch.float32)


def make(folder: Path, labels: tuple[str, ...] = LABELS) -> Any:
    if not (folder / "bert").exists():
        fakes.make_encoder(folder / "bert", "bert")
    return new_classifier(str(folder / "bert"), labels, Task.MULTI_CLASS, 0.1, 0, head=HeadSection(pooling="mean"))


def test_each_row_has_as_many_pairs_of_both_kinds() -> None:
    targets = np.array([0, 0, 0, 1, 1, 2])
    firsts, seconds, same = draw_pairs(targets, 4, 0)
    assert np.bincount(firsts[same == 1]).tolist() == np.bincount(firsts[same == 0]).tolist() == [4] * 6
    assert ((targets[firsts] == targets[seconds]) == (same == 1)).all()
    assert (firsts != seconds)[(same == 0) | (firsts != 5)].all(), "with itself is a row only that is alone"
    again, other = draw_pairs(targets, 4, 0), draw_pairs(targets, 4, 1)
    assert np.array_equal(seconds, again[1]) and not np.array_equal(seconds, other[1])


@pytest.mark.parametrize("labels", [LABELS[:2], LABELS], ids=len)
def test_the_head_answers_what_the_logistic_regression_does(labels: tuple[str, ...], tmp_path: Path) -> None:
    model = make(tmp_path, labels).eval()
    chance = np.random.default_rng(0)
    targets = np.arange(30) % len(labels)
    texts = (chance.normal(size=(30, model.config.hidden_size)) + targets[:, None]).astype(np.float32)
    fit_head(model, texts, targets)
    expected = LogisticRegression(max_iter=1000).fit(texts, targets).predict_proba(texts)
    with torch.no_grad():
        found = model.head(torch.from_numpy(texts)).softmax(-1).numpy()
    assert np.abs(found - expected).max() < 1e-5
    with pytest.raises(UsageError, match=rf"label '{labels[1]}' has no training row left"):
        fit_head(model, texts[:2], targets[:2] * 0)


def test_rows_of_a_label_come_closer_and_the_same_seed_gives_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # as Ray Train sets it
    data = make_set(tmp_path / "set.arrow", [LABELS[row % 3] for row in range(12)])
    rows = Subset(data, np.arange(12))
    wanted = ContrastiveSection(iterations=4, epochs=6, batch_size=9, learning_rate=3e-3)

    def run(seed: int) -> tuple[Any, float]:
        model = make(tmp_path)
        steps, loss = tune(model, rows, wanted, seed, ALONE)
        assert steps == 6 * 11, "96 pairs are ten batches of 9 and one of 6"
        return model, loss

    def closeness(model: Any) -> float:
        """Mean cosine similarity of rows of the same label, less that of others, by plain transformers."""
        encoder = transformers.AutoModel.from_pretrained(tmp_path / "bert").eval()
        encoder.load_state_dict(model.encoder.state_dict(), strict=False)
        with torch.no_grad():
            texts = [
                encoder(torch.from_numpy(data.ids_of(row))[None]).last_hidden_state.mean(1)[0] for row in range(12)
            ]
        units = torch.nn.functional.normalize(torch.stack(texts), dim=-1)
        same = torch.from_numpy(data.targets[:, None] == data.targets) & ~torch.eye(12, dtype=torch.bool)
        return float((units @ units.T)[same].mean() - (units @ units.T)[~same].mean())

    model, loss = run(3)
    assert closeness(model) > closeness(make(tmp_path)) + 0.3
    assert 0 < loss < 0.5
    again, other = (run(seed)[0].state_dict() for seed in (3, 4))
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert not all(torch.equal(value, other[name]) for name, value in model.state_dict().items())
    assert all(one.requires_grad for one in model.parameters())


def test_an_encoder_that_came_apart_is_told_of(tmp_path: Path) -> None:
    data = make_set(tmp_path / "set.arrow", [LABELS[row % 3] for row in range(12)])
    wanted = ContrastiveSection(iterations=2, epochs=2, learning_rate=1e30)
    with pytest.raises(
        UsageError, match=r"12 of 12 training rows have features .* after 6 steps .* lower contrastive.learning_rate"
    ):
        tune(make(tmp_path), Subset(data, np.arange(12)), wanted, 0, ALONE)


def test_without_pairs_the_encoder_stays_as_it_is(tmp_path: Path) -> None:
    data = make_set(tmp_path / "set.arrow", [LABELS[row % 3] for row in range(12)])
    before, model = make(tmp_path).encoder.state_dict(), make(tmp_path)
    assert tune(model, Subset(data, np.arange(12)), ContrastiveSection(iterations=0), 0, ALONE) == (0, 0.0)
    assert all(torch.equal(one, before[name]) for name, one in model.encoder.state_dict().items())
    assert model.head[-1].weight.abs().max() > 0.1, "fitted, not as it was drawn"


def configure(**sections: dict[str, Any]) -> TrainConfig:
    values: dict[str, dict[str, Any]] = {name: {"path": "x"} for name in ("train", "output")} | {"model": {"base": "x"}}
    for name, section in {"contrastive": {"iterations": 2}, **sections}.items():
        values.setdefault(name, {}).update(section)
    return validate(TrainConfig, values)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"contrastive": {"iterations": None, "epochs": 2}},
            r"contrastive\.epochs is set, but there is no contrastive",
        ),
        (
            {"optim": {"epochs": 3, "seed": 1}},
            r"optim\.epochs with contrastive\.iterations: there is no ordinary training",
        ),
        ({"loss": {"kind": "focal"}}, r"loss\.kind with contrastive.iterations: the head is a logistic regression"),
        ({"stopping": {"patience": 2}}, r"stopping\.patience with .* one evaluation"),
        ({"lora": {"rank": 2}}, r"lora\.rank with .* the whole encoder is tuned"),
        ({"resources": {"num_workers": 2}}, r"resources\.num_workers = 2 with .* by one worker"),
        ({"resources": {"strategy": "fsdp"}}, r'resources\.strategy = "fsdp" with .* by one worker'),
        ({"model": {"freeze_layers": 1}}, r"model\.freeze_layers with .* the whole encoder"),
        ({"model": {"window_stride": 8}}, r"model\.window_stride with .* not of their windows"),
        ({"model": {"compile": True}}, r"model\.compile with"),
        ({"head": {"hidden_sizes": (8,)}}, r"head\.hidden_sizes with .* logistic regression"),
        ({"head": {"dropout": 0.2}}, r"head\.dropout with .* logistic regression"),
        (
            {"train": {"path": None}, "tasks": {"a": {"path": "x"}, "b": {"path": "y"}}},
            r"tasks with .* pairs are of one labelled set",
        ),
        ({"train": {"weight_column": "w"}}, r"train\.weight_column with .* pairs have no weights"),
        ({"train": {"text_column": ["a", "b"]}}, r"train\.text_column of two with .* two single texts"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_contrastive(configure(**sections))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_contrastive(configure(optim={"seed": 3}, stopping={"keep": "last"}))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UsageError, match=r"needs sentence-transformers, .*pip install 'sentence-transformers\[train\]'"
    ):
        check_contrastive(configure())
    check_contrastive(configure(contrastive={"iterations": 0}))


def test_texts_are_the_mean_of_their_tokens_if_nothing_else_is_said() -> None:
    assert head_of(configure()).pooling == "mean"
    assert head_of(configure(head={"layer": 1, "pooling": "max"})).pooling == "max"
    assert not head_of(configure(contrastive={"iterations": None})).is_own
