"""A forward pass without padding: the tokens of all rows one after the other, each attending to its own row alone.

For families built like BERT, whose classifiers read the first token of a row. A layer's weights are laid out for few passes over
memory, of which such a model has too many: one product gives queries, keys and values, and on a GPU the activation is part of
its product, and the sum of a layer's input and output is made with its norm. On a GPU attention is PyTorch's variable-length
flash attention (`torch.nn.attention.varlen`); elsewhere, where only tests come, plain attention row by row.
Letters: T tokens of all rows together, B rows, A heads, D size of a head, H hidden size, I inner size, C classes.
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from lib.facts import OFFSET_POSITIONS
from lib.model import FirstTokenAttention

AddAndNorm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]

GELUS = {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"}
"""Activations that a GPU's product can compute with it, by the formula with tanh: 5e-4 from the one with erf at most."""


class PackedClassifier(nn.Module):
    """A classifier whose last layer `lib.model.leave_out_the_unread` has changed, for rows without padding."""

    classifier: Any

    def __init__(self, model: nn.Module) -> None:
        """Copy the model. Raises `ValueError` if it is not of a family that can be packed."""
        super().__init__()
        model = copy.deepcopy(model)
        base: Any = model.base_model
        config: Any = model.config
        layers = list(getattr(getattr(base, "encoder", None), "layer", []))
        if not layers or not isinstance(getattr(layers[-1], "attention", None), FirstTokenAttention):
            raise ValueError(f"rows of {config.model_type} models are not packed")
        self.embeddings = base.embeddings
        self.widen = getattr(base, "embeddings_project", nn.Identity())  # ELECTRA's small ones
        self.layers = nn.ModuleList(PackedLayer(layer, config.hidden_act in GELUS) for layer in layers)
        self.pooler = getattr(base, "pooler", None)
        self.classifier = model.classifier
        self.first_position = config.pad_token_id + 1 if config.model_type in OFFSET_POSITIONS else 0
        """of each row"""

    def forward(
        self, ids: torch.Tensor, type_ids: torch.Tensor | None, offsets: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """Ids and, if there are any, segments (T), where rows begin and the last one ends (B + 1), and the longest row's tokens, to logits (B, C)."""
        states = self.widen(self.embed(ids, type_ids, offsets))
        for layer in self.layers:
            states = layer(states, offsets, longest)
        first = states[:, None]  # of (B, 1, H), since the last layer gives the first tokens alone
        logits: torch.Tensor = self.classifier(first if self.pooler is None else self.pooler(first))
        return logits

    def compile_norms(self) -> None:
        """Make one kernel of each layer's sums and norms, for any number of tokens.

        Raises `RuntimeError` where PyTorch cannot compile, mostly for want of a C compiler; the model computes as before.
        """
        norm: AddAndNorm = torch.compile(add_and_norm, dynamic=True)
        last: Any = self.layers[-1].outer_norm
        with torch.inference_mode():
            # Two tensors, made here: what is compiled for one that is given twice, or for one of training, is of no use in a pass.
            found, states = (last.weight.new_ones(128, len(last.weight)) for _ in range(2))
            norm(found, states, last.weight, last.bias, last.eps)
        for layer in self.layers:
            layer.norm = norm  # type: ignore[assignment]

    def embed(self, ids: torch.Tensor, type_ids: torch.Tensor | None, offsets: torch.Tensor) -> torch.Tensor:
        """(T, E): a token's vector, its segment's and its position's, in the order in which transformers adds them."""
        parts: Any = self.embeddings
        segments = parts.token_type_embeddings
        begins = offsets[:-1].repeat_interleave(offsets.diff(), output_size=len(ids))
        positions = torch.arange(self.first_position, self.first_position + len(ids), device=ids.device) - begins
        words = parts.word_embeddings(ids) + (segments.weight[0] if type_ids is None else segments(type_ids))
        found: torch.Tensor = parts.LayerNorm(words + parts.position_embeddings(positions))
        return found


class PackedLayer(nn.Module):
    """A layer of BERT."""

    def __init__(self, layer: Any, joins_activation: bool) -> None:
        super().__init__()
        self.joins_activation = joins_activation
        self.norm: AddAndNorm = add_and_norm
        self.is_last = isinstance(layer.attention, FirstTokenAttention)
        attention = layer.attention.whole if self.is_last else layer.attention
        inner = attention.self
        self.heads, self.scaling = inner.num_attention_heads, inner.scaling
        self.query = inner.query if self.is_last else None
        self.joined = join(*(() if self.is_last else (inner.query,)), inner.key, inner.value)
        self.attended, self.attended_norm = attention.output.dense, attention.output.LayerNorm
        self.inner, self.activation = layer.intermediate.dense, layer.intermediate.intermediate_act_fn
        self.outer, self.outer_norm = layer.output.dense, layer.output.LayerNorm

    def forward(self, states: torch.Tensor, offsets: torch.Tensor, longest: int) -> torch.Tensor:
        """Hidden states (T, H) to hidden states (T, H); the last layer's are those of the first tokens (B, H)."""
        parts = [one.unflatten(-1, (self.heads, -1)) for one in self.joined(states).split(states.shape[-1], -1)]
        query_offsets, longest_query = offsets, longest
        if self.query is not None:
            states = states[offsets[:-1].long()]
            parts = [self.query(states).unflatten(-1, (self.heads, -1)), *parts]
            query_offsets, longest_query = torch.arange(len(offsets), device=offsets.device, dtype=offsets.dtype), 1
        query, key, value = parts
        mixed = attend(query, key, value, (query_offsets, offsets), (longest_query, longest), self.scaling)
        states = self._add_and_norm(self.attended(mixed.flatten(-2)), states, self.attended_norm)
        return self._add_and_norm(self.outer(self._expand(states)), states, self.outer_norm)

    def _expand(self, states: torch.Tensor) -> torch.Tensor:
        """(T, H) to (T, I)."""
        if self.joins_activation and states.is_cuda:
            return torch._addmm_activation(self.inner.bias, states, self.inner.weight.t(), use_gelu=True)
        found: torch.Tensor = self.activation(self.inner(states))
        return found

    def _add_and_norm(self, found: torch.Tensor, states: torch.Tensor, norm: Any) -> torch.Tensor:
        return self.norm(found, states, norm.weight, norm.bias, norm.eps)


def join(*layers: nn.Linear) -> nn.Linear:
    """One linear layer whose output is theirs, one behind the other."""
    first = layers[0]
    found = nn.Linear(first.in_features, sum(one.out_features for one in layers))
    with torch.no_grad():
        found.weight.copy_(torch.cat([one.weight for one in layers]))
        found.bias.copy_(torch.cat([one.bias for one in layers]))
    return found


def add_and_norm(
    found: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """The norm of a layer's output and its input (T, H)."""
    return nn.functional.layer_norm(found + states, states.shape[-1:], weight, bias, eps)


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
