"""Where a text may be cut without changing its token ids: read from a tokenizer's structure, for structures that are understood.

A cut is safe if nothing of the tokenizer looks across it: neither the search for added tokens, nor the normalizer, nor the
pre-tokenizer; the model sees one pre-token at a time anyway. Texts are bytes of UTF-8 here. Letters: N texts, W chunks.
"""

import json
import re
import string
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]

WORD, WHITE, PUNCTUATION, IDEOGRAPH = range(4)
"""Kinds of bytes for `WordCutter`."""

LETTERS = "A-Za-z0-9À-ÖØ-öø-ɏΑ-ΡΣ-Ωα-ωЀ-ҁא-תا-يก-ะぁ-ゖァ-ヺ가-힣\U0001f300-\U0001f64f"
"""Characters of which BERT's normalizer leaves at least one each, and at which nothing is ever split."""

MARKS = "\u0300-\u034e\u064b-\u0652\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
"""Marks that it takes away or leaves, and at which nothing is split either."""

BERT = ("WordPiece", "BertNormalizer", "BertPreTokenizer")
"""Model, normalizer and pre-tokenizer that `WordCutter` understands."""


class Cutter(Protocol):
    """Cuts texts into chunks whose ids, one after the other, are the texts' ids."""

    def cut(self, data: bytes, offsets: Places, whole: npt.NDArray[np.bool_]) -> tuple[pa.Array, Places]:
        """Cut N texts, given as (N + 1,) offsets into `data`: (W,) chunks, and (N + 1,) the first chunk of each text.

        `whole` is what `has_added` says of them.
        """
        ...

    def has_added(self, texts: pa.Array) -> npt.NDArray[np.bool_]:
        """(N,), the texts in which an added token must be looked for by the reference."""
        ...

    def shorten(self, word: str) -> str:
        """A word with the same ids that is no longer than needed."""
        ...


@dataclass(frozen=True)
class WordCutter:
    """BERT's words: cut at white space, which goes, at ASCII punctuation and before ideographs.

    `BertNormalizer` works on single characters (and on a character with the marks behind it), turns these four white
    spaces into blanks and puts blanks around ideographs; `BertPreTokenizer` then splits there and at punctuation. Other
    white space and punctuation stays inside a chunk, which costs nothing but a few more chunks.
    """

    kinds: bytes
    """(256,), the kind of each byte"""
    added: re.Pattern[str]
    """added tokens, which punctuation must not cut: their texts are cut at white space alone"""
    longest_word: int
    """characters; a longer word is unknown as a whole"""

    def cut(self, data: bytes, offsets: Places, whole: npt.NDArray[np.bool_]) -> tuple[pa.Array, Places]:
        kinds = np.frombuffer(bytearray(data.translate(self.kinds)), np.uint8)
        text = np.frombuffer(data, np.uint8)
        # U+4DC0 to U+4DFF, the only ones here that are no ideographs
        hexagrams = (text[:-1] == 0xE4) & (text[1:] == 0xB7)
        kinds[:-1][hexagrams] = WORD
        lasts = offsets[1:][np.diff(offsets) > 0] - 1
        kinds[lasts[text[lasts] == 0xE4]] = WORD  # texts torn in the middle of a character may hide one
        if whole.any():
            kinds[np.repeat(whole, np.diff(offsets)) & (kinds > WHITE)] = WORD
        starts = kinds >= PUNCTUATION
        starts[1:] |= ((kinds == WHITE) | (kinds == PUNCTUATION))[:-1]
        starts[offsets[:-1][offsets[:-1] < len(data)]] = True
        stays = kinds != WHITE
        kept = np.compress(stays, text)
        firsts = np.flatnonzero(np.compress(stays, starts))
        bounds = np.searchsorted(firsts, offsets - np.searchsorted(np.flatnonzero(~stays), offsets))
        return chunks_of(kept, firsts), bounds

    def has_added(self, texts: pa.Array) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = pc.match_substring_regex(texts, self.added.pattern).to_numpy(
            zero_copy_only=False
        )
        return found

    def shorten(self, word: str) -> str:
        # Beyond `longest_word` letters more of them change nothing: the word around them is unknown either way.
        if len(word) <= 4 * self.longest_word or self.added.search(word):
            return word
        return re.sub(f"((?:[{LETTERS}][{MARKS}]*){{{self.longest_word + 1}}})[{LETTERS}{MARKS}]+", r"\1", word)


@dataclass(frozen=True)
class BlankCutter:
    """Cut before a blank that stands behind a plain character; the blank stays, as byte-level BPE and Metaspace want it.

    No normalizer that `is_harmless` lets the two react (a blank composes with nothing before it, and of a plain character
    something is always left that is no white space, so white space that is merged or stripped lies on one side). The
    pre-tokenizers split there: byte-level's pattern has nothing that goes on over a blank, and what it looks ahead for
    is the end of white space; Metaspace and WhitespaceSplit split before every blank.
    """

    def cut(self, data: bytes, offsets: Places, whole: npt.NDArray[np.bool_]) -> tuple[pa.Array, Places]:
        assert not whole.any()  # added tokens that a cut could touch are refused
        text = np.frombuffer(data, np.uint8)
        blanks = 2 + np.flatnonzero(text[2:] == ord(" "))
        # Texts that begin in the middle of a character all end with a whole one, so no first byte is taken for a last one.
        blanks = blanks[PLAIN[text[blanks - 2], text[blanks - 1]]]
        starts = np.zeros(len(data) + 1, np.bool_)
        starts[blanks] = True
        starts[offsets] = True
        firsts = np.flatnonzero(starts[: len(data)])
        return chunks_of(text, firsts), np.searchsorted(firsts, offsets)

    def has_added(self, texts: pa.Array) -> npt.NDArray[np.bool_]:
        return np.zeros(len(texts), np.bool_)

    def shorten(self, word: str) -> str:
        return word


def plain_characters() -> npt.NDArray[np.bool_]:
    """(256, 256), whether a character ends in these two bytes that is seen, is no mark, and stays so in every normal form."""
    plain = np.zeros((256, 256), np.bool_)
    plain[:, 0x21:0x7F] = True
    # Latin, Greek, Cyrillic: U+00C0 to U+02BF, U+0386, U+0400 to U+047F
    for first in (*range(0xC3, 0xCB), 0xCE, 0xD0, 0xD1):
        plain[first, 0x80:0xC0] = True
    plain[0xCE, :0x86] = False  # the bare accents U+0384 and U+0385 become a blank and a mark
    plain[0xCE, 0x21:0x7F] = True
    return plain


PLAIN = plain_characters()


def chunks_of(data: Bytes, firsts: Places) -> pa.Array:
    """Bytes as chunks, given where each begins."""
    ends = np.append(firsts, len(data))
    return pa.Array.from_buffers(pa.large_binary(), len(firsts), [None, pa.py_buffer(ends), pa.py_buffer(data)])


def cutter_of(backend: Any) -> Cutter | None:
    """The cutter that is right for a fast tokenizer, by its structure; None for one that is not understood."""
    state = json.loads(backend.to_str())
    model, normalizer, splitter = state["model"], state["normalizer"] or {}, state["pre_tokenizer"] or {}
    if (model["type"], normalizer.get("type"), splitter.get("type")) == BERT:
        return word_cutter(state)
    blanks = all(map(is_harmless, parts_of(normalizer, "normalizers")))
    splits = parts_of(splitter, "pretokenizers")
    if blanks and splits and all(map(splits_at_blanks, splits)) and not model.get("dropout"):
        return None if any(joins_words(token, backend.normalizer) for token in state["added_tokens"]) else BlankCutter()
    return None


def parts_of(part: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The members of a sequence, or the one part itself."""
    return part[key] if part.get("type") == "Sequence" else [part] if part else []


def is_harmless(part: dict[str, Any]) -> bool:
    """Whether a normalizer keeps a blank behind a plain character, and works on what is left and right of it alone."""
    match part:
        case {"type": "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" | "StripAccents"}:
            return True
        case {"type": "Strip", "strip_left": False}:
            return True
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            return not has_space(pattern + content) and bool(content)
        case {"type": "Replace", "pattern": {"Regex": " {2,}" | "\\s{2,}|[\\n\\r\\t]"}, "content": " "}:
            return True
    return False


def splits_at_blanks(part: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer splits before every blank behind a plain character."""
    match part:
        case (
            {"type": "ByteLevel", "use_regex": True}
            | {"type": "Metaspace", "split": True}
            | {"type": "WhitespaceSplit"}
        ):
            return True
    return False


def joins_words(token: dict[str, Any], normalizer: Any) -> bool:
    """Whether an added token can be found, or can take white space away, across a cut before a blank."""
    forms = [token["content"], *([normalizer.normalize_str(token["content"])] if normalizer else [])]
    return (
        token["rstrip"]
        or any(not form or re.search(r"\S\s", form) for form in forms)
        or (token["single_word"] and any(form[:1].isspace() for form in forms))
    )


def word_cutter(state: dict[str, Any]) -> WordCutter | None:
    """The cutter of a WordPiece tokenizer."""
    added = [token["content"] for token in state["added_tokens"]]
    if any(token["normalized"] for token in state["added_tokens"]) or any(map(has_space, added)):
        return None  # found in what the normalizer leaves, or across white space
    kinds = bytearray(256)
    for byte in b" \t\n\r":
        kinds[byte] = WHITE
    for byte in string.punctuation.encode():
        kinds[byte] = PUNCTUATION
    if state["normalizer"]["handle_chinese_chars"]:
        for byte in range(0xE4, 0xEA):  # U+4000 to U+9FFF, ideographs nearly all of them
            kinds[byte] = IDEOGRAPH
    pattern = "|".join(map(re.escape, added)) or "$^"
    return WordCutter(bytes(kinds), re.compile(pattern), state["model"]["max_input_chars_per_word"])


def has_space(token: str) -> bool:
    """Whether a token contains white space."""
    return any(map(str.isspace, token))
