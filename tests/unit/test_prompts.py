"""Masked prompts in nine families: the template is never cut, and words are read at its mask, against plain transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from lib import checkpoint
from lib.attribution import explain_texts
from lib.checkpoint import vector_type
from lib.config import Truncation, validate
from lib.errors import UsageError
from lib.predictor import Predictor
from lib.score_config import ScoreConfig, ZeroShotConfig
from lib.tokenization import Tokenizer
from lib.zero_shot import make_zero_shot
from tests import fakes

TEXTS = ["The harbour was quiet.", "Never [MASK] buy it, <mask>: it broke.", "Well done", "quiet harbour " * 60]
WORDS = {"down": ["not"], "up": ["the", "a"]}
MAX_LENGTH = 40


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A masked language model."""
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(fakes.make_config(request.param)).save_pretrained(tmp_path / "base")
    fakes.save_tokenizer(tmp_path / "base", request.param)
    return tmp_path / "base"


def configure(base: Path, template: str, words: dict[str, Any] = WORDS, **model: Any) -> ZeroShotConfig:
    file = base.parent / "words.toml"
    file.write_text("\n".join(f"{label} = {several!r}" for label, several in words.items()))
    values = {
        "labels": {"file": str(file)},
        "model": {"base": str(base), "max_length": MAX_LENGTH, **model},
        "prompt": {"template": template},
        "output": {"path": str(base.parent / "checkpoint")},
    }
    return validate(ZeroShotConfig, values)


@pytest.mark.parametrize("base", fakes.FAMILIES, indirect=True)
def test_words_are_read_at_the_templates_mask(base: Path) -> None:
    """Also where a text holds the name of the mask, or is so long that it is cut."""
    make_zero_shot(configure(base, "{text} It was [MASK]."), "night-1")
    loaded = checkpoint.load(str(base.parent / "checkpoint"))
    assert loaded.facts.labels == ("down", "up")
    tokens = checkpoint.tokenizer_of(loaded).encode(TEXTS)
    assert tokens.truncated.tolist() == [False, False, False, True]
    assert tokens.lengths[3] == MAX_LENGTH
    plain = AutoTokenizer.from_pretrained(base)
    model = AutoModelForMaskedLM.from_pretrained(base).eval()
    words = [plain(f" {word}", add_special_tokens=False)["input_ids"] for several in WORDS.values() for word in several]
    expected = []
    for text, start, end in zip(TEXTS, tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        ids = tokens.ids[start:end].tolist()
        whole = plain(f"{text} It was {plain.mask_token}.")["input_ids"]
        if text == TEXTS[3]:
            cut = len(whole) - len(ids)
            tail = next(place for place in range(len(ids)) if whole[place + cut :] == ids[place:])
            assert tail > 0 and ids[:tail] == whole[:tail], "what is left out is the end of the text"
        else:
            assert ids == whole
        place = max(index for index, one in enumerate(ids) if one == plain.mask_token_id)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, place]
        (down,), (the,), (a,) = (logits[one] for one in words)
        expected.append(torch.stack([down, (the + a) / 2]).softmax(-1).numpy())
    for engine in ("torch", "openvino"):
        found = Predictor(loaded, "fp32", engine).probabilities(tokens.ids, tokens.offsets)
        assert np.abs(found - np.stack(expected)).max() < 1e-5


@pytest.mark.parametrize("base", ["bert", "roberta"], indirect=True)
@pytest.mark.parametrize("truncation", ["head", "tail", "head_tail"])
def test_a_template_may_stand_before_the_text_and_is_never_cut(base: Path, truncation: Truncation) -> None:
    make_zero_shot(configure(base, "and [MASK] quiet: {text}", truncation=truncation), "night-1")
    loaded = checkpoint.load(str(base.parent / "checkpoint"))
    texts = [*TEXTS, " ".join(f"{number}" for number in range(90))]
    tokens = checkpoint.tokenizer_of(loaded).encode(texts)
    before = loaded.facts.prompt
    assert before is not None and not before.behind
    room = MAX_LENGTH - len(before)
    alone = Tokenizer(str(base), room, truncation=truncation).encode(texts)
    for row, length in enumerate(tokens.lengths):
        ids = tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]].tolist()
        text = alone.ids[alone.offsets[row] : alone.offsets[row + 1]].tolist()
        assert length <= MAX_LENGTH
        assert ids == [text[0], *before.before, *text[1:]]
    plain = AutoTokenizer.from_pretrained(base)
    model = AutoModelForMaskedLM.from_pretrained(base).eval()
    ids = torch.tensor([tokens.ids[: tokens.lengths[0]].tolist()])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, ids[0].tolist().index(plain.mask_token_id)]
    first = [logits[plain(f" {one}", add_special_tokens=False)["input_ids"][0]] for one in ("not", "the", "a")]
    expected = torch.stack([first[0], (first[1] + first[2]) / 2]).softmax(-1).numpy()
    found = Predictor(loaded, "fp32", "torch").probabilities(tokens.ids, tokens.offsets)[0]
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("base", ["bert"], indirect=True)
@pytest.mark.parametrize(
    ("template", "words", "model", "message"),
    [
        ("{text} It was.", WORDS, {}, r"expected \{text\} once and \[MASK\] once"),
        ("It was [MASK].", WORDS, {}, r"expected \{text\} once"),
        (
            "{text} It was [MASK].",
            {"x": ["broken ships"], "y": ["a"]},
            {},
            r"the word 'broken ships' .* expected one token",
        ),
        ("{text} It was [MASK].", {"x": ["a"]}, {}, r"1 labels, expected at least 2"),
        ("{text} It was [MASK].", {"x": ["a"], "y": []}, {}, r"label 'y' has \[\], expected a description"),
        ("{text} " + "It was " * 40 + "[MASK].", WORDS, {}, r"max_length = 40 leaves no room for the text"),
        ("{text} It was [MASK].", WORDS, {"temperature": 0.1}, r"model.temperature with prompt.template"),
    ],
)
def test_what_cannot_be_a_prompt_is_refused(
    base: Path, template: str, words: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_zero_shot(configure(base, template, words, **model), "night-1")
    assert not (base.parent / "checkpoint" / "config.json").exists()


def test_a_base_without_a_language_head_or_a_mask_is_refused(tmp_path: Path) -> None:
    fakes.make_encoder(tmp_path / "base", "bert")
    config = configure(tmp_path / "base", "{text} It was [MASK].")
    with pytest.raises(UsageError, match=r"no masked-language head \(cls\..* take a base that has one"):
        make_zero_shot(config, "night-1")
    tokenizer = fakes.bert_tokenizer()
    tokenizer.mask_token = None
    fakes.make_encoder(tmp_path / "other", "bert")
    tokenizer.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(UsageError, match=r"no mask token in its tokenizer"):
        make_zero_shot(configure(tmp_path / "other", "{text} It was [MASK]."), "night-1")


@pytest.mark.parametrize("base", ["bert"], indirect=True)
def test_a_template_goes_around_single_texts_alone(base: Path) -> None:
    make_zero_shot(configure(base, "{text} It was [MASK]."), "night-1")
    tokenizer = checkpoint.tokenizer_of(checkpoint.load(str(base.parent / "checkpoint")))
    with pytest.raises(ValueError, match="around a pair of texts"):
        tokenizer.encode(["a"], ["b"])


@pytest.mark.parametrize("base", ["bert"], indirect=True)
def test_an_answer_at_a_mask_is_explained_and_no_vector_is_made_of_the_template(base: Path) -> None:
    make_zero_shot(configure(base, "{text} It was [MASK]."), "night-1")
    loaded = checkpoint.load(str(base.parent / "checkpoint"))
    tokens = checkpoint.tokenizer_of(loaded).encode(TEXTS[:1])
    scores = Predictor(loaded, "fp32", "torch").probabilities(tokens.ids, tokens.offsets)
    ((found,),) = explain_texts(loaded, TEXTS[:1], scores)
    assert found.converged
    assert found.value == pytest.approx(float(np.log(scores.max() / scores.min())), abs=1e-4)
    values = {"input": {"path": "/x"}, "model": {"path": loaded.url}, "output": {"path": "/y", "embedding": "float16"}}
    with pytest.raises(UsageError, match=r"output\.embedding: .* has a template around each text"):
        vector_type(validate(ScoreConfig, values), loaded)
