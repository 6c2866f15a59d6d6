"""Tokenizing by chunks: each different chunk of text is tokenized once and remembered, and texts are put together from them.

Nothing here runs once for each text or token in Python. Letters: N texts, W chunks.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lib.cutting import Cutter, Places

MAX_WORDS = 65_536
"""Chunks remembered. They are hashed anew with every batch, 3 ms for these: more of them would cost more than they save."""

MAX_WORD_BYTES = 64
"""The longest chunk remembered, and the most ids of one: at most 25 MB are kept, 2 MB with usual text."""

BYTES_PER_TOKEN = 8
"""Text looked at first for each token that is wanted; English has five."""


class WordCache:
    """Ids of the chunks seen so far. What is remembered changes the time it takes, never the ids."""

    def __init__(self, backend: Any, cutter: Cutter, dtype: npt.DTypeLike) -> None:
        self.backend = backend
        self.cutter = cutter
        self.dtype = dtype
        self.words = pa.array([], pa.large_binary())
        self.ids = pa.array([], pa.list_(pa.from_numpy_dtype(dtype)))
        """one list for each of `words`"""
        self.uses = np.zeros(0, np.int64)

    def look_up(self, chunks: pa.Array) -> pa.ListArray:
        """The ids of (W,) chunks; those not seen before are tokenized."""
        if not len(chunks):
            return self.ids.slice(0, 0)
        # Encoded together with what is known, a chunk's code is its place there, or behind it if it is new.
        encoded = pa.chunked_array([self.words, chunks]).dictionary_encode().chunks[-1]
        words, codes = encoded.dictionary, encoded.indices
        ids = self.ids
        if len(words) > len(self.words):
            ids = pa.concat_arrays([ids, self._tokenize(words.slice(len(self.words)))])
        found: pa.ListArray = ids.take(codes)
        self._remember(words, ids, np.bincount(codes.to_numpy(), minlength=len(words)))
        return found

    def _tokenize(self, words: pa.Array) -> pa.ListArray:
        texts = [self.cutter.shorten(word) for word in words.cast(pa.large_string()).to_pylist()]
        # As one input of many words: 4.5 µs for each in place of 10.8 as inputs of their own (MiniLM's tokenizer).
        found = self.backend.encode(texts, is_pretokenized=True, add_special_tokens=False)
        counts = np.bincount(np.array(found.word_ids, np.int64), minlength=len(texts))
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.array(found.ids, self.dtype)))

    def _remember(self, words: pa.Array, ids: pa.ListArray, uses: npt.NDArray[np.int64]) -> None:
        uses[: len(self.uses)] += self.uses
        if len(words) > len(self.words):
            fits = pc.and_(
                pc.less_equal(pc.binary_length(words), MAX_WORD_BYTES),
                pc.less_equal(pc.list_value_length(ids), MAX_WORD_BYTES),
            ).to_numpy(zero_copy_only=False)
            if fits.sum() > MAX_WORDS:  # the half that is used most stays
                ranked = np.argsort(np.where(fits, -uses, 1), kind="stable")
                fits[ranked[MAX_WORDS // 2 :]] = False
                uses //= 2
            if not fits.all():
                words, ids, uses = words.filter(pa.array(fits)), ids.filter(pa.array(fits)), uses[fits]
        self.words, self.ids, self.uses = words, ids, uses


class Wordwise:
    """A tokenizer that cuts texts into chunks, without special tokens."""

    def __init__(self, backend: Any, cutter: Cutter, dtype: npt.DTypeLike) -> None:
        plain = type(backend).from_str(backend.to_str())  # a copy, since truncation is a state
        plain.no_truncation()
        plain.no_padding()
        self.cutter = cutter
        self.cache = WordCache(plain, cutter, dtype)

    def tokenize(
        self, texts: pa.Array, enough: int | None = None, side: Literal["left", "right"] = "right"
    ) -> pa.ListArray:
        """The ids of (N,) texts, one list for each: all of them, or at least `enough` of those that truncation on `side` keeps."""
        whole = self.cutter.has_added(texts)
        data = texts.cast(pa.large_binary())
        if enough is None:
            return self._tokenize(data, whole, None, side)
        return self._tokenize_ends(data, whole, enough, BYTES_PER_TOKEN * enough + 64, side)

    def _tokenize_ends(
        self, texts: pa.Array, whole: npt.NDArray[np.bool_], enough: int, limit: int, side: Literal["left", "right"]
    ) -> pa.ListArray:
        """Look at `limit` bytes of each text, and at more of those where that was not enough."""
        is_cut = pc.greater(pc.binary_length(texts), limit).to_numpy(zero_copy_only=False)
        if not is_cut.any():
            return self._tokenize(texts, whole, None, side)
        ends = pc.binary_slice(texts, 0, limit) if side == "right" else pc.binary_slice(texts, -limit)
        found = self._tokenize(ends, whole, is_cut, side)
        counts = pc.list_value_length(found).to_numpy(zero_copy_only=False)
        short = np.flatnonzero(is_cut & (counts < enough))
        if not len(short):
            return found
        more = self._tokenize_ends(texts.take(pa.array(short)), whole[short], enough, 8 * limit, side)
        places = np.arange(len(texts))
        places[short] = len(texts) + np.arange(len(short))
        return pa.concat_arrays([found, more]).take(pa.array(places))

    def _tokenize(
        self,
        texts: pa.Array,
        whole: npt.NDArray[np.bool_],
        is_cut: npt.NDArray[np.bool_] | None,
        side: Literal["left", "right"],
    ) -> pa.ListArray:
        data, offsets = as_bytes(texts)
        chunks, bounds = self.cutter.cut(data, offsets, whole)
        if is_cut is not None:
            chunks, bounds = drop_torn(chunks, bounds, is_cut, side)
        found = self.cache.look_up(chunks)
        ends = found.offsets.to_numpy()[bounds].astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), found.values)


def as_bytes(texts: pa.Array) -> tuple[bytes, Places]:
    """The bytes of (N,) large_binary texts, and (N + 1,) where each begins."""
    _, ends, data = texts.buffers()
    offsets = np.frombuffer(ends, np.int64, len(texts) + 1, 8 * texts.offset)
    first, last = int(offsets[0]), int(offsets[-1])
    return (memoryview(data)[first:last].tobytes() if last > first else b""), offsets - first


def drop_torn(
    chunks: pa.Array, bounds: Places, is_cut: npt.NDArray[np.bool_], side: Literal["left", "right"]
) -> tuple[pa.Array, Places]:
    """Leave out the chunk of each cut text through which the cut went."""
    counts = np.diff(bounds)
    torn = is_cut & (counts > 0)
    stays = np.ones(len(chunks), np.bool_)
    stays[bounds[1:][torn] - 1 if side == "right" else bounds[:-1][torn]] = False
    return chunks.filter(pa.array(stays)), np.concatenate([[0], np.cumsum(counts - torn)])
