"""The predictor when something goes wrong: memory that runs out, and a model that answers with no number."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib import checkpoint
from lib.engine import TorchEngine
from lib.errors import UsageError
from lib.predictor import Predictor
from lib.schema import PredictionSchema, Task, to_results
from lib.tokenization import Tokens, load_tokenizer

TEXTS = [f"the parcel came {'very ' * (index % 9)}late again, number {index}" for index in range(60)]


@pytest.fixture
def predictor(classifier: str) -> Predictor:
    return Predictor(checkpoint.load(classifier), "fp32", "torch", token_budget=512)


@pytest.fixture
def tokens(predictor: Predictor) -> Tokens:
    card = predictor.checkpoint.card
    return load_tokenizer(predictor.checkpoint.folder, card.max_length).encode(TEXTS)


def limit_memory(predictor: Predictor, monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """No GPU here: a forward pass over more than `most` padded tokens raises what CUDA would. Returns the sizes tried."""
    assert isinstance(predictor.engine, TorchEngine)
    forward = predictor.engine.model.forward
    tried: list[int] = []

    def limited(input_ids: torch.Tensor, **others: Any) -> Any:
        tried.append(input_ids.numel())
        if input_ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(input_ids=input_ids, **others)

    monkeypatch.setattr(predictor.engine.model, "forward", limited)
    return tried


def test_memory_that_runs_out_halves_the_budget_for_good_and_costs_no_row(
    predictor: Predictor, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = predictor.probabilities(tokens.ids, tokens.offsets)
    tried = limit_memory(predictor, monkeypatch, most=130)
    found = predictor.probabilities(tokens.ids, tokens.offsets)
    assert max(tried) > 130, "memory must have run out"
    assert np.abs(found - expected).max() < 1e-5
    assert predictor.token_budget <= 130
    assert "going on with" in capfd.readouterr().err
    tried.clear()
    predictor.probabilities(tokens.ids, tokens.offsets)
    assert max(tried) <= 130, "the smaller budget is remembered"


def test_a_single_text_that_does_not_fit_is_named(
    predictor: Predictor, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(predictor, monkeypatch, most=5)
    with pytest.raises(UsageError, match=r"a single text of \d+ tokens does not fit .* model\.max_length"):
        predictor.probabilities(tokens.ids, tokens.offsets)


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_answer_that_is_no_number_is_an_error_of_its_row(task: Task, value: float) -> None:
    labels = ("one",) if task is Task.REGRESSION else ("one", "two")
    schema = PredictionSchema(task=task, labels=labels, prefix="", probabilities=False, keys=pa.schema([]))
    scores = np.full((3, len(labels)), 0.75, np.float32)
    scores[1, 0] = value
    nothing = np.zeros(3, np.uint8)
    found = to_results(schema, None, scores, np.array([4, 4, 4]), np.zeros(3, np.bool_), nothing).to_pylist()
    assert [row["error"] for row in found] == [None, "not_finite", None]
    assert [row.get("score", row.get("scores")) is None for row in found] == [False, True, False]
