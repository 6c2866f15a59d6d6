"""Classifiers: loading one, and making a new head on a pretrained encoder."""

from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lib.config import TRUST_NOTHING, TokenPooling, TrainPrecisionChoice, Trust
from lib.errors import UsageError
from lib.facts import PROMPT, check_readable, has_safetensors, import_transformers, read_config
from lib.heads import SPECIFICATION, PooledClassifier, VectorBeside, load_pooled, new_head, read_to
from lib.prompts import PromptClassifier
from lib.schema import Task
from lib.train_config import HeadSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILYS_OWN = HeadSection()

FIRST_TOKEN_FAMILIES = {"bert", "roberta", "xlm-roberta", "camembert", "electra"}
"""Families built like BERT whose classifiers read nothing of the last layer but the first token."""

TOLD = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Weights that are missing or have another shape are told to the caller, who says so; else transformers raises `RuntimeError`."""

DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "classifier_dropout_prob"),
    *("dropout", "attention_dropout", "seq_classif_dropout", "embedding_dropout", "mlp_dropout", "pooler_dropout"),
)
"""What the families call their dropout probabilities."""


def pretrained(folder: str, trust: Trust, kind: str = "AutoModelForSequenceClassification", **options: Any) -> Any:
    """Load a model in fp32, from this folder alone, running and unpickling only what is trusted.

    Raises `UsageError` if weights cannot be read or files of them are not there, or if pickled weights hold anything but tensors:
    those are never loaded, trusted or not.
    """
    check_readable(folder, folder)
    try:
        return getattr(import_transformers(), kind).from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=has_safetensors(folder) or not trust.pickle,
            weights_only=True,
            local_files_only=True,
            trust_remote_code=trust.code,
            **options,
        )
    except UnpicklingError:
        raise UsageError(
            f"{folder}: its pickled weights hold more than tensors, and were not loaded; get weights in the safetensors format"
        ) from None
    except OSError as error:
        if error.errno is not None:  # the system's own
            raise
        raise UsageError(f"{folder}: its weights are not all there: {error}; get the whole folder again") from None


def load_classifier(folder: str, trust: Trust = TRUST_NOTHING) -> nn.Module:
    """Load a classifier in fp32 and eval mode. Raises `UsageError` if any of its weights is missing or has another shape."""
    config = read_config(folder, trust)
    if hasattr(config, SPECIFICATION):
        encoder = import_transformers().AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=trust.code)
        return load_pooled(folder, encoder).eval()
    kind = "AutoModelForMaskedLM" if hasattr(config, PROMPT) else "AutoModelForSequenceClassification"
    model, info = pretrained(folder, trust, kind, **TOLD)
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise UsageError(
            f"{folder}: {len(missing)} weights are missing or have another shape ({', '.join(missing[:3])}): it was not trained as a"
            " classifier, or its config.json is another model's"
        )
    loaded: nn.Module = (PromptClassifier(model) if hasattr(config, PROMPT) else model).eval()
    return loaded


def load_with_vector(folder: str, trust: Trust, pooling: TokenPooling | None) -> nn.Module:
    """Load a classifier, or a plain encoder, that gives each text's vector behind its logits, in fp32 and eval mode."""
    if any(name.endswith("ForSequenceClassification") for name in read_config(folder, trust).architectures or []):
        return VectorBeside(load_classifier(folder, trust), pooling).eval()
    encoder, info = pretrained(folder, trust, "AutoModel", **TOLD)
    missing = sorted(name for name in map(str, info["missing_keys"]) if not name.startswith("pooler."))
    if missing or info["mismatched_keys"]:
        raise UsageError(
            f"{folder}: weights of its encoder are missing ({', '.join(missing[:3])}); expected a whole encoder"
        )
    return VectorBeside(encoder, pooling).eval()


def new_classifier(
    base: str,
    labels: tuple[str, ...],
    task: Task,
    dropout: float | None,
    seed: int,
    trust: Trust = TRUST_NOTHING,
    head: HeadSection = FAMILYS_OWN,
) -> "PreTrainedModel":
    """Put a fresh head for `labels` on a pretrained encoder, in fp32, the same for the same seed.

    Raises `UsageError` if the encoder has not what the head is to read.
    """
    problem = {
        Task.MULTI_CLASS: "single_label_classification",
        Task.MULTI_LABEL: "multi_label_classification",
        Task.REGRESSION: "regression",
    }.get(task)
    changes: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": problem,
    }
    config = read_config(base, trust)
    for name in DROPOUTS:
        if dropout is not None and hasattr(config, name):
            changes[name] = dropout
    torch.manual_seed(seed)
    if head.is_own:
        for name, value in changes.items():
            setattr(config, name, value)
        read_to(config, head)
        pooled: Any = PooledClassifier(pretrained(base, trust, "AutoModel", config=config), head)
        new_head(pooled)
        own: PreTrainedModel = pooled  # in all that is asked of it
        return own
    model: PreTrainedModel = pretrained(base, trust, ignore_mismatched_sizes=True, **changes)
    return model


def choose_dtype(precision: TrainPrecisionChoice, device: torch.device) -> torch.dtype:
    """Resolve a configured precision: auto is bf16 where the device computes in it, else fp32."""
    if precision == "fp32":
        return torch.float32
    if precision in ("bf16", "fp16"):
        return torch.bfloat16 if precision == "bf16" else torch.float16
    has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def logits_of(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, type_ids: torch.Tensor | None) -> torch.Tensor:
    """One forward pass: ids, mask and segment ids (B, L) to logits (B, C)."""
    segments = {} if type_ids is None else {"token_type_ids": type_ids}
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, **segments).logits
    return logits


def mean_state(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, type_ids: torch.Tensor | None) -> torch.Tensor:
    """One pass of a classifier's encoder: ids, mask and segment ids (B, L) to the mean of the tokens' last hidden states (B, H)."""
    segments = {} if type_ids is None else {"token_type_ids": type_ids}
    encoder: Any = model.base_model
    states = encoder(input_ids=ids, attention_mask=mask, **segments).last_hidden_state
    found: torch.Tensor = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    return found


def pool_windows(logits: torch.Tensor, counts: torch.Tensor, pooling: Literal["mean", "max"]) -> torch.Tensor:
    """Logits of windows (W, C), those of each row together, and the rows' numbers of windows (N,) to the rows' logits (N, C)."""
    pooled: torch.Tensor = torch.segment_reduce(logits, pooling, lengths=counts, axis=0)
    return pooled


class FirstTokenAttention(nn.Module):
    """The attention of BERT's last layer for the first token alone: what comes after it has a length of 1."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None = None, **_unused: Any
    ) -> tuple[torch.Tensor, None]:
        """Hidden states (B, L, H) to those of the first token (B, 1, H)."""
        inner: Any = self.whole.self
        first = hidden[:, :1]

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (inner.num_attention_heads, inner.attention_head_size)).transpose(1, 2)

        found = nn.functional.scaled_dot_product_attention(
            heads(inner.query(first)),
            heads(inner.key(hidden)),
            heads(inner.value(hidden)),
            attn_mask=None if mask is None else mask[:, :, :1],
        )
        output: Any = self.whole.output
        return output(found.transpose(1, 2).flatten(-2), first), None


def leave_out_the_unread(model: nn.Module) -> None:
    """Change a classifier in place, so that its last layer computes only what the head reads, where that is known. Same scores.

    MiniLM-L6 gets 1.15 times as fast: of its last layer only keys and values are needed for every token.
    """
    config: Any = model.config
    known = config.model_type in FIRST_TOKEN_FAMILIES and type(model).__module__.startswith("transformers.models.")
    if known and not config.is_decoder and config._attn_implementation == "sdpa":
        last = model.base_model.encoder.layer[-1]  # type: ignore[union-attr, index]
        last.attention = FirstTokenAttention(last.attention)  # type: ignore[union-attr]
