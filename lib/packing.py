"""A forward pass without padding: the tokens of all rows one after the other, each attending to its own row alone.

For families built like BERT, whose classifiers read the first token of a row. On a GPU attention is PyTorch's variable-length
flash attention (`torch.nn.attention.varlen`); elsewhere, where only tests come, plain attention row by row.
Letters: T tokens of all rows together, B rows, A heads, D size of a head, H hidden size, C classes.
"""

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from lib.facts import OFFSET_POSITIONS
from lib.model import FirstTokenAttention

ATTENTION = "textsweep_packed"
"""The name of our attention among those of transformers."""


class PackedClassifier(nn.Module):
    """A classifier whose last layer `lib.model.leave_out_the_unread` has changed, for rows without padding."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        """Copy the model. Raises `ValueError` if it is not of a family that can be packed."""
        super().__init__()
        AttentionInterface.register(ATTENTION, attend_to_own_row)
        self.model = copy.deepcopy(model)
        last = getattr(getattr(self.model.base_model, "encoder", None), "layer", [None])[-1]
        if not isinstance(getattr(last, "attention", None), FirstTokenAttention):
            raise ValueError(f"rows of {self.model.config.model_type} models are not packed")
        last.attention = PackedFirstTokenAttention(last.attention.whole)
        self.model.set_attn_implementation(ATTENTION)
        config = self.model.config
        self.first_position = config.pad_token_id + 1 if config.model_type in OFFSET_POSITIONS else 0
        """of each row"""

    def forward(
        self, ids: torch.Tensor, type_ids: torch.Tensor, positions: torch.Tensor, offsets: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """Ids, segments and positions (T), where rows begin and the last one ends (B + 1), and the longest row's tokens, to logits (B, C)."""
        states = self.model.base_model(
            input_ids=ids[None],
            position_ids=positions[None],
            token_type_ids=type_ids[None],
            row_offsets=offsets,
            row_longest=longest,
        ).last_hidden_state
        first = states.transpose(0, 1)  # of (1, B, H), since the last layer gives the first tokens alone
        pooler = getattr(self.model.base_model, "pooler", None)
        logits: torch.Tensor = self.model.classifier(first if pooler is None else pooler(first))
        return logits


class PackedFirstTokenAttention(nn.Module):
    """The attention of the last layer for the first token of each row."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(
        self,
        hidden: torch.Tensor,
        _mask: torch.Tensor | None = None,
        *,
        row_offsets: torch.Tensor,
        row_longest: int,
        **_unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """Hidden states (1, T, H) to those of the first tokens (1, B, H)."""
        inner: Any = self.whole.self
        first = hidden[:, row_offsets[:-1].long()]

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states[0].unflatten(-1, (inner.num_attention_heads, inner.attention_head_size))

        one_each = torch.arange(len(row_offsets), device=row_offsets.device, dtype=row_offsets.dtype)
        found = attend(
            heads(inner.query(first)),
            heads(inner.key(hidden)),
            heads(inner.value(hidden)),
            (one_each, row_offsets),
            (1, row_longest),
            inner.scaling,
        )
        output: Any = self.whole.output
        return output(found.flatten(-2)[None], first), None


def attend_to_own_row(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    row_offsets: torch.Tensor,
    row_longest: int,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: query, key and value (1, A, T, D) to (1, T, A, D)."""
    query, key, value = (one[0].transpose(0, 1) for one in (query, key, value))
    return attend(query, key, value, (row_offsets, row_offsets), (row_longest, row_longest), scaling)[None], None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scaling: float | None,
) -> torch.Tensor:
    """Attention of queries (T', A, D) to the keys and values (T, A, D) of their row; `offsets` and `longest`: of queries, of keys."""
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        packed: Any = varlen_attn(query, key, value, *offsets, *longest, scale=scaling)
        return packed
    query, key, value = (one.transpose(0, 1) for one in (query, key, value))
    rows = [
        nn.functional.scaled_dot_product_attention(
            query[:, first:last], key[:, start:stop], value[:, start:stop], scale=scaling
        )
        for (first, last), (start, stop) in zip(*(pairwise(one.tolist()) for one in offsets), strict=True)
    ]
    return torch.cat(rows, dim=1).transpose(0, 1)
