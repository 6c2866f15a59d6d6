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
        if whole.any():
            kinds[np.repeat(whole, np.diff(offsets)) & (kinds > WHITE)] = WORD
        starts = kinds >= PUNCTUATION
        starts[1:] |= ((kinds == WHITE) | (kinds == PUNCTUATION))[:-1]
        starts[offsets[:-1][offsets[:-1] < len(data)]] = True
        stays = kinds != WHITE
        kept = np.compress(stays, np.frombuffer(data, np.uint8))
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


def chunks_of(data: Bytes, firsts: Places) -> pa.Array:
    """Bytes as chunks, given where each begins."""
    ends = np.append(firsts, len(data))
    return pa.Array.from_buffers(pa.large_binary(), len(firsts), [None, pa.py_buffer(ends), pa.py_buffer(data)])


def cutter_of(backend: Any) -> Cutter | None:
    """The cutter that is right for a fast tokenizer, by its structure; None for one that is not understood."""
    state = json.loads(backend.to_str())
    normalizer, splitter = state["normalizer"] or {}, state["pre_tokenizer"] or {}
    if (state["model"]["type"], normalizer.get("type"), splitter.get("type")) == BERT:
        return word_cutter(state)
    return None


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
        for byte in range(0xE5, 0xEA):  # U+5000 to U+9FFF, ideographs all of them
            kinds[byte] = IDEOGRAPH
    pattern = "|".join(map(re.escape, added)) or "$^"
    return WordCutter(bytes(kinds), re.compile(pattern), state["model"]["max_input_chars_per_word"])


def has_space(token: str) -> bool:
    """Whether a token contains white space."""
    return any(map(str.isspace, token))
