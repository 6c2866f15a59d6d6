"""Words of a text, and which of a model's tokens make each of them: for showing people what the model reads.

Letters: T tokens of a text, special ones included, those that windows share once; P places of its row of token ids.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lib.tokenization import Tokenizer, Tokens, keep_ends

IntArray = npt.NDArray[np.integer]

WITHOUT_SPACES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Letters of scripts that put nothing between words: Thai, Lao, Burmese, Khmer, kana, han. There a token is a word."""

JOINER = "\u200d"
"""Holds the parts of an emoji together."""


@dataclass(frozen=True)
class Word:
    """A piece of a text, and what it is worth."""

    start: int
    """in characters of the text"""
    end: int
    value: float


@dataclass(frozen=True)
class Located:
    """Where the tokens of a row stand in a text."""

    text: str
    order: IntArray
    """(P,), which token stands at each place of the row"""
    spans: IntArray
    """(T, 2), where each token begins and ends in the text; the same twice for what stands for nothing in it"""

    def words(self, values: npt.NDArray[np.floating]) -> tuple[Word, ...]:
        """The text's words, given what each place of the row is worth (P,): a word is worth what its tokens are together."""
        tokens = np.bincount(self.order, values, len(self.spans))
        return join_words(self.text, zip(self.spans.tolist(), tokens.tolist(), strict=True))


def locate(tokenizer: Tokenizer, text: str) -> Located:
    """Find the tokens of a text in it; where the tokenizer cannot say, or puts a template around it, in the text as the model reads it."""
    ids = tokenizer.encode([text]).ids
    if tokenizer.backend is not None and tokenizer.prompt is None:
        found = tokenizer.backend.encode(text)
        whole = Tokens(np.arange(len(found)), np.array([len(found)], np.int32), np.zeros(1, np.bool_), None)
        kept = keep_ends(whole, tokenizer.max_length) if tokenizer.truncation == "head_tail" else whole
        order = order_of(tokenizer, len(ids))
        if np.array_equal(np.array(found.ids)[kept.ids][order], ids):
            return Located(text, order, np.array(found.offsets).reshape(-1, 2)[kept.ids])
    return locate_ids(tokenizer, ids)


def locate_ids(tokenizer: Tokenizer, ids: IntArray) -> Located:
    """Find the tokens of a row, given its ids (P,) alone, in the text as the model reads it."""
    order = order_of(tokenizer, len(ids))
    once = ids[np.unique(order, return_index=True)[1]]
    inside = np.flatnonzero(~np.isin(once, kept_ids(tokenizer)))
    text, spans = spans_of(tokenizer, once[inside].tolist())
    found = np.zeros((len(once), 2), np.int64)
    found[inside] = spans
    return Located(text, order, found)


def order_of(tokenizer: Tokenizer, length: int) -> IntArray:
    """Which token of a text stands at each place of its row of so many ids: with windows some stand in two."""
    windows, around, size = tokenizer.windows, tokenizer.around, tokenizer.max_length
    if windows is None or length <= size:
        return np.arange(length)
    once = length - (-(-length // size) - 1) * (sum(around) + windows.stride)
    return windows.lay_out(np.arange(once), np.array([once]), size, around)[0]


def kept_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of special tokens: all but the one that stands for what the vocabulary has not."""
    reference = tokenizer.reference
    return [one for one in reference.all_special_ids if one != reference.unk_token_id]


def spans_of(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, IntArray]:
    """Decode the ids (T,) of a text without special tokens, and say where each of them stands in the result (T, 2)."""
    text: str = tokenizer.reference.decode(ids)
    if tokenizer.reference.is_fast:
        again = tokenizer.reference(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if again["input_ids"] == ids:
            return text, np.array(again["offset_mapping"], np.int64).reshape(-1, 2)
    ends = [0]
    for count in range(1, len(ids) + 1):
        before = tokenizer.reference.decode(ids[:count])
        same = (index for index, (one, other) in enumerate(zip(before, text, strict=False)) if one != other)
        ends.append(max(ends[-1], next(same, min(len(before), len(text)))))
    return text, np.column_stack([ends[:-1], ends[1:]])


def join_words(text: str, pieces: Iterable[tuple[list[int], float]]) -> tuple[Word, ...]:
    """Put pieces of a text together where they belong to one word; what stands for nothing goes with what comes next."""
    words: list[Word] = []
    waiting = 0.0
    for (start, end), value in pieces:
        inner = text[start:end]
        start, end = start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip())
        if start >= end:
            waiting += value
            continue
        last = words[-1] if words else None
        if last and (start < last.end or (start == last.end and belong(text[start - 1], text[start]))):
            words[-1] = Word(last.start, max(end, last.end), last.value + waiting + value)
        else:
            words.append(Word(start, end, waiting + value))
        waiting = 0.0
    if words and waiting:
        words[-1] = Word(words[-1].start, words[-1].end, words[-1].value + waiting)
    return tuple(words)


def belong(left: str, right: str) -> bool:
    """Whether two neighbouring characters are in one word."""
    if left == JOINER or right == JOINER or unicodedata.category(right).startswith("M"):
        return True
    letters = all(one.isalnum() or one in "_'’" or unicodedata.category(one).startswith("M") for one in (left, right))
    return letters and not WITHOUT_SPACES.match(left) and not WITHOUT_SPACES.match(right)
