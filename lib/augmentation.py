"""Augmentation: training rows changed anew at each step, word by word, their labels kept. Validation and test rows never are.

Words are left out or change places with the next one (Wei and Zou 2019, arXiv 1901.11196), or become what a masked-language model says
in their place (Kobayashi 2018, arXiv 1805.06201). All is decided by (seed, step) and the row, so any number of workers, and a run that
goes on, see the same rows. Letters: B rows, L padded length, T tokens of a row, M tokens that are replaced, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lib.batching import IntArray
from lib.checkpoint import fetch
from lib.errors import UsageError
from lib.facts import check_weights
from lib.language_model import check_head, load_language_model, logits_at
from lib.mapped import LabelledSet
from lib.pieces import BoolArray, FloatArray, Pieces, draw_lots, find_pieces
from lib.tokenization import Tokenizer, load_tokenizer
from lib.train_config import AugmentSection, TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPLACE, SAMPLE, SWAP, DROP = range(4)
"""Each kind of chance has a lot for each token."""

OF_AUGMENTATION = 2**32 - 2
"""In the key of a row's lots, so that they are none of the masking's or the order's."""


@dataclass(frozen=True, kw_only=True)
class Replacer:
    """A masked-language model that says what could stand in a word's place."""

    model: "PreTrainedModel"
    mask_id: int

    def replace(
        self,
        ids: IntArray,
        mask: BoolArray,
        segments: IntArray | None,
        chosen: BoolArray,
        lots: FloatArray,
        special: BoolArray,
    ) -> IntArray:
        """Ids (B, L) whose chosen tokens (B, L) are drawn anew by lots (B, L) from 0 to 1; never special ones (V,).

        In fp32 whatever training computes in: what is drawn must not depend on which rows are beside a row.
        """
        device = self.model.device
        hidden = np.where(chosen, self.mask_id, ids)
        inputs = [torch.from_numpy(one).to(device) for one in (hidden, mask.astype(np.int64), chosen)]
        others = None if segments is None else torch.from_numpy(segments).to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            logits = logits_at(self.model, self.model, inputs[0], inputs[1], inputs[2], others).double()
        logits = logits[:, : len(special)]  # a padded vocabulary has columns that are no tokens
        logits[:, torch.from_numpy(np.flatnonzero(special)).to(device)] = -torch.inf
        sums = logits.softmax(dim=1).cumsum(dim=1)
        drawn = torch.searchsorted(sums, torch.from_numpy(lots[chosen]).to(device)[:, None] * sums[:, -1:], right=True)
        found = ids.copy()
        found[chosen] = drawn[:, 0].clamp(max=logits.shape[1] - 1).cpu().numpy()
        return found


@dataclass(frozen=True, kw_only=True)
class Augmenter:
    """How the rows of a step are changed."""

    wanted: AugmentSection
    seed: int
    pieces: Pieces
    replacer: Replacer | None = None

    def rows_of(self, data: LabelledSet, step: int) -> "AugmentedSet":
        """A set as it is seen at a step."""
        return AugmentedSet(data, self, step)

    def change(
        self, ids: IntArray, mask: BoolArray, segments: IntArray | None, keys: Sequence[tuple[int, ...]], fill: int
    ) -> tuple[IntArray, BoolArray, IntArray | None]:
        """Rows changed, given ids, mask and perhaps segment ids (B, L) and a key for each row; padded with `fill` anew."""
        lots, lengths = draw_lots(keys, mask, 4), mask.sum(axis=1)
        starts, special = self.pieces.starts(ids), self.pieces.special
        if self.replacer is not None:
            chosen = mask & ~special[ids] & (self.pieces.of_first(ids, lots[:, REPLACE]) < self.wanted.replace)
            if chosen.any():
                ids = self.replacer.replace(ids, mask, segments, chosen, lots[:, SAMPLE], special)
        orders = [
            reorder(starts[row, :length], special[ids[row, :length]], lots[row, :, :length], self.wanted)
            for row, length in enumerate(lengths)
        ]
        longest = max(map(len, orders))
        found, kept = np.full((len(ids), longest), fill, np.int64), np.zeros((len(ids), longest), np.bool_)
        types = None if segments is None else np.zeros((len(ids), longest), np.int64)
        for row, order in enumerate(orders):
            found[row, : len(order)], kept[row, : len(order)] = ids[row, order], True
            if types is not None and segments is not None:
                types[row, : len(order)] = segments[row, order]
        return found, kept, types


def reorder(starts: BoolArray, special: BoolArray, lots: FloatArray, wanted: AugmentSection) -> IntArray:
    """Which tokens of a row stay, in their new order, given where words begin and what is special (T,), and lots (4, T).

    Words change places inside a text: special tokens stay where they are, and nothing moves across one. Of the words between two of
    them at least one stays: that with the highest lot.
    """
    firsts = np.flatnonzero(starts)
    words = np.split(np.arange(len(starts)), firsts[1:])
    found: list[IntArray] = []
    stretch: list[int] = []

    def end_stretch() -> None:
        places = list(stretch)
        spot = 0
        while spot + 1 < len(places):
            if lots[SWAP, firsts[places[spot]]] < wanted.swap:
                places[spot], places[spot + 1] = places[spot + 1], places[spot]
                spot += 1
            spot += 1
        fates = {place: lots[DROP, firsts[place]] for place in places}
        last = max(fates, key=fates.__getitem__, default=None)
        found.extend(words[place] for place in places if place == last or fates[place] >= wanted.drop)
        stretch.clear()

    for number, first in enumerate(firsts):
        if special[first]:
            end_stretch()
            found.append(words[number])
        else:
            stretch.append(number)
    end_stretch()
    return np.concatenate(found)


class AugmentedSet(LabelledSet):
    """A labelled set whose rows are changed when they are gathered."""

    def __init__(self, data: LabelledSet, augmenter: Augmenter, step: int) -> None:
        self.__dict__.update(data.__dict__)
        self.augmenter, self.step = augmenter, step

    def gather(self, rows: IntArray) -> tuple[IntArray, BoolArray, IntArray | None]:
        """Changed rows, padded: ids and mask (B, L) and, for pairs, segment ids."""
        keys = [(self.augmenter.seed, self.step, int(row), OF_AUGMENTATION) for row in rows]
        return self.augmenter.change(*super().gather(rows), keys, self.pad_token_id)


def check_augment(config: TrainConfig) -> None:
    """Raise `UsageError` if rows are to be changed together with what that does not go with."""
    wanted = config.augment
    if wanted.model is not None and not wanted.replace:
        raise UsageError("augment.model is set, but no words are replaced; set augment.replace, 0.1 for example")
    refused = {
        "model.window_stride": (
            config.model.window_stride is not None,
            "words that two windows share would be changed twice, and differently",
        ),
        "contrastive.iterations": (
            config.contrastive.iterations is not None,
            "pairs are drawn once, from rows as they are",
        ),
    }
    name = next((f"augment.{key}" for key in ("drop", "swap", "replace") if getattr(wanted, key)), None)
    for key, (is_set, why) in refused.items():
        if name and is_set:
            raise UsageError(f"{name} with {key}: {why}; leave one of the two out")


def new_augmenter(
    config: TrainConfig, base: str, replacing: str, max_length: int, device: torch.device
) -> Augmenter | None:
    """What changes the training rows of a run, if that is asked for.

    `base` and `replacing` are `model.base` and `augment.model`, or again the base, as they are known in any working directory.
    Raises `UsageError` as `check_augmenter` does.
    """
    wanted, trust = config.augment, config.model.trust
    if not wanted.is_wanted:
        return None
    tokenizer, pieces = tell_words(config, base, max_length)
    replacer = None
    if wanted.replace:
        folder, key, mask_id = find_replacer(config, replacing, tokenizer)
        model: Any = load_language_model(folder, key, trust)[0]
        replacer = Replacer(model=model.to(device).eval().requires_grad_(False), mask_id=mask_id)
    return Augmenter(wanted=wanted, seed=config.optim.seed, pieces=pieces, replacer=replacer)


def check_augmenter(config: TrainConfig, base: str, replacing: str, max_length: int) -> None:
    """Raise `UsageError` if the tokenizer does not tell words, or the model cannot replace them: before workers find out.

    Whether it can, its weights tell: they are loaded once in a process, for however many configurations.
    """
    if config.augment.is_wanted:
        tokenizer, _ = tell_words(config, base, max_length)
        if config.augment.replace:
            folder, key, _ = find_replacer(config, replacing, tokenizer)
            check_head(folder, key, config.model.trust)


def tell_words(config: TrainConfig, base: str, max_length: int) -> tuple[Tokenizer, Pieces]:
    """The tokenizer of the base, and where its words begin. Raises `UsageError` if it does not say."""
    model = config.model
    tokenizer = load_tokenizer(fetch(base, model.trust), max_length, model.trust.code, model.truncation)
    pieces = find_pieces(tokenizer)
    if pieces is None:
        raise UsageError(
            "augment: model.base has a tokenizer whose tokens do not say where words begin (neither WordPiece nor byte-level nor"
            " SentencePiece); leave it out"
        )
    return tokenizer, pieces


def find_replacer(config: TrainConfig, replacing: str, tokenizer: Tokenizer) -> tuple[str, str, int]:
    """The folder of the model that replaces words, what names it in messages, and the id of the mask.

    Raises `UsageError` if it has no weights that may be loaded, or other tokens than the base.
    """
    key, trust = "model.base" if config.augment.model is None else "augment.model", config.model.trust
    folder, mask_id = fetch(replacing, trust), tokenizer.reference.mask_token_id
    check_weights(folder, key, replacing, trust)
    theirs = load_tokenizer(folder, tokenizer.max_length, trust.code).reference
    if theirs.get_vocab() != tokenizer.reference.get_vocab():
        raise UsageError(
            f"augment.model {replacing}: its tokenizer ({len(theirs):,} tokens) is another one than that of model.base"
            f" ({len(tokenizer.reference):,}), so its answers mean other words; give a model with the same tokenizer, such as"
            " jobs.pretrain makes of model.base"
        )
    if mask_id is None:
        raise UsageError("augment.replace: the tokenizer of model.base has no mask token; leave it out")
    return folder, f"augment.replace: {key}", mask_id
