"""Masking: which tokens a masked-language model is asked for, and what it sees in their places (Devlin et al. 2018, arXiv 1810.04805).

Decided for each row by its own key alone, whatever rows are beside it. Pure functions on ids. Letters: B rows, L padded length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lib.batching import IntArray
from lib.errors import UsageError
from lib.pieces import BoolArray, Pieces, draw_lots, find_pieces, special_ids
from lib.tokenization import Tokenizer

MASKED, CHANGED = 0.8, 0.1
"""Shares of the tokens asked for in whose places the mask, or any other token, is seen (section 3.1); the rest is seen as it is."""


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How tokens are chosen and hidden."""

    probability: float
    """of each token, or with `pieces` of each word"""
    mask_id: int
    special: BoolArray
    """(V,), tokens that are never asked for"""
    pieces: Pieces | None = None
    """for whole words"""

    def draw(
        self, ids: IntArray, mask: npt.NDArray[np.bool_], keys: Sequence[tuple[int, ...]]
    ) -> tuple[IntArray, BoolArray]:
        """What the model sees (B, L), and which of its tokens it is asked for (B, L), given ids and mask (B, L) and a key a row."""
        choice, fate, other = draw_lots(keys, mask, 3).swapaxes(0, 1)
        if self.pieces is not None:
            choice = self.pieces.of_first(ids, choice)
        chosen = mask & ~self.special[ids] & (choice < self.probability)
        usual = np.flatnonzero(~self.special)
        seen = np.where(chosen & (fate < MASKED), self.mask_id, ids)
        changed = chosen & (fate >= MASKED) & (fate < MASKED + CHANGED)
        return np.where(changed, usual[(other * len(usual)).astype(np.int64) % len(usual)], seen), chosen


def new_masking(tokenizer: Tokenizer, probability: float, whole_words: bool) -> Masking:
    """The masking of a tokenizer's rows. Raises `UsageError` if it has no mask token, or does not tell words."""
    reference = tokenizer.reference
    if reference.mask_token_id is None:
        raise UsageError(
            "model.base: its tokenizer has no mask token, so nothing can be hidden with it; take another base, or add one to its tokenizer"
        )
    pieces = find_pieces(tokenizer) if whole_words else None
    if whole_words and pieces is None:
        raise UsageError(
            "mlm.whole_words: model.base has a tokenizer whose tokens do not say where words begin (neither WordPiece nor byte-level"
            " nor SentencePiece); leave it out"
        )
    return Masking(
        probability=probability, mask_id=reference.mask_token_id, special=special_ids(tokenizer), pieces=pieces
    )
