"""Words and the tokens that make them: in the user's own text, and in what is left of it as ids."""

import itertools
import string
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.tokenization import Tokenizer, load_tokenizer
from lib.windows import Windows
from lib.words import join_words, locate, locate_ids
from tests import fakes

TEXT = "  Don't buy  this camera, (it's naïve)!\nSnake_case 東京タワー, привет 👩‍👩‍👧 हिन्दी"


def without_marks(text: str) -> str:
    """ALBERT reads no accents: a mark at the end of a word may be in none."""
    return "".join(one for one in text if not unicodedata.category(one).startswith("M") and not one.isspace())


def shown(text: str, words: Any) -> list[str]:
    return [text[one.start : one.end] for one in words]


@pytest.fixture(scope="module", params=fakes.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    fakes.make_encoder(folder, request.param)
    return str(folder)


def test_pieces_become_words_of_the_text_as_it_was_written(folder: str) -> None:
    tokenizer = load_tokenizer(folder, 500)
    ids = tokenizer.encode([TEXT]).ids
    found = locate(tokenizer, TEXT)
    assert found.text == TEXT and len(found.order) == len(ids)
    values = np.random.default_rng(0).normal(size=len(ids))
    words = found.words(values)
    assert sum(one.value for one in words) == pytest.approx(values.sum()), "nothing is lost"
    assert without_marks("".join(shown(TEXT, words))) == without_marks(TEXT)
    assert all(left.end <= right.start for left, right in itertools.pairwise(words))
    for word in ("Don't", "this", "Snake_case", "привет", "👩‍👩‍👧", "हिन्दी"):
        assert without_marks(word) in map(without_marks, shown(TEXT, words))
    assert not any(" " in one or "\n" in one for one in shown(TEXT, words))


def test_ids_alone_give_the_text_as_the_model_reads_it(folder: str) -> None:
    tokenizer = load_tokenizer(folder, 500)
    plain = "Never buy this camera, please: it broke!"
    ids = tokenizer.encode([plain]).ids
    found = locate_ids(tokenizer, ids)
    assert found.text.replace(" ", "").lower() == plain.replace(" ", "").lower()
    words = found.words(np.ones(len(ids)))
    assert {"never", "buy", "this"} <= {one.lower() for one in shown(found.text, words)}
    assert sum(one.value for one in words) == len(ids)


@settings(max_examples=30, deadline=None)
@given(st.text(st.sampled_from(string.ascii_letters[:8] + " .,'-\n\t東é👩‍\u0301[]#▁Ġ"), min_size=1))
def test_no_text_loses_a_value(text: str) -> None:
    for name in ("bert", "roberta", "albert"):
        tokenizer = TOKENIZERS.setdefault(name, make_tokenizer(name))
        ids = tokenizer.encode([text]).ids
        for found in (locate(tokenizer, text), locate_ids(tokenizer, ids)):
            assert (np.diff(found.spans, axis=1) >= 0).all()
            words = found.words(np.ones(len(ids)))
            assert sum(one.value for one in words) in (0, pytest.approx(len(ids)))
            assert len(words) or not any(one.isalnum() for one in found.text)


TOKENIZERS: dict[str, Tokenizer] = {}


def make_tokenizer(family: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        fakes.save_tokenizer(folder, family)
        return Tokenizer(folder, 64)


@pytest.mark.parametrize("options", [{"truncation": "head"}, {"truncation": "tail"}, {"truncation": "head_tail"}])
def test_what_is_cut_off_is_in_no_word(folder: str, options: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(folder, 12, **options)
    text = "one harbour two boats three lamps four houses five gardens six stories seven letters"
    ids = tokenizer.encode([text]).ids
    assert len(ids) == 12
    words = shown(text, locate(tokenizer, text).words(np.ones(12)))
    first, last = text.split()[0], text.split()[-1]
    assert (first in words, last in words) == {"head": (True, False), "tail": (False, True)}.get(
        options["truncation"], (True, True)
    )


def test_a_token_that_two_windows_share_is_one_token(folder: str) -> None:
    tokenizer = load_tokenizer(folder, 10, windows=Windows(stride=3, most=9, pooling="mean"))
    whole = load_tokenizer(folder, 500)
    text = "Prices in the market rose again this week: bread costs more than coffee."
    ids = tokenizer.encode([text]).ids
    found = locate(tokenizer, text)
    assert np.array_equal(found.order, locate_ids(tokenizer, ids).order)
    once = np.zeros(len(found.spans), ids.dtype)
    once[found.order] = ids
    assert np.array_equal(once, whole.encode([text]).ids)
    inside = np.bincount(found.order)
    assert inside.max() > 1
    assert shown(text, found.words(np.ones(len(ids)))) == shown(text, locate(whole, text).words(np.ones(len(once))))


def test_unknown_words_stand_in_the_text_of_ids(tmp_path: Path) -> None:
    fakes.make_encoder(tmp_path, "bert")
    tokenizer = load_tokenizer(str(tmp_path), 64)
    found = locate_ids(tokenizer, tokenizer.encode(["this 東 broke"]).ids)
    words = found.words(np.arange(len(found.order), dtype=float))
    assert shown(found.text, words)[:2] == ["this", "[UNK]"]


def test_values_of_what_stands_for_nothing_go_with_what_comes_next() -> None:
    pieces = [([0, 0], 1.0), ([0, 2], 2.0), ([2, 3], 4.0), ([2, 3], 8.0), ([3, 5], 16.0), ([5, 5], 32.0)]
    assert [(one.start, one.end, one.value) for one in join_words("ab cd", pieces)] == [(0, 2, 3.0), (3, 5, 60.0)]
