"""Ways to make rows without padding faster on a GPU, to be timed beside the engine as it is, each with its own accuracy.

None is part of the engine. `python -m tests.benchmarks.ladder --no-jobs` times all of them on a GPU. Without one the tests compute
the same numbers by the same code, but for the kernels and the graphs themselves.
Letters: T tokens of a pack, B rows, K and N sizes of a matrix product.
"""

from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.functional import ScalingType, scaled_mm

from lib.batching import IntArray
from lib.engine import Numbers, PackedEngine, PackedRows

LONGEST = (64, 128, 256, 512, 8192)
"""A recorded pack is computed as if its longest row had the next larger number of tokens, so that few are recorded."""

SHORTEST = 3
"""Tokens of the shortest text that has any: its first token, one more, its last."""

FP8 = torch.float8_e4m3fn


class Float8Linear(nn.Module):
    """A linear layer in FP8: a scale for each row of the inputs, found as they come, and one for each row of the weights."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantized(linear.weight.detach().float())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t())
        self.bias = linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., K) to (..., N)."""
        values, scale = (quantized_compiled if states.is_cuda else quantized)(states.flatten(0, -2))
        found: torch.Tensor = scaled_mm(
            values,
            self.weight.t(),
            scale,
            ScalingType.RowWise,
            self.scale,
            ScalingType.RowWise,
            output_dtype=states.dtype,
        )
        found = found if self.bias is None else found + self.bias
        return found.unflatten(0, states.shape[:-1])

    def _apply(self, fn: Any, recurse: bool = True) -> "Float8Linear":
        """Move, but leave the types of weights and scales alone."""
        weight, scale = self.weight, self.scale
        super()._apply(fn, recurse)
        device = self.weight.device
        self.weight, self.scale = weight.to(device), scale.to(device)
        return self


def quantized(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (R, K) in FP8, and the scales (R, 1) that make it what it was."""
    scale = values.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(FP8).max
    return (values / scale).to(FP8), scale


quantized_compiled = torch.compile(quantized, dynamic=True)


def to_float8(layers: nn.Module) -> None:
    """Change packed layers in place to compute their matrix products in FP8; embeddings and the head stay as they are."""
    for module in list(layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Float8Linear(child))
    for layer in layers.children():
        layer.joins_activation = False  # type: ignore[assignment]


class Graphs(PackedEngine):
    """A CUDA graph for each length of the longest row, of packs of one size: the same numbers of tokens and of rows, whatever is in them.

    What is behind the last real token fills rows behind the last real one; those behind them are empty and begin at the last token.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, token_budget: int) -> None:
        super().__init__(model, device, dtype)
        self.tokens, self.rows = token_budget + 8, token_budget // SHORTEST + 1
        self.recorded: dict[int, tuple[Any, list[torch.Tensor], torch.Tensor]] = {}

    def stage(self, ids: Numbers, lengths: IntArray, type_ids: Numbers | None) -> tuple[PackedRows, int]:  # type: ignore[override]
        """Bring rows to the GPU, filled up to the size of all packs, and say how many are real."""
        total = int(lengths.sum())
        longest = next(one for one in LONGEST if one >= lengths.max())
        behind = np.minimum(total + longest * np.arange(self.rows - len(lengths)), self.tokens - 1)
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1], behind, [self.tokens]])
        segments = np.zeros_like(ids) if type_ids is None else type_ids
        ids, segments = (np.concatenate([one, np.zeros(self.tokens - total, one.dtype)]) for one in (ids, segments))
        return (self._bring(ids), self._bring(segments), self._bring(offsets), longest), len(lengths)

    def forward(self, staged: tuple[PackedRows, int]) -> torch.Tensor:  # type: ignore[override]
        """Begin to compute what was brought: on a GPU by replaying what was recorded."""
        pack, rows = staged
        if self.device.type != "cuda":
            return super().forward(pack)[:rows]
        longest = pack[3]
        with torch.inference_mode():
            if longest not in self.recorded:
                self.recorded[longest] = self._record(pack)
            graph, inputs, found = self.recorded[longest]
            for place, one in zip(inputs, pack[:3], strict=True):
                place.copy_(cast(torch.Tensor, one))
            graph.replay()
            return found[:rows].clone()

    def _record(self, pack: PackedRows) -> tuple[Any, list[torch.Tensor], torch.Tensor]:
        """Record one forward pass, after three that compile and allocate (PyTorch's notes on CUDA graphs)."""
        longest = pack[3]
        inputs = [cast(torch.Tensor, one).clone() for one in pack[:3]]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.model(*inputs, longest)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.model(*inputs, longest)
        return graph, inputs, logits


class PlainNorms(PackedEngine):
    """Without a compiler: the sum of a layer's input and output, and its norm, in two kernels."""

    def _compile(self) -> None:
        pass


class CompiledLayers(PackedEngine):
    """Whole layers compiled, their activation behind its product."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(model, device, dtype)
        for layer in self.model.layers:
            layer.joins_activation = False  # type: ignore[assignment]
            layer.compile(dynamic=True, backend="inductor" if device.type == "cuda" else "eager")


class Float8(PackedEngine):
    """Matrix products of the layers in FP8."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(model, device, dtype)
        to_float8(self.model.layers)


def variants(model: nn.Module, device: torch.device, dtype: torch.dtype, token_budget: int) -> dict[str, PackedEngine]:
    """Engines by name, for a model whose last layer `lib.model.leave_out_the_unread` has changed."""
    return {
        "plain norms": PlainNorms(model, device, dtype),
        "compiled layers": CompiledLayers(model, device, dtype),
        "graphs": Graphs(model, device, dtype, token_budget),
        "fp8": Float8(model, device, dtype),
    }
