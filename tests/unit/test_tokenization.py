"""Tokenization: ids equal those of plain `transformers`, one text at a time, whatever the text and the family."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lib.tokenization import Tokenizer, load_tokenizer
from tests import fakes

MAX_LENGTH = 16

AWKWARD = [
    "The harbour was quiet when the first boats came home.",
    "a",
    " ",
    "\x00",
    "[CLS] [SEP] <s> </s> [MASK] <mask> [PAD] <pad> [UNK]",
    "Ünïcödé — “quotes” … ½ ﬁ ǆ İ ı ß ſ",
    "文書を分類する。العربية עברית हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\u200d\ufeff\u2028",
    "\ud7ff\ue000\ufffd\U0010ffff",
    "word " * 300,
    "x" * 3000,
    "\t\r\n  many   spaces \t",
    "``quoted'' \"both\" don't can't",
    "##harbour ▁harbour Ġharbour",
    "1,204.75 3.20-2.75 http://example.com/a?b=c&d",
]

texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60),
    st.lists(st.sampled_from(" ".join(AWKWARD[:8]).split()), min_size=1, max_size=40).map(" ".join),
)


@pytest.fixture(scope="module", params=fakes.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    fakes.make_config(request.param).save_pretrained(path)
    fakes.save_tokenizer(path, request.param)
    return str(path)


@pytest.fixture(scope="module")
def ours(folder: str) -> Tokenizer:
    return Tokenizer(folder, MAX_LENGTH)


@pytest.fixture(scope="module")
def theirs(folder: str) -> Any:
    """The reference: an object of its own, since truncation is a state of the tokenizer."""
    return AutoTokenizer.from_pretrained(folder)


def check(ours: Tokenizer, theirs: Any, firsts: list[str], seconds: list[str] | None = None) -> None:
    """Compare a whole batch with the reference, one text at a time."""
    found = ours.encode(firsts, seconds)
    assert len(found.lengths) == len(firsts)
    for row, first in enumerate(firsts):
        pair = (first,) if seconds is None else (first, seconds[row])
        expected = theirs(*pair, truncation=True, max_length=MAX_LENGTH)
        start, stop = found.offsets[row : row + 2]
        assert found.ids[start:stop].tolist() == expected["input_ids"]
        whole = len(theirs(*pair, truncation=False, verbose=False)["input_ids"])
        assert found.truncated[row] == (whole > MAX_LENGTH)
        if found.type_ids is not None:
            assert found.type_ids[start:stop].tolist() == expected["token_type_ids"]
    assert (found.type_ids is not None) == (seconds is not None and "token_type_ids" in theirs.model_input_names)


def test_ids_equal_the_reference_on_awkward_texts(ours: Tokenizer, theirs: Any) -> None:
    check(ours, theirs, AWKWARD)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(texts, max_size=5))
def test_ids_equal_the_reference_on_any_text(ours: Tokenizer, theirs: Any, found: list[str]) -> None:
    check(ours, theirs, found)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(st.tuples(texts, texts), max_size=5))
def test_pairs_equal_the_reference_with_their_segments(
    ours: Tokenizer, theirs: Any, found: list[tuple[str, str]]
) -> None:
    check(ours, theirs, [first for first, _ in found], [second for _, second in found])


def test_pairs_equal_the_reference_on_awkward_texts(ours: Tokenizer, theirs: Any) -> None:
    check(ours, theirs, AWKWARD, AWKWARD[::-1])


def test_a_batch_changes_nothing(ours: Tokenizer) -> None:
    together = ours.encode(AWKWARD)
    alone = [ours.encode([text]) for text in AWKWARD]
    assert together.ids.tolist() == [token for one in alone for token in one.ids]


def test_the_way_of_tokenizers_written_in_python_gives_the_same(folder: str, ours: Tokenizer) -> None:
    slow = Tokenizer(folder, MAX_LENGTH)
    slow.backend = None
    for seconds in (None, AWKWARD[::-1]):
        one, other = ours.encode(AWKWARD, seconds), slow.encode(AWKWARD, seconds)
        assert one.ids.tolist() == other.ids.tolist()
        assert one.lengths.tolist() == other.lengths.tolist()
        assert one.truncated.tolist() == other.truncated.tolist()
        assert (one.type_ids is None) == (other.type_ids is None)
        assert one.type_ids is None or one.type_ids.tolist() == other.type_ids.tolist()  # type: ignore[union-attr]


def test_a_text_that_just_fits_is_not_truncated(ours: Tokenizer) -> None:
    def length(words: int) -> int:
        return int(ours.encode(["a " * words]).lengths[0])

    words = next(words for words in range(1, MAX_LENGTH + 1) if length(words) == MAX_LENGTH)
    assert ours.encode(["a " * words, "a " * (words + 1)]).truncated.tolist() == [False, True]


def test_tokens_are_flat_and_small(ours: Tokenizer) -> None:
    found = ours.encode(AWKWARD)
    assert found.ids.dtype == np.uint16
    assert found.lengths.dtype == np.int32
    assert found.id_lists().to_pylist() == [
        found.ids[start:stop].tolist() for start, stop in zip(found.offsets, found.offsets[1:], strict=False)
    ]
    assert found.type_id_lists() is None


def test_no_texts_give_no_tokens(ours: Tokenizer) -> None:
    found = ours.encode([])
    assert (len(found.ids), len(found.lengths), found.offsets.tolist()) == (0, 0, [0])
    assert found.id_lists().to_pylist() == []


def test_text_is_cut_on_the_side_that_the_tokenizer_names(tmp_path: Path) -> None:
    fakes.save_tokenizer(tmp_path, "bert")
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"truncation_side": "left"}))
    fakes.make_config("bert").save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.truncation_side == "left"
    check(Tokenizer(str(tmp_path), MAX_LENGTH), theirs, AWKWARD)
    check(Tokenizer(str(tmp_path), MAX_LENGTH), theirs, AWKWARD, AWKWARD[::-1])


def test_settings_saved_with_the_tokenizer_change_nothing(tmp_path: Path) -> None:
    # Folders on the hub come with padding or truncation switched on in tokenizer.json.
    tokenizer = fakes.bert_tokenizer()
    tokenizer.backend_tokenizer.enable_padding(length=40)
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.save_pretrained(str(tmp_path))
    fakes.make_config("bert").save_pretrained(tmp_path)
    check(Tokenizer(str(tmp_path), MAX_LENGTH), AutoTokenizer.from_pretrained(tmp_path), AWKWARD)


def test_a_tokenizer_is_loaded_once_a_process(classifier: str) -> None:
    assert load_tokenizer(classifier, 32) is load_tokenizer(classifier, 32)
    assert load_tokenizer(classifier, 32) is not load_tokenizer(classifier, 16)
