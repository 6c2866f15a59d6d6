"""Weights: those that several workers hold in parts (FSDP2), put together where all of them are wanted, and means of several.

What `whole` is called for is put together by all workers: each of them has to call it, in the same order.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lib.tuning import layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = dict[str, torch.Tensor]
"""A model's parameters and buffers by name, in host memory."""


def shard(model: "PreTrainedModel") -> None:
    """Divide a model's weights among all workers, in place, layer by layer: a layer is whole only while it computes."""
    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(model)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the parts of all workers; one that is not divided as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Any, keep: bool) -> Any:
    """A nested state, its tensors whole and in host memory; without `keep` they are put together for others, and dropped."""
    if isinstance(state, torch.Tensor):
        found = whole(state.detach())
        return found.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: whole_state(value, keep) for key, value in state.items()}
    return [whole_state(value, keep) for value in state] if isinstance(state, list) else state


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This worker's part of a whole tensor, divided as another one of the same shape is; whole if that is not divided."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements, src_data_rank=None)


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Fill a model, divided or not, with whole weights that this worker has."""
    for name, one in model.state_dict().items():
        one.copy_(part_of(weights[name], one))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Fill an optimizer of weights that are divided or not with a whole state that this worker has."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    moments = {
        number: {
            name: part_of(value, parameters[number]) if value.shape == parameters[number].shape else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def broadcast_weights(model: nn.Module, weights: Mapping[str, torch.Tensor] | None) -> None:
    """Fill the model of every worker, divided or not, with the whole weights that rank 0 has."""
    for name, one in model.state_dict().items():
        found = torch.empty(one.shape, dtype=one.dtype, device=one.device)
        if weights is not None:
            found.copy_(weights[name])
        dist.broadcast(found, src=0)
        one.copy_(part_of(found, one))


def mean_of(several: Sequence[Weights]) -> Weights:
    """The mean of several models' weights; whole numbers, such as positions, are the first one's."""
    first = several[0]
    if len(several) == 1:
        return first
    return {
        name: torch.stack([one[name] for one in several]).double().mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in first.items()
    }


def copy_weights(model: torch.nn.Module) -> Weights:
    """A model's weights as they are now, whole and in host memory."""
    return {name: whole(one.detach()).cpu().clone() for name, one in model.state_dict().items()}
