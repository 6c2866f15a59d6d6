"""From text to token ids, the one path that training and scoring share: the same text gives the same ids in both.

What leaves here is flat and small: ids in the smallest integer type that holds the vocabulary, and lengths.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lib.config import raise_if_code_was_refused


@dataclass(frozen=True)
class Tokens:
    """Token ids of N texts, one after the other without padding."""

    ids: npt.NDArray[np.integer]
    """(total,)"""
    lengths: npt.NDArray[np.int32]
    """(N,), special tokens included"""
    truncated: npt.NDArray[np.bool_]
    """(N,), whether text was cut off"""
    type_ids: npt.NDArray[np.uint8] | None
    """(total,), which of a pair's two texts; None for single texts and for models without segments"""

    @property
    def offsets(self) -> npt.NDArray[np.int32]:
        """(N + 1,), row i is `ids[offsets[i]:offsets[i + 1]]`."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)

    def id_lists(self) -> pa.ListArray:
        """The ids as one Arrow list per text."""
        return pa.ListArray.from_arrays(pa.array(self.offsets), pa.array(self.ids))

    def type_id_lists(self) -> pa.ListArray | None:
        """The segment ids as one Arrow list per text, if there are any."""
        return (
            None if self.type_ids is None else pa.ListArray.from_arrays(pa.array(self.offsets), pa.array(self.type_ids))
        )


class Tokenizer:
    """A Hugging Face tokenizer that cuts at `max_length` tokens and never pads."""

    def __init__(self, folder: str, max_length: int, trust_code: bool = False) -> None:
        from transformers import AutoTokenizer

        self.max_length = max_length
        try:  # with trust_remote_code left open, transformers asks on standard input
            self.reference: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_code
            )
        except ValueError as error:
            raise_if_code_was_refused(folder, error)
            raise
        self.dtype = np.uint16 if len(self.reference) <= 2**16 else np.int32
        self.uses_segments = "token_type_ids" in self.reference.model_input_names
        self.backend: Any = getattr(self.reference, "backend_tokenizer", None)
        if self.backend is not None:
            self.backend.no_padding()
            self.backend.enable_truncation(
                max_length, strategy="longest_first", direction=self.reference.truncation_side
            )

    def encode(self, texts: Sequence[str], seconds: Sequence[str] | None = None) -> Tokens:
        """Tokenize texts, or pairs of them, with special tokens, cut to `max_length` as `truncation=True` does."""
        if self.backend is None:
            return self._encode_reference(texts, seconds)
        inputs = list(texts) if seconds is None else list(zip(texts, seconds, strict=True))
        found = self.backend.encode_batch_fast(inputs, add_special_tokens=True)
        type_ids = [one.type_ids for one in found] if seconds is not None and self.uses_segments else None
        return self._tokens([one.ids for one in found], [bool(one.overflowing) for one in found], type_ids)

    def _encode_reference(self, texts: Sequence[str], seconds: Sequence[str] | None) -> Tokens:
        """The way of tokenizers that are written in Python: slow, and the definition of right."""
        pairs = (list(texts),) if seconds is None else (list(texts), list(seconds))
        found = self.reference(*pairs, truncation=True, max_length=self.max_length)
        whole = self.reference(*pairs, truncation=False, verbose=False)
        cut = [len(short) < len(long) for short, long in zip(found["input_ids"], whole["input_ids"], strict=True)]
        return self._tokens(found["input_ids"], cut, found.get("token_type_ids") if seconds is not None else None)

    def _tokens(self, ids: list[list[int]], truncated: list[bool], type_ids: list[list[int]] | None) -> Tokens:
        lengths = np.fromiter(map(len, ids), dtype=np.int32, count=len(ids))
        total = int(lengths.sum())
        return Tokens(
            ids=np.fromiter((token for row in ids for token in row), dtype=self.dtype, count=total),
            lengths=lengths,
            truncated=np.array(truncated, dtype=np.bool_),
            type_ids=None
            if type_ids is None
            else np.fromiter((segment for row in type_ids for segment in row), dtype=np.uint8, count=total),
        )


@functools.lru_cache(maxsize=4)
def load_tokenizer(folder: str, max_length: int, trust_code: bool = False) -> Tokenizer:
    """Load a tokenizer once per process: the cache survives between the tasks of one worker."""
    return Tokenizer(folder, max_length, trust_code)
