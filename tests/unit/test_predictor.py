"""The predictor when something goes wrong: memory that runs out, and a model that answers with no number."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib import budget, checkpoint
from lib.engine import TorchEngine
from lib.errors import UsageError
from lib.predictor import Predictor
from lib.schema import Head, PredictionSchema, Task, to_results
from lib.tokenization import Tokens, load_tokenizer
from lib.windows import Windows
from tests import fakes

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


def test_what_is_computed_for_nothing_is_counted(
    predictor: Predictor, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, computed = predictor.padding, limit_memory(predictor, monkeypatch, most=10_000)
    predictor.probabilities(tokens.ids, tokens.offsets)
    assert predictor.padding - before == sum(computed) - len(tokens.ids) > 0


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


def test_a_text_in_windows_counts_as_one_row_when_its_first_is_scored(classifier: str) -> None:
    loaded = checkpoint.load(classifier)
    card = loaded.card.model_copy(update={"max_length": 16, "windows": Windows(4, 8, "max")})
    predictor = Predictor(replace(loaded, card=card), "fp32", "torch", token_budget=64)
    texts = ["a", fakes.PROSE, *(" ".join(fakes.PROSE.split()[:words]) for words in (9, 30, 70))]
    tokens = checkpoint.tokenizer_of(predictor.checkpoint).encode(texts)
    seen: list[tuple[int, int]] = []
    found = predictor.probabilities(tokens.ids, tokens.offsets, None, lambda *done: seen.append(done))
    assert found.shape == (5, 3) and np.isfinite(found).all()
    assert sum(rows for rows, _ in seen) == 5
    assert sum(count for _, count in seen) == len(tokens.ids) > 8 * 16
    emptied = np.concatenate([tokens.offsets[:3], tokens.offsets[2:]])  # a row without tokens in the middle
    again = predictor.probabilities(tokens.ids, emptied)
    assert np.isnan(again[2]).all()
    assert np.delete(again, 2, axis=0) == pytest.approx(found, abs=1e-5)


def test_a_single_text_that_does_not_fit_is_named(
    predictor: Predictor, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(predictor, monkeypatch, most=5)
    with pytest.raises(UsageError, match=r"a single text of \d+ tokens does not fit .* model\.max_length"):
        predictor.probabilities(tokens.ids, tokens.offsets)


@pytest.mark.parametrize(
    ("rates", "largest", "expected"),
    [
        ([100, 150, 180, 181, 181, 180], None, 32_768),
        ([100, 90, 99], None, 8_192),
        ([100, 90, 150, 180, 180, 170], None, 65_536),
        ([100, 150, 180, 300], 32_768, 16_384),
        ([100], 0, 2_048),
        ([2**step for step in range(9)], None, 524_288),
    ],
)
def test_the_budget_is_doubled_while_that_is_worth_it(rates: list[float], largest: int | None, expected: int) -> None:
    """`largest`: memory ends above so many tokens. One slow pass is chance, two in a row are the end."""

    def seconds_of(tokens: int) -> float:
        if largest is not None and tokens > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tokens / rates[(tokens // budget.SMALLEST).bit_length() - 1]

    assert budget.best_budget(seconds_of) == expected


def test_a_budget_is_found_once_and_remembered_as_it_was_lowered(
    predictor: Predictor, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a processor here; on a GPU the predictor does so when it is built."""
    monkeypatch.setenv("TEXTSWEEP_CACHE", str(tmp_path))
    monkeypatch.setattr(budget, "LARGEST", 4 * budget.SMALLEST)
    expected = predictor.probabilities(tokens.ids, tokens.offsets)
    timed: list[int] = []
    seconds_of = predictor._seconds_of

    def noted(some: int) -> float:
        timed.append(some)
        return seconds_of(some)

    monkeypatch.setattr(predictor, "_seconds_of", noted)
    predictor.calibrate()
    assert timed[0] == budget.SMALLEST and predictor.token_budget in timed
    assert np.abs(predictor.probabilities(tokens.ids, tokens.offsets) - expected).max() < 1e-5
    before = len(timed)
    predictor.token_budget = 0
    predictor.calibrate()
    assert len(timed) == before and predictor.token_budget in timed, "remembered, not timed again"
    limit_memory(predictor, monkeypatch, most=130)
    predictor.probabilities(tokens.ids, tokens.offsets)
    lowered = predictor.token_budget
    predictor.calibrate()
    assert predictor.token_budget == lowered <= 130


@pytest.mark.parametrize("task", [Task.MULTI_CLASS, Task.MULTI_LABEL, Task.REGRESSION])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_answer_that_is_no_number_is_an_error_of_its_row(task: Task, value: float) -> None:
    labels = ("one",) if task is Task.REGRESSION else ("one", "two")
    schema = PredictionSchema(
        heads=(Head(task=task, labels=labels),), prefix="", probabilities=False, keys=pa.schema([])
    )
    scores = np.full((3, len(labels)), 0.75, np.float32)
    scores[1, 0] = value
    nothing = np.zeros(3, np.uint8)
    found = to_results(schema, scores, np.array([4, 4, 4]), np.zeros(3, np.bool_), nothing).to_pylist()
    assert [row["error"] for row in found] == [None, "not_finite", None]
    assert [row.get("score", row.get("scores")) is None for row in found] == [False, True, False]
