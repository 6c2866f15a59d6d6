"""Which tokens of a row begin a word, known from their ids alone, by a table of the vocabulary.

Letters: B rows, L padded length, V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import decoders

from lib.batching import IntArray
from lib.tokenization import Tokenizer
from lib.words import belong, kept_ids

BoolArray = npt.NDArray[np.bool_]

FloatArray = npt.NDArray[np.float64]

METASPACE = "\u2581"

PARTIAL = "\ufffd"
"""What a part of a character decodes to."""


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What the tokens of a vocabulary say about words, each (V,)."""

    special: BoolArray
    """stands for no text"""
    opens: BoolArray
    """begins a word whatever is before it: white space stands between them"""
    goes_on: BoolArray
    """belongs to what is before it, whatever that is"""
    waits: BoolArray
    """what comes next belongs to it, whatever that is: white space that is a token of its own"""
    first_is_letter: BoolArray
    last_is_letter: BoolArray

    def starts(self, ids: IntArray) -> BoolArray:
        """Where a word begins (B, L), given ids (B, L); each special token is a word of its own."""
        before, here = ids[:, :-1], ids[:, 1:]
        joined = self.goes_on[here] | self.waits[before] | (self.last_is_letter[before] & self.first_is_letter[here])
        found = np.ones(ids.shape, np.bool_)
        found[:, 1:] = ~joined | self.opens[here] | self.special[before] | self.special[here]
        return found

    def of_first(self, ids: IntArray, lots: FloatArray) -> FloatArray:
        """For each token the lot (B, L) of the first one of its word, given ids (B, L)."""
        firsts = np.maximum.accumulate(np.where(self.starts(ids), np.arange(ids.shape[1]), 0), axis=1)
        found: FloatArray = np.take_along_axis(lots, firsts, axis=1)
        return found


def draw_lots(keys: Sequence[tuple[int, ...]], mask: BoolArray, kinds: int) -> FloatArray:
    """Lots (B, kinds, L) from 0 to 1 for each token, by a key for each row alone; 1 where the mask (B, L) has none."""
    lots = np.ones((len(mask), kinds, mask.shape[1]))
    lengths = mask.sum(axis=1)
    for row, key in enumerate(keys):  # 11 µs a row
        lots[row, :, : lengths[row]] = np.random.default_rng(key).random((kinds, lengths[row]))
    return lots


def special_ids(tokenizer: Tokenizer) -> BoolArray:
    """Which ids stand for no text (V,); the one for what the vocabulary has not is none of them."""
    found = np.zeros(len(tokenizer.reference), np.bool_)
    found[kept_ids(tokenizer)] = True
    return found


def find_pieces(tokenizer: Tokenizer) -> Pieces | None:
    """The table of a tokenizer's vocabulary; None if it does not say where its words begin."""
    reference, backend = tokenizer.reference, tokenizer.backend
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    names: list[str] = reference.convert_ids_to_tokens(list(range(len(reference))))
    if state["model"]["type"] == "WordPiece":
        prefix = state["model"]["continuing_subword_prefix"]
        inner = np.array([name.startswith(prefix) and len(name) > len(prefix) for name in names])
        no = np.zeros(len(names), np.bool_)
        return Pieces(
            special=special_ids(tokenizer), opens=~inner, goes_on=inner, waits=no, first_is_letter=no, last_is_letter=no
        )
    splitting = json.dumps(state["pre_tokenizer"])
    if '"ByteLevel"' in splitting:
        decode = decoders.ByteLevel().decode
        texts = [decode([name]) for name in names]
    elif '"Metaspace"' in splitting:
        texts = [name.replace(METASPACE, " ") for name in names]
    else:
        return None
    return pieces_of(texts, special_ids(tokenizer))


def pieces_of(texts: Sequence[str], special: BoolArray) -> Pieces:
    """The table of a vocabulary whose tokens stand for these texts (V,), white space included."""
    inner = [text.strip() for text in texts]

    def table(test: list[bool]) -> BoolArray:
        return np.array(test, np.bool_)

    return Pieces(
        special=special,
        opens=table([text[:1].isspace() for text in texts]),
        goes_on=table([bool(text) and (text[0] == PARTIAL or belong("!", text[0])) for text in inner]),
        waits=table([not text for text in inner]),
        first_is_letter=table([bool(text) and belong("a", text[0]) for text in inner]),
        last_is_letter=table([bool(text) and (text[-1] == PARTIAL or belong(text[-1], "a")) for text in inner]),
    )
