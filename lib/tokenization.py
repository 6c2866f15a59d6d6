"""From text to token ids, the one path that training and scoring share: the same text gives the same ids in both.

What leaves here is flat and small: ids in the smallest integer type that holds the vocabulary, and lengths.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lib.config import Truncation, raise_if_code_was_refused
from lib.cutting import cutter_of
from lib.errors import UsageError, say
from lib.facts import import_transformers
from lib.template import Prompt, Template, find_template, fit, lay_out, spans
from lib.windows import Windows
from lib.wordwise import Wordwise

WHOLE = 2**30
"""More tokens than a text has."""

HARD_TEXTS = (
    "",
    "The parcel arrived two days late, but the support team answered within minutes and sent a new one.",
    " FREE  entry!!!\tText WIN to 80086 now & claim your prize…\r\n",
    "naïve café, re\u0301sume\u0301 \u0301 ÅNGSTRÖM İstanbul ﬁn ½ ǆ ß ﷺ Ĳ ΟΔΟΣ",
    "東京は日本の首都です。一二三 привет, мир! שָׁלוֹם العربية हिन्दी ภาษาไทย 한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \u200b\u200d\ufeff\u2028\u00a0\u3000\x00\x0b\x1c\x85 \ufffd a\x00b \u00adc",
    "[CLS] a[SEP]b <s></s> [MASK]<mask> x<mask>y [PAD] <pad> [UNK]<unk> ##ing ▁the Ġthe",
    "don't can't I'LL we've 'tis ``quoted'' \"both\" -- 1,204.75 3.20-2.75 http://example.com/a?b=c&d $x^{2}$ snake_case",
    " ".join(("x" * 100, "x" * 101, "é" * 100, "e\u0301" * 101, "中" * 50)),
    "Nothing works. " * 40,
)
"""Tokenized both ways whenever a tokenizer is loaded, so that a fast way that is wrong for it is never taken."""


@dataclass(frozen=True)
class Tokens:
    """Token ids of N texts, one after the other without padding."""

    ids: npt.NDArray[np.integer]
    """(total,)"""
    lengths: npt.NDArray[np.int32]
    """(N,), special tokens included; with windows those of all windows of a text"""
    truncated: npt.NDArray[np.bool_]
    """(N,), whether text was cut off"""
    type_ids: npt.NDArray[np.uint8] | None
    """(total,), which of a pair's two texts; None for single texts and for models without segments"""

    def equals(self, other: "Tokens") -> bool:
        """Whether all of it is the same."""
        mine, theirs = ([one.ids, one.lengths, one.truncated, one.type_ids] for one in (self, other))
        return all(
            left is right is None or (left is not None and right is not None and np.array_equal(left, right))
            for left, right in zip(mine, theirs, strict=True)
        )

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

    def __init__(
        self,
        folder: str,
        max_length: int,
        trust_code: bool = False,
        truncation: Truncation = "head",
        windows: Windows | None = None,
        prompt: Prompt | None = None,
    ) -> None:
        """`truncation`: which part of a long text stays. `head` is what the tokenizer itself does, nearly always the beginning.
        `prompt`: a template around each text, which is never cut.

        Raises `UsageError` if windows would share all that they hold, or a template leaves no room for the text.
        """
        self.max_length = max_length
        self.prompt = prompt
        self.room = max_length - (0 if prompt is None else len(prompt))
        """tokens of a text and its special tokens, a template's left out"""
        self.truncation = truncation
        self.windows = windows
        try:  # with trust_remote_code left open, transformers asks on standard input
            self.reference: Any = import_transformers().AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_code
            )
        except ValueError as error:
            raise_if_code_was_refused(folder, error)
            raise
        self.limit = WHOLE if truncation == "head_tail" else self.room
        """tokens at which the tokenizer itself cuts"""
        self.around = (0, 0)
        """special tokens before and behind a text, for windows and a template"""
        if prompt is not None:
            self.around = self.find_around()
            if self.room <= sum(self.around):
                raise UsageError(
                    f"prompt.template has {len(prompt)} tokens, and model.max_length = {max_length} leaves no room for the text beside"
                    " them; raise it, or shorten the template"
                )
        if windows is not None:
            self.around = self.find_around()
            room = max_length - sum(self.around)
            if windows.stride >= room:
                raise UsageError(
                    f"model.window_stride = {windows.stride}, but windows of model.max_length = {max_length} hold {max(0, room)} tokens"
                    " beside the special ones, and must not share all of them; lower model.window_stride"
                )
            self.limit = windows.limit(max_length, sum(self.around))
        self.dtype = np.uint16 if len(self.reference) <= 2**16 else np.int32
        self.uses_segments = "token_type_ids" in self.reference.model_input_names
        if truncation == "tail":
            self.reference.truncation_side = "left"
        self.truncation_side: Literal["left", "right"] = "left" if self.reference.truncation_side == "left" else "right"
        self.backend: Any = getattr(self.reference, "backend_tokenizer", None)
        self.wordwise: Wordwise | None = None
        """the fast way, if it is right for this tokenizer"""
        self.templates: tuple[Template, ...] = ()
        """of a text and of a pair, for the fast way"""
        if self.backend is not None:
            self.backend.no_padding()
            self.backend.enable_truncation(self.limit, strategy="longest_first", direction=self.truncation_side)
            self._try_wordwise(folder)

    def __getstate__(self) -> dict[str, Any]:
        """Travels to other processes without the reference, which only a tokenizer without a backend needs to encode."""
        return self.__dict__ | {"reference": None if self.backend is not None else self.reference}

    def find_around(self) -> tuple[int, int]:
        """How many special tokens stand before and behind a text."""
        whole, alone = (
            self.reference("a", add_special_tokens=special, truncation=False)["input_ids"] for special in (True, False)
        )
        before = next(start for start in range(len(whole)) if whole[start : start + len(alone)] == alone)
        return before, len(whole) - len(alone) - before

    def _try_wordwise(self, folder: str) -> None:
        """Take the fast way if it gives the same on a few texts that are hard to get right."""
        cutter = cutter_of(self.backend)
        if cutter is None:
            return
        wordwise = Wordwise(self.backend, cutter, self.dtype)
        single, pair = (find_template(wordwise.cache.backend, number) for number in (1, 2))
        if single is None or pair is None or self.room <= max(len(single), len(pair)):
            return
        self.templates = (single, pair)
        for firsts, seconds in ((HARD_TEXTS, None), (HARD_TEXTS, HARD_TEXTS[::-1])):
            sides = [as_texts(side) for side in (firsts, seconds) if side is not None]
            if not self._encode_wordwise(wordwise, sides).equals(self._encode_backend(sides)):
                say(f"{folder}: word by word its tokenizer gives other ids than transformers: going on without, slower")
                return
        self.wordwise = wordwise

    def encode(self, texts: pa.Array | Sequence[str], seconds: pa.Array | Sequence[str] | None = None) -> Tokens:
        """Tokenize texts, or pairs of them, with special tokens, cut to `max_length` as `truncation=True` of transformers does.

        With windows what is longer is laid out in windows of `max_length`, one behind the other; pairs cannot be.
        Arrow arrays of strings without nulls are taken as they are.
        """
        sides = [as_texts(side) for side in (texts, seconds) if side is not None]
        if len({len(side) for side in sides}) > 1:
            raise ValueError(f"{len(sides[0])} first texts and {len(sides[1])} second ones, expected as many")
        if self.windows is not None and len(sides) > 1:
            raise ValueError("windows of a pair of texts were asked for, expected single texts")
        if self.prompt is not None and len(sides) > 1:
            raise ValueError("a template around a pair of texts was asked for, expected single texts")
        if self.wordwise is not None:
            found = self._encode_wordwise(self.wordwise, sides)
        else:
            found = self._encode_reference(sides) if self.backend is None else self._encode_backend(sides)
        if self.windows is not None and (found.lengths > self.max_length).any():
            ids, lengths = self.windows.lay_out(found.ids, found.lengths, self.max_length, self.around)
            return Tokens(ids=ids, lengths=lengths, truncated=found.truncated, type_ids=None)
        if self.truncation == "head_tail":
            found = keep_ends(found, self.room)
        if self.prompt is None:
            return found
        return Tokens(
            ids=self.prompt.wrap(found.ids, found.lengths, self.around),
            lengths=(found.lengths + len(self.prompt)).astype(np.int32),
            truncated=found.truncated,
            type_ids=None,
        )

    def text_of(self, ids: npt.NDArray[np.integer]) -> str:
        """The text of a row's ids, as the model reads it; what windows share is there once."""
        pieces = [ids]
        if self.windows is not None:
            shared = self.around[0] + self.windows.stride
            starts = range(0, len(ids), self.max_length)
            pieces = [ids[start + (shared if start else 0) : start + self.max_length] for start in starts]
        text: str = self.reference.decode(np.concatenate(pieces), skip_special_tokens=True)
        return text

    def _encode_wordwise(self, wordwise: Wordwise, sides: list[pa.Array]) -> Tokens:
        template = self.templates[len(sides) - 1]
        room, cut_side = self.limit - len(template), self.truncation_side
        if len(sides) == 1:
            found = wordwise.tokenize(sides[0], room + 1, cut_side)
        else:  # which of two long texts gives way depends on the whole length of both
            order = np.arange(2 * len(sides[0])).reshape(2, -1).T.ravel()
            found = wordwise.tokenize(pa.concat_arrays(sides).take(pa.array(order)))
        counts = np.diff(found.offsets.to_numpy()).astype(np.int64).reshape(-1, len(sides))
        kept = fit(counts, room)
        ids, type_ids = lay_out(found, kept, template, cut_side)
        return Tokens(
            ids=ids,
            lengths=(kept.sum(axis=1) + len(template)).astype(np.int32),
            truncated=counts.sum(axis=1) > room,
            type_ids=type_ids if len(sides) == 2 and self.uses_segments else None,
        )

    def _encode_backend(self, sides: list[pa.Array]) -> Tokens:
        """The way of tokenizers whose texts cannot be taken apart."""
        lists = [side.to_pylist() for side in sides]
        inputs = lists[0] if len(lists) == 1 else list(zip(*lists, strict=True))
        found = self.backend.encode_batch_fast(inputs, add_special_tokens=True)
        type_ids = [one.type_ids for one in found] if len(sides) == 2 and self.uses_segments else None
        return self._tokens([one.ids for one in found], [bool(one.overflowing) for one in found], type_ids)

    def _encode_reference(self, sides: list[pa.Array]) -> Tokens:
        """The way of tokenizers that are written in Python: slow, and the definition of right."""
        pairs = [side.to_pylist() for side in sides]
        found = self.reference(*pairs, truncation=True, max_length=self.limit)
        whole = self.reference(*pairs, truncation=False, verbose=False)
        cut = [len(short) < len(long) for short, long in zip(found["input_ids"], whole["input_ids"], strict=True)]
        return self._tokens(found["input_ids"], cut, found.get("token_type_ids") if len(sides) == 2 else None)

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


def keep_ends(tokens: Tokens, max_length: int) -> Tokens:
    """Take the middle out of what is longer than `max_length`: a quarter stays at the beginning, three at the end.

    Of 512 tokens 128 and 382 and one special token on each side (Sun et al. 2019, arXiv 1905.05583, section 5.3.1).
    """
    over = tokens.lengths > max_length
    if not over.any():
        return tokens
    ends = np.cumsum(tokens.lengths, dtype=np.int64)
    head = max_length // 4 + 1
    first, last = (ends - tokens.lengths)[over] + head, ends[over] - (max_length - head)
    stays = ~spans(first, last, len(tokens.ids))
    return Tokens(
        ids=tokens.ids[stays],
        lengths=np.where(over, max_length, tokens.lengths).astype(np.int32),
        truncated=tokens.truncated | over,
        type_ids=None if tokens.type_ids is None else tokens.type_ids[stays],
    )


def as_texts(texts: pa.Array | Sequence[str]) -> pa.Array:
    """Texts as large_string."""
    if not isinstance(texts, pa.Array):
        return pa.array(list(texts), pa.large_string())
    if texts.null_count:
        raise ValueError(f"{texts.null_count} of {len(texts)} texts are null, expected none: filter them out before")
    return texts.cast(pa.large_string())


@functools.lru_cache(maxsize=4)
def load_tokenizer(
    folder: str,
    max_length: int,
    trust_code: bool = False,
    truncation: Truncation = "head",
    windows: Windows | None = None,
    prompt: Prompt | None = None,
) -> Tokenizer:
    """Load a tokenizer once per process: the cache survives between the tasks of one worker."""
    return Tokenizer(folder, max_length, trust_code, truncation, windows, prompt)
