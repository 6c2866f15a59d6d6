"""Classifiers: what a Hugging Face folder holds, loading it, and making a new head on a pretrained encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, logging

from lib.errors import UsageError
from lib.schema import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The classes of models are imported where a model is loaded: 5 s of processor time, which every task that only reads,
# tokenizes or writes would spend too.

logging.set_verbosity_error()
logging.disable_progress_bar()

OFFSET_POSITIONS = {
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "longformer",
    "roberta-prelayernorm",
    "data2vec-text",
    "ibert",
}
"""Families whose position numbers start behind the padding id: they take that many tokens less than they have positions."""

DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "classifier_dropout_prob"),
    *("dropout", "attention_dropout", "seq_classif_dropout", "embedding_dropout", "mlp_dropout", "pooler_dropout"),
)
"""What the families call their dropout probabilities."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a classifier's `config.json` says."""

    labels: tuple[str, ...]
    task: Task
    max_positions: int
    """the most tokens of one text, special ones included"""
    pad_token_id: int


def read_config(folder: str) -> PreTrainedConfig:
    """Read `config.json`. Raises `UsageError` if the folder holds none that transformers knows."""
    if not (Path(folder) / "config.json").is_file():
        raise UsageError(f"{folder}: no config.json in it; expected a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UsageError(f"{folder}: config.json is not one that transformers can load: {error}") from error


def read_facts(folder: str, shown: str) -> ModelFacts:
    """Say what the classifier in a folder predicts. Raises `UsageError` if it is no classifier; loads no weights.

    `shown` is the model's name in messages: the URL that the user gave.
    """
    config = read_config(folder)
    architectures = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise UsageError(
            f"model.path {shown}: holds {', '.join(architectures) or 'no architecture'}, expected one that ends in"
            " ForSequenceClassification; fine-tune it first: python -m jobs.train --set model.base=..."
        )
    if not any(Path(folder).glob("*.safetensors")):
        raise UsageError(
            f"model.path {shown}: no *.safetensors weights in it; other formats can run code when they are loaded"
        )
    names: dict[Any, str] = dict(config.id2label or {})
    labels = tuple(str(name) for _, name in sorted(names.items()))
    if config.problem_type == "multi_label_classification":
        task = Task.MULTI_LABEL
    elif config.problem_type == "regression" or len(labels) == 1:
        task = Task.REGRESSION
    else:
        task = Task.MULTI_CLASS
    return ModelFacts(
        labels=labels, task=task, max_positions=max_positions(config), pad_token_id=config.pad_token_id or 0
    )


def max_positions(config: PreTrainedConfig) -> int:
    """The most tokens that the model can take."""
    positions = int(getattr(config, "max_position_embeddings", None) or 512)
    return positions - (int(config.pad_token_id or 0) + 1) if config.model_type in OFFSET_POSITIONS else positions


def load_classifier(folder: str) -> nn.Module:
    """Load a classifier in fp32 and eval mode. Raises `UsageError` if any of its weights is missing."""
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise UsageError(
            f"{folder}: {len(missing)} weights are missing ({', '.join(missing[:3])}): it was not trained as a classifier"
        )
    loaded: nn.Module = model.eval()
    return loaded


def new_classifier(
    base: str, labels: tuple[str, ...], task: Task, dropout: float | None, seed: int
) -> "PreTrainedModel":
    """Put a fresh head for `labels` on a pretrained encoder, in fp32, the same for the same seed."""
    from transformers import AutoModelForSequenceClassification

    problem = {
        Task.MULTI_CLASS: "single_label_classification",
        Task.MULTI_LABEL: "multi_label_classification",
        Task.REGRESSION: "regression",
    }[task]
    changes: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": problem,
    }
    config = read_config(base)
    for name in DROPOUTS:
        if dropout is not None and hasattr(config, name):
            changes[name] = dropout
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        base,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        **changes,
    )
    return model


def choose_dtype(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype:
    """Resolve a configured precision: auto is bf16 where the device computes in it, else fp32."""
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def logits_of(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, type_ids: torch.Tensor | None) -> torch.Tensor:
    """One forward pass: ids, mask and segment ids (B, L) to logits (B, C)."""
    segments = {} if type_ids is None else {"token_type_ids": type_ids}
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, **segments).logits
    return logits
