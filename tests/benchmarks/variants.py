"""Ways to make rows without padding faster on a GPU, to be timed beside the engine as it is, each with its own accuracy.

None is part of the engine: no GPU has said yet which of them win. `python -m tests.benchmarks.ladder --no-jobs` times all of
them on one. Without a GPU the tests compute the same numbers by the same code, but for the kernels and the graphs themselves.
Letters: T tokens of a pack, B rows, K and N sizes of a matrix product.
"""

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import ScalingType, scaled_mm

from lib.batching import IntArray
from lib.engine import BoolArray, PackedEngine, to_device

SHORTEST = 3
"""Tokens of the shortest text that has any: its first token, one more, its last."""

LONGEST = (64, 128, 256, 512, 8192)
"""A pack is computed as if its longest row had the next larger number of tokens, so that few shapes are met."""

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
        values, scale = quantized(states.flatten(0, -2))
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


def to_float8(model: nn.Module) -> nn.Module:
    """A copy whose encoder computes its matrix products in FP8; embeddings and the head stay as they are."""
    changed = copy.deepcopy(model)
    encoder: Any = changed.base_model.encoder  # type: ignore[union-attr]
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Float8Linear(child))
    return changed


class ConstantPacks(PackedEngine):
    """Packs of one size: the same number of tokens and of rows, whatever is in them, and few numbers for the longest row.

    What is behind the last real token fills rows behind the last real one; those behind them are empty and begin at the last token.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        token_budget: int,
        compiled: bool = False,
        graphs: bool = False,
    ) -> None:
        super().__init__(model, device, dtype)
        self.token_budget = token_budget
        self.tokens, self.rows = token_budget + 8, token_budget // SHORTEST + 1
        self.graphs: dict[int, tuple[Any, list[torch.Tensor], torch.Tensor]] | None = {} if graphs else None
        self.run: Any = self.model
        if compiled:
            self.run = torch.compile(
                self.model, dynamic=False, backend="inductor" if device.type == "cuda" else "eager"
            )

    def stage(self, ids: IntArray, mask: BoolArray, type_ids: IntArray | None) -> tuple[list[torch.Tensor], int, int]:  # type: ignore[override]
        """Bring a pack to the GPU: ids, segments and positions (T), offsets (B + 1), the longest row, and the real rows."""
        lengths = mask.sum(axis=1)
        total = int(lengths.sum())
        longest = next(one for one in LONGEST if one >= lengths.max())
        behind = np.minimum(total + longest * np.arange(self.rows - len(lengths)), self.tokens - 1)
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1], behind, [self.tokens]]).astype(np.int32)
        segments = np.zeros(total, np.int64) if type_ids is None else type_ids[mask]
        positions = np.nonzero(mask)[1] + self.model.first_position
        filled = [(ids[mask], 0), (segments, 0), (positions, int(positions[0]))]
        tensors = [to_device(self._filled(*one), self.device) for one in filled]
        return [*tensors, to_device(offsets, self.device)], longest, len(lengths)

    def _filled(self, values: npt.NDArray[np.int64], fill: int) -> npt.NDArray[np.int64]:
        return np.concatenate([values, np.full(self.tokens - len(values), fill, np.int64)])

    def forward(self, staged: tuple[list[torch.Tensor], int, int]) -> torch.Tensor:  # type: ignore[override]
        """Begin to compute what was brought."""
        tensors, longest, rows = staged
        with torch.inference_mode():
            if self.graphs is None:
                logits: torch.Tensor = self.run(*tensors, longest)
                return logits[:rows]
            if longest not in self.graphs:
                self.graphs[longest] = self._record(tensors, longest)
            graph, inputs, found = self.graphs[longest]
            for place, one in zip(inputs, tensors, strict=True):
                place.copy_(one)
            graph.replay()
            return found[:rows].clone()

    def _record(self, tensors: list[torch.Tensor], longest: int) -> tuple[Any, list[torch.Tensor], torch.Tensor]:
        """Record one forward pass, after three that compile and allocate (PyTorch's notes on CUDA graphs)."""
        inputs = [one.clone() for one in tensors]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run(*inputs, longest)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.run(*inputs, longest)
        return graph, inputs, logits


def variants(model: nn.Module, device: torch.device, dtype: torch.dtype, token_budget: int) -> dict[str, ConstantPacks]:
    """Engines by name, for a model whose last layer `lib.model.leave_out_the_unread` has changed; graphs on GPUs alone."""
    is_gpu = device.type == "cuda"
    found = {
        "constant packs": ConstantPacks(model, device, dtype, token_budget),
        "compiled": ConstantPacks(model, device, dtype, token_budget, compiled=True),
        "fp8": ConstantPacks(to_float8(model), device, dtype, token_budget),
        "fp8, compiled": ConstantPacks(to_float8(model), device, dtype, token_budget, compiled=True),
    }
    if is_gpu:
        found["graphs"] = ConstantPacks(model, device, dtype, token_budget, graphs=True)
        found["compiled, graphs"] = ConstantPacks(model, device, dtype, token_budget, compiled=True, graphs=True)
    return found
