"""Which weights learn: all, those above a layer, one layer more each epoch, or adapters beside them; and how fast each.

Depth: how far below the head a parameter lies: 0 head and pooler, 1 the top layer, ..., N the lowest one, N + 1 the embeddings.
"""

import os
import re
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lib.errors import UsageError
from lib.train_config import LoraSection, OptimSection, TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYER_NUMBER = re.compile(r"(?:layers?|layer_groups)\.([0-9]+)\.")
"""In a parameter's name inside the encoder, in all families."""

ADAPTER = ".lora_"
"""In the name of every weight of an adapter."""

LORA_TARGETS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "albert"), ("query", "value")),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "modernbert": ("Wqkv",),
    "mpnet": ("q", "v"),
}
"""Queries and values of attention, as the paper has it (Hu et al. 2021, arXiv 2106.09685, section 4.2). peft 0.21 knows five of these."""


def depth_of(name: str, model: "PreTrainedModel") -> int:
    """The depth of a parameter."""
    inner = name.removeprefix(f"{model.base_model_prefix}.")
    if inner == name or inner.startswith("pooler."):
        return 0
    found = LAYER_NUMBER.search(inner)
    if found:
        return num_layers(model) - int(found[1])
    return num_layers(model) + 1 if "embed" in inner else 1


def layers_of(model: "PreTrainedModel") -> nn.ModuleList:
    """The layers of the encoder that have weights of their own, the lowest first: ALBERT's are one."""
    return max((one for one in model.base_model.modules() if isinstance(one, nn.ModuleList)), key=len)


def num_layers(model: "PreTrainedModel") -> int:
    """How many layers have weights of their own."""
    return len(layers_of(model))


def peak_rate(depth: int, optim: OptimSection) -> float:
    """The learning rate of a depth at the end of the warm-up (Sun et al. 2019, arXiv 1905.05583, section 5.3.4)."""
    if depth == 0:
        return optim.head_learning_rate or optim.learning_rate
    return float(optim.learning_rate * optim.layer_decay ** (depth - 1))


def check_tuning(config: TrainConfig) -> None:
    """Raise `UsageError` for settings that do not go together."""
    frozen, unfreezing, rank = config.model.freeze_layers, config.optim.unfreeze_layers, config.lora.rank
    if rank is not None and config.stopping.average > 1:
        raise UsageError(
            "stopping.average and lora.rank: the mean of two adapters' factors is not the mean of what they add to the weights; leave"
            " one of the two out"
        )
    has_dropout = config.model.dropout != 0 or config.lora.dropout or (config.head.is_own and config.head.dropout)
    if config.optim.rdrop and not has_dropout:
        raise UsageError(
            "optim.rdrop with model.dropout = 0: both passes of a row are the same, and there is nothing to pull together; leave one of"
            " the two out"
        )
    if rank is None:
        given = [name for name in ("alpha", "dropout", "target_modules") if getattr(config.lora, name)]
        if given:
            raise UsageError(f"lora.{given[0]} is set, but there are no adapters; set lora.rank, 8 for example")
    elif frozen is not None or unfreezing is not None:
        name = "model.freeze_layers" if frozen is not None else "optim.unfreeze_layers"
        raise UsageError(
            f"{name} and lora.rank: with adapters the whole encoder stays as it is in any case; leave one of the two out"
        )
    if config.resources.strategy == "fsdp" and unfreezing is not None:
        raise UsageError(
            'optim.unfreeze_layers with resources.strategy = "fsdp": which weights learn is fixed when they are divided; use ddp'
        )
    if config.resources.strategy == "fsdp" and config.model.compile:
        raise UsageError(
            'model.compile with resources.strategy = "fsdp": the two were never shown to give the same result together; leave one out'
        )
    if frozen == "all" and unfreezing is not None:
        raise UsageError(
            'optim.unfreeze_layers with model.freeze_layers = "all": there is no layer to unfreeze; leave one of the two out'
        )
    if frozen == "all" and config.optim.layer_decay != OptimSection().layer_decay:
        raise UsageError(
            'optim.layer_decay with model.freeze_layers = "all": no layer learns whose rate it could lower; leave one of the two out'
        )


def freeze(model: "PreTrainedModel", config: TrainConfig) -> None:
    """Set which parameters learn when training begins. Raises `UsageError` if there are fewer layers than are to be frozen."""
    frozen = config.model.freeze_layers
    if frozen is None:
        return
    layers = num_layers(model)
    if frozen != "all" and frozen > layers:
        raise UsageError(
            f'model.freeze_layers = {frozen}, but {layers} layers of model.base are read; give at most that, or "all"'
        )
    if frozen == layers and config.optim.layer_decay != OptimSection().layer_decay:
        raise UsageError(
            f"optim.layer_decay with model.freeze_layers = {frozen}, all that there are: no layer learns whose rate it could lower;"
            " leave one of the two out"
        )
    deepest = 0 if frozen == "all" else layers - frozen
    for name, one in model.named_parameters():
        one.requires_grad_(depth_of(name, model) <= deepest)


def recompute_layers(model: "PreTrainedModel") -> None:
    """Keep no layer's activations for the backward pass (Chen et al. 2016, arXiv 1604.06174). Raises `UsageError` if it cannot."""
    encoder: Any = model.base_model
    if not encoder.supports_gradient_checkpointing:
        raise UsageError(
            f"model.gradient_checkpointing: transformers has none for {model.config.model_type} encoders; raise"
            " optim.accumulation_steps in its place, which saves memory, too"
        )
    encoder.gradient_checkpointing_enable({"use_reentrant": False})


def compile_passes(model: "PreTrainedModel") -> None:
    """Let torch.compile make kernels for the passes of a model, for rows of any length. Raises `UsageError` without a compiler."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UsageError(
            f"model.compile: there is no C++ compiler {compiler!r} on this node, which torch.compile needs; install one on every"
            " node that trains, or leave model.compile out"
        )
    model.compile(dynamic=True)


def learning_at(model: "PreTrainedModel", learning: Sequence[str], epoch: int, unfreeze_layers: int | None) -> None:
    """Set which of the parameters `learning` learn in an epoch (0 is the first): those down to a depth that grows with it."""
    if unfreeze_layers is not None:
        parameters = dict(model.named_parameters())
        for name in learning:
            parameters[name].requires_grad_(depth_of(name, model) <= epoch * unfreeze_layers)


def add_adapters(model: "PreTrainedModel", lora: LoraSection) -> None:
    """Put low-rank adapters beside linear layers of the encoder, in place: they and the head learn, nothing else does.

    Raises `UsageError` if peft is not installed, or no layer has such a name.
    """
    if lora.rank is None:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(
            f"lora.rank needs peft, which cannot be imported ({error}); pip install peft, on every node"
        ) from None
    family = model.config.model_type
    targets = lora.target_modules or LORA_TARGETS.get(family, ())
    linear = [name for name, one in model.base_model.named_modules() if isinstance(one, nn.Linear)]
    endings = sorted({name.rpartition(".")[2] for name in linear})
    unknown = [name for name in targets if name not in endings]
    if unknown or not targets:
        what = f"{', '.join(unknown)} names no linear layer of" if unknown else "it has to be given for"
        raise UsageError(f"lora.target_modules: {what} a {family} encoder; choose from {', '.join(endings)}")
    chosen = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        lora_dropout=lora.dropout,
        target_modules=[f"{model.base_model_prefix}.{name}" for name in linear if name.rpartition(".")[2] in targets],
    )
    inject_adapter_in_model(chosen, model)
    for name, one in model.named_parameters():
        one.requires_grad_(ADAPTER in name or depth_of(name, model) == 0)


def merge_adapters(model: nn.Module) -> None:
    """Add what adapters have learned to the weights beside them and take them out, in place: the same answers, and a plain model."""
    for name, one in list(model.named_modules()):
        if any(ADAPTER in f".{child}" for child, _ in one.named_children()):
            layer: Any = one
            layer.merge(safe_merge=True)
            model.set_submodule(name, layer.get_base_layer())
