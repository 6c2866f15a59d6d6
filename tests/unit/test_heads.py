"""Heads of our own in every family: what they read against plain transformers, and the way to a checkpoint and back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lib import checkpoint
from lib.errors import UsageError
from lib.learning import Learner, Team
from lib.loss import Objective
from lib.model import load_classifier, new_classifier
from lib.predictor import Predictor
from lib.schema import Task
from lib.tokenization import load_tokenizer
from lib.train_config import HeadSection, OptimSection
from tests import fakes
from tests.labelled import LABELS, make_set

TEXTS = [
    "The harbour was quiet.",
    "Never buy it, please: it broke after one month, and the money is gone.",
    "Well done",
]
WITH_POOLER = {"bert", "roberta", "albert", "mpnet", "xlm-roberta"}
POOLINGS: list[dict[str, Any]] = [
    {"pooling": "first", "hidden_sizes": (8,)},
    {"pooling": "pooler"},
    {"pooling": "mean", "hidden_sizes": (8, 6), "activation": "tanh"},
    {"pooling": "max"},
    {"pooling": "mean", "layer": "last_4"},
    {"layer": 1},
]


def make(folder: Path, family: str, head: HeadSection) -> Any:
    fakes.make_encoder(folder / family, family)
    return new_classifier(str(folder / family), LABELS, Task.MULTI_CLASS, 0.0, 7, head=head).eval()


def encode(folder: str) -> dict[str, torch.Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("family", fakes.FAMILIES)
@pytest.mark.parametrize("options", POOLINGS, ids=str)
def test_the_head_reads_what_it_says(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Written out plainly from the hidden states that transformers gives, one text at a time."""
    head = HeadSection(**options)
    if head.pooling == "pooler" and family not in WITH_POOLER:
        with pytest.raises(UsageError, match=f"{family} encoders have none; choose first, mean or max"):
            make(tmp_path, family, head)
        return
    model = make(tmp_path, family, head)
    plain = transformers.AutoModel.from_pretrained(tmp_path / family, output_hidden_states=True).eval()
    inputs = encode(str(tmp_path / family))
    with torch.no_grad():
        found = model(**inputs).logits
        for row, (ids, mask) in enumerate(zip(*inputs.values(), strict=True)):
            output = plain(input_ids=ids[mask.bool()][None])
            if head.layer == "last_4":
                tokens = torch.stack(output.hidden_states[1:][-4:]).mean(0)[0]
            else:
                tokens = output.hidden_states[head.layer or len(output.hidden_states) - 1][0]
            pooled = {
                "first": tokens[0],
                "mean": tokens.mean(0),
                "max": tokens.max(0).values,
                "pooler": getattr(output, "pooler_output", [None])[0],
            }[head.pooling or "first"]
            linear = [one for one in model.head if isinstance(one, torch.nn.Linear)]
            assert [one.out_features for one in linear] == [*head.hidden_sizes, len(LABELS)]
            for one in linear[:-1]:
                pooled = one(pooled)
                pooled = pooled.tanh() if head.activation == "tanh" else torch.nn.functional.gelu(pooled)
            is_normed = family == "modernbert" and head.layer == 1  # its last layer's states are normed
            expected = linear[-1](plain.final_norm(pooled) if is_normed else pooled)
            assert torch.allclose(found[row], expected, atol=1e-5)


@pytest.mark.parametrize("family", fakes.FAMILIES)
@pytest.mark.parametrize("options", [one for one in POOLINGS if one.get("pooling") != "pooler"], ids=str)
def test_every_weight_learns_and_the_checkpoint_gives_the_same_answers(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = make(tmp_path, family, HeadSection(**options))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    alone = Team(rank=0, size=1, device=torch.device("cpu"), dtype=torch.float32)
    learner = Learner(model, OptimSection(learning_rate=1e-2), Objective(task=Task.MULTI_CLASS), alone, 2)
    learner.step(0, make_set(tmp_path / "set.arrow", [LABELS[row % 3] for row in range(16)]), np.arange(16))
    learned = dict(model.named_parameters())
    assert [name for name, one in learned.items() if torch.equal(one, before[name])] == []
    folder = tmp_path / "saved"
    folder.mkdir()
    model.save_pretrained(str(folder))
    fakes.save_tokenizer(folder, family)
    inputs = encode(str(folder))
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        assert torch.allclose(load_classifier(str(folder))(**inputs).logits, expected, atol=1e-6)
    loaded = checkpoint.load(str(folder), 64)
    assert loaded.facts.labels == LABELS
    tokens = load_tokenizer(str(folder), 64).encode(TEXTS)
    predictor = Predictor(loaded, "fp32")
    found = predictor.probabilities(tokens.ids, tokens.offsets)
    assert predictor.engine.name == "openvino"
    assert np.abs(found - expected.softmax(-1).numpy()).max() < 1e-4


def test_the_same_seed_draws_the_same_head(tmp_path: Path) -> None:
    head = HeadSection(pooling="mean", hidden_sizes=(8,))
    first, second = (make(tmp_path, "bert", head).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_is_before_each_layer_of_the_head(tmp_path: Path) -> None:
    model = make(tmp_path, "bert", HeadSection(dropout=0.3, hidden_sizes=(8, 6)))
    parts = [type(one).__name__ for one in model.head]
    assert parts == ["Dropout", "Linear", "GELU", "Dropout", "Linear", "GELU", "Dropout", "Linear"]
    assert [one.p for one in model.head if isinstance(one, torch.nn.Dropout)] == [0.3, 0.3, 0.3]


def test_layers_that_are_not_there_and_two_that_clash_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"head\.layer = 3, but model.base has 2 layers"):
        make(tmp_path, "bert", HeadSection(layer=3))
    with pytest.raises(UsageError, match="leave one of the two out"):
        make(tmp_path, "bert", HeadSection(pooling="pooler", layer="last_4"))


@pytest.mark.parametrize("head", [[], [torch.nn.Dropout(), torch.nn.Linear(fakes.HIDDEN_SIZE, 1)]], ids=["no", "other"])
def test_a_checkpoint_without_its_head_is_named(head: list[torch.nn.Module], tmp_path: Path) -> None:
    model = make(tmp_path, "bert", HeadSection(pooling="mean"))
    model.head = torch.nn.Sequential(*head)
    (tmp_path / "saved").mkdir()
    model.save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(UsageError, match=r"does not fit its config.json \(head\.1\.bias, head\.1\.weight\)"):
        load_classifier(str(tmp_path / "saved"))
