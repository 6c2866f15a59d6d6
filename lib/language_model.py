"""Masked-language models: an encoder with a head that says which token stands somewhere. All families of transformers that have one.

Letters: B rows, L padded length, M places that are asked for, H hidden size, V vocabulary.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from lib.config import Trust
from lib.errors import UsageError
from lib.facts import read_config
from lib.heads import WEIGHTS
from lib.model import DROPOUTS, TOLD, pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

POOLER = "pooler."


def check_family(folder: str, key: str, trust: Trust) -> "PreTrainedConfig":
    """The configuration of a model. Raises `UsageError` if its family has no masked-language head; `key` is what names the folder."""
    config = read_config(folder, trust)
    own = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING and "AutoModelForMaskedLM" not in own:
        raise UsageError(
            f"{key} {folder}: transformers has no masked-language head for {config.model_type} models; take an encoder like BERT's"
        )
    return config


def load_language_model(
    folder: str, key: str, trust: Trust, dropout: float | None = None, seed: int | None = None
) -> "tuple[PreTrainedModel, bool]":
    """Load a masked-language model in fp32, and whether its head is new: one that was never trained, the same for the same seed.

    A new head's decoder are the embeddings (Press and Wolf 2017, arXiv 1608.05859). Raises `UsageError` if the family has no such
    head, if weights of the encoder are missing, or if those of the head are and no seed is given. `key` is what names the folder.
    """
    config = check_family(folder, key, trust)
    for name in DROPOUTS:
        if dropout is not None and hasattr(config, name):
            setattr(config, name, dropout)
    torch.manual_seed(seed or 0)
    model, info = pretrained(folder, trust, "AutoModelForMaskedLM", config=config, **TOLD)
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    prefix = f"{model.base_model_prefix}."
    encoder = [name for name in missing if name.startswith(prefix)]
    if encoder or (missing and seed is None):
        what, advice = (
            ("weights of its encoder are missing", "expected a whole encoder")
            if encoder
            else (
                "it has no masked-language head",
                "take a base that has one, or give it one first: python -m jobs.pretrain",
            )
        )
        raise UsageError(f"{key} {folder}: {what} ({', '.join((encoder or missing)[:3])}); {advice}")
    if missing and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model, bool(missing)


@functools.cache
def check_head(folder: str, key: str, trust: Trust) -> None:
    """Raise `UsageError` unless a model has a masked-language head that was trained. Loads its weights, once in a process."""
    load_language_model(folder, key, trust)


@contextlib.contextmanager
def asked_at(model: Any, places: tuple[torch.Tensor, ...]) -> Iterator[None]:
    """Let the head of a model see the hidden states of some places (row, token) alone: logits are then (1, M, V), not (B, L, V).

    MiniLM-L6, 32 rows of 128 tokens, 15% asked for: a step takes 5.0 s of processor time in place of 9.2, its process 2.5 GB in place
    of 4.1 (fp32, one thread, 2026-11-26).
    """

    def select(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[places][None]
        return output

    hook = model.base_model.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()


def logits_at(
    wrapped: nn.Module, model: Any, ids: torch.Tensor, mask: torch.Tensor, chosen: torch.Tensor, segments: Any = None
) -> torch.Tensor:
    """Logits (M, V) of the chosen tokens, row by row, given ids, mask, choice and perhaps segment ids (B, L).

    `wrapped` is the model, or what exchanges its gradients.
    """
    others = {} if segments is None else {"token_type_ids": segments}
    with asked_at(model, chosen.nonzero(as_tuple=True)):
        found: torch.Tensor = wrapped(input_ids=ids, attention_mask=mask, **others).logits[0]
    return found


def save_language_model(model: "PreTrainedModel", base: str, trust: Trust, folder: str) -> None:
    """Write a masked-language model; with it the pooler of its base, which it has not, as it was: classifiers may read it."""
    model.save_pretrained(folder)
    encoder, info = pretrained(base, trust, "AutoModel", output_loading_info=True)
    unknown = {str(name) for name in info["missing_keys"]}
    pooler = {
        f"{model.base_model_prefix}.{name}": one
        for name, one in encoder.state_dict().items()
        if name.startswith(POOLER) and name not in unknown
    }
    path = Path(folder) / WEIGHTS
    weights = load_file(path)
    if pooler.keys() - weights.keys():
        save_file(pooler | weights, path, {"format": "pt"})
