"""A classifier without a head of its own: a template around each text, and the words of each label at its mask.

A masked prompt with verbalizers (Schick and Schuetze 2021, arXiv 2001.07676, section 3.1): a label's logit is that of its word, or the
mean of its words', in place of the mask. Letters: B rows, L padded length, H hidden size, V vocabulary, W words, C classes.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from lib.errors import UsageError
from lib.facts import PROMPT
from lib.template import Prompt

ARCHITECTURE = "TextsweepPromptForSequenceClassification"
"""Its name in `config.json`."""

TEXT, MASK = "{text}", "[MASK]"
"""In a template, whatever the tokenizer calls its mask."""


@dataclass(frozen=True, kw_only=True)
class Verbalizers:
    """A template and the words of each label, as token ids; kept in `config.json`."""

    template: str
    before: tuple[int, ...]
    behind: tuple[int, ...]
    """of the text"""
    mask_at: int
    """place of the template's mask in a row, special tokens counted: from its beginning, or where below 0 from its end"""
    words: tuple[tuple[int, ...], ...]
    """(C, any), one token each"""

    @property
    def prompt(self) -> Prompt:
        """What the tokenizer puts around each text."""
        return Prompt(self.before, self.behind)


def find_verbalizers(
    tokenizer: Any, around: tuple[int, int], template: str, words: Mapping[str, Sequence[str]]
) -> Verbalizers:
    """Turn a template and each label's words into token ids; `around`: special tokens before and behind a text.

    Raises `UsageError` if the tokenizer has no mask, or a word is not one token.
    """
    if template.count(TEXT) != 1 or template.count(MASK) != 1:
        raise UsageError(
            f"prompt.template = {template!r}: expected {TEXT} once and {MASK} once, such as '{TEXT} It was {MASK}.'"
        )
    if tokenizer.mask_token is None:
        raise UsageError(
            "prompt.template: model.base has no mask token in its tokenizer, so it never learned to fill one; take another base"
        )

    def ids_of(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    first, _, last = template.replace(MASK, tokenizer.mask_token).partition(TEXT)
    before, behind = (ids_of(one) if one.strip() else [] for one in (first.rstrip(), last))
    mask = tokenizer.mask_token_id
    mask_at = around[0] + before.index(mask) if mask in before else behind.index(mask) - len(behind) - around[1]
    space = "" if template.startswith(MASK) else " "
    found = {label: [ids_of(space + word) for word in several] for label, several in words.items()}
    for label, several in words.items():
        for word, ids in zip(several, found[label], strict=True):
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                pieces = " ".join(tokenizer.convert_ids_to_tokens(ids))
                raise UsageError(
                    f"labels.file: the word {word!r} of label {label!r} is {pieces!r} to this tokenizer, expected one token that it"
                    " knows; choose another word"
                )
    return Verbalizers(
        template=template,
        before=tuple(before),
        behind=tuple(behind),
        mask_at=mask_at,
        words=tuple(tuple(ids[0] for ids in several) for several in found.values()),
    )


class AtMask(nn.Module):
    """An encoder of whose hidden states only those at the template's mask are given to what reads them."""

    def __init__(self, encoder: nn.Module, mask_at: int) -> None:
        super().__init__()
        self.encoder, self.mask_at = encoder, mask_at

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **others: Any) -> BaseModelOutput:
        """Ids and mask (B, L) to hidden states (B, 1, H)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **others).last_hidden_state
        ends = attention_mask.sum(dim=1) if self.mask_at < 0 else torch.zeros_like(input_ids[:, 0])
        places = (ends + self.mask_at)[:, None, None].expand(-1, 1, states.shape[2])
        return BaseModelOutput(last_hidden_state=states.gather(1, places))


class PromptClassifier(nn.Module):
    """A masked language model that answers with the words of labels."""

    def __init__(self, language_model: Any) -> None:
        """Of a model whose `config` describes the `Verbalizers`."""
        super().__init__()
        self.config = language_model.config
        known = getattr(self.config, PROMPT)
        prefix = language_model.base_model_prefix
        encoder = getattr(language_model, prefix)
        self.takes_segments = "token_type_ids" in inspect.signature(encoder.forward).parameters
        setattr(language_model, prefix, AtMask(encoder, known["mask_at"]))
        self.language_model = language_model
        several = known["words"]
        self.register_buffer("words", torch.tensor([word for words in several for word in words]))
        shares = torch.zeros(sum(map(len, several)), len(several))
        place = 0
        for index, words in enumerate(several):
            shares[place : place + len(words), index] = 1 / len(words)
            place += len(words)
        self.register_buffer("shares", shares)
        """(W, C) of each word in its label's logit"""

    @property
    def base_model(self) -> nn.Module:
        """The encoder."""
        found: nn.Module = getattr(self.language_model, self.language_model.base_model_prefix).encoder
        return found

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Ids, mask and segments (B, L) to logits (B, C)."""
        segments = {"token_type_ids": token_type_ids} if self.takes_segments and token_type_ids is not None else {}
        found = self.language_model(input_ids=input_ids, attention_mask=attention_mask, **segments).logits[:, 0]
        return SequenceClassifierOutput(logits=found[:, self.words] @ self.shares)


def save_prompted(language_model: Any, verbalizers: Verbalizers, folder: str) -> None:
    """Write a masked language model, as it is, with its template and words in `config.json`."""
    language_model.config.architectures = [ARCHITECTURE]
    setattr(language_model.config, PROMPT, asdict(verbalizers))
    language_model.save_pretrained(folder)
    # save_pretrained writes the model's own class
    language_model.config.architectures = [ARCHITECTURE]
    language_model.config.save_pretrained(str(Path(folder)))
