"""A classifier of our own, for what transformers' do not offer: which layer is read, how its tokens are pooled, hidden layers.

It has what the rest needs of a classifier of transformers: `config`, `base_model`, `save_pretrained`, an output with `logits`.
Letters: B rows, L padded length, H hidden size, C classes.
"""

import inspect
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from lib.config import TokenPooling
from lib.errors import UsageError
from lib.train_config import HeadSection

ARCHITECTURE = "TextsweepForSequenceClassification"
"""Its name in `config.json`."""

SPECIFICATION = "textsweep_head"
"""The key of `config.json` under which the head is described."""

WEIGHTS = "model.safetensors"

LAST_LAYERS = 4

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh}


class PooledClassifier(nn.Module):
    """An encoder, a pooling of its tokens, and a head."""

    base_model_prefix = "encoder"

    def __init__(self, encoder: Any, head: HeadSection) -> None:
        """Raises `UsageError` if the pooler is wanted of an encoder that has none."""
        super().__init__()
        self.config = encoder.config
        self.pooling, self.layer, self.normalize = head.pooling or "first", head.layer, head.normalize
        if self.pooling != "pooler":
            if getattr(encoder, "pooler", None) is not None:
                encoder.pooler = None  # workers would wait for the gradients of what takes no part
        elif getattr(encoder, "pooler", None) is None:
            raise UsageError(
                f'head.pooling = "pooler": {self.config.model_type} encoders have none; choose first, mean or max'
            )
        elif head.layer == "last_4":
            raise UsageError(
                'head.pooling = "pooler" reads the last layer, head.layer = "last_4" four; leave one of the two out'
            )
        self.encoder = encoder
        self.takes_segments = "token_type_ids" in inspect.signature(encoder.forward).parameters
        sizes = [self.config.hidden_size, *head.hidden_sizes, self.config.num_labels]
        parts: list[nn.Module] = []
        for before, after in pairwise(sizes):
            parts += [nn.Dropout(head.dropout), nn.Linear(before, after), ACTIVATIONS[head.activation]()]
        self.head = nn.Sequential(*parts[:-1])
        self.config.architectures = [ARCHITECTURE]
        setattr(self.config, SPECIFICATION, head.model_dump(mode="json"))

    @property
    def base_model(self) -> nn.Module:
        """The encoder."""
        found: nn.Module = self.encoder
        return found

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Ids, mask and segments (B, L) to logits (B, C)."""
        return SequenceClassifierOutput(logits=self.head(self.embed(input_ids, attention_mask, token_type_ids)))

    def embed(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Ids, mask and segments (B, L) to what the head is given (B, H)."""
        pooled = self.read(input_ids, attention_mask, token_type_ids)
        return nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled

    def read(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Ids, mask and segments (B, L) to the pooled texts (B, H)."""
        segments = {"token_type_ids": token_type_ids} if self.takes_segments and token_type_ids is not None else {}
        several = self.layer == "last_4"
        found = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=several, **segments
        )
        if self.pooling == "pooler":
            pooled: torch.Tensor = found.pooler_output
            return pooled
        states = torch.stack(found.hidden_states[1:][-LAST_LAYERS:]).mean(dim=0) if several else found.last_hidden_state
        return pool(states, attention_mask, self.pooling)

    def save_pretrained(self, folder: str) -> None:
        """Write `config.json` and the weights."""
        self.config.save_pretrained(folder)
        weights = {name: one.detach().cpu().contiguous() for name, one in self.state_dict().items()}
        save_file(weights, Path(folder) / WEIGHTS, {"format": "pt"})


class VectorBeside(nn.Module):
    """A classifier, or a plain encoder, whose answer is its logits, if it has any, and behind them the text's vector."""

    def __init__(self, model: Any, pooling: TokenPooling | None) -> None:
        """Changes the model. `pooling` of its last layer; None: what its own head reads, mean without one."""
        super().__init__()
        self.config = model.config
        self.pooling = pooling or "mean"
        self.reads_head = pooling is None and isinstance(model, PooledClassifier)
        self.has_logits = model.base_model is not model
        self.model = model
        self.takes_segments = "token_type_ids" in inspect.signature(model.forward).parameters
        self.recorder = None
        if self.has_logits and not self.reads_head:
            self.recorder = Recorder(model.base_model)
            setattr(model, model.base_model_prefix, self.recorder)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Ids, mask and segments (B, L) to logits and vector side by side (B, C + H)."""
        if self.reads_head:
            pooled = self.model.embed(input_ids, attention_mask, token_type_ids)
            return SequenceClassifierOutput(logits=torch.cat([self.model.head(pooled), pooled], dim=1))
        segments = {"token_type_ids": token_type_ids} if self.takes_segments and token_type_ids is not None else {}
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **segments)
        states = found.last_hidden_state if self.recorder is None else self.recorder.states
        pooled = pool(states, attention_mask, self.pooling)
        return SequenceClassifierOutput(
            logits=torch.cat([found.logits, pooled], dim=1)
            if self.has_logits
            else pooled  # of a plain encoder the vector alone
        )


class Recorder(nn.Module):
    """An encoder in its classifier's place that remembers its last states (B, L, H): one pass gives scores and vectors."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.states: Any = None

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The encoder's own answer."""
        found = self.encoder(*arguments, **options)
        self.states = found.last_hidden_state
        return found


def check_head(head: HeadSection) -> None:
    """Raise `UsageError` for what is set and would change nothing."""
    if not head.is_own and "dropout" in head.model_fields_set:
        raise UsageError(
            "head.dropout is set, but the head is the family's own, whose dropout is model.dropout; set that, or one of head.pooling,"
            " layer, hidden_sizes and normalize"
        )
    if not head.hidden_sizes and "activation" in head.model_fields_set:
        raise UsageError(
            "head.activation is set, but the head has no hidden layer; set head.hidden_sizes, or leave it out"
        )


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Hidden states (B, L, H) of tokens that count where the mask (B, L) says so, to (B, H)."""
    if pooling == "first":
        return states[:, 0]
    counts = mask[:, :, None].bool()
    if pooling == "max":
        return states.masked_fill(~counts, torch.finfo(states.dtype).min).amax(dim=1)
    # Filled, not multiplied: what OpenVINO makes of padding can be NaN (ModernBERT).
    return states.masked_fill(~counts, 0).sum(dim=1) / counts.sum(dim=1)


def read_to(config: Any, head: HeadSection) -> None:
    """Cut a configuration down to the layers that the head reads. Raises `UsageError` if there are fewer."""
    if not isinstance(head.layer, int):
        return
    if head.layer > config.num_hidden_layers:
        raise UsageError(
            f"head.layer = {head.layer}, but model.base has {config.num_hidden_layers} layers; the last one is read without the key"
        )
    config.num_hidden_layers = head.layer
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: head.layer]


def new_head(model: PooledClassifier) -> None:
    """Draw the head's weights as the family draws its own."""
    for one in model.head.modules():
        if isinstance(one, nn.Linear):
            nn.init.normal_(one.weight, std=getattr(model.config, "initializer_range", 0.02))
            nn.init.zeros_(one.bias)


def load_pooled(folder: str, encoder: Any) -> PooledClassifier:
    """Fill a classifier, described by its encoder's configuration, with the weights in a folder. Raises `UsageError` if some do not fit."""
    model = PooledClassifier(encoder, HeadSection.model_validate(getattr(encoder.config, SPECIFICATION)))
    weights = load_file(Path(folder) / WEIGHTS)
    wanted, found = ({name: one.shape for name, one in some.items()} for some in (model.state_dict(), weights))
    unfit = sorted({name for name, _ in wanted.items() ^ found.items()})
    if unfit:
        raise UsageError(
            f"{folder}: {WEIGHTS} does not fit its config.json ({', '.join(unfit[:3])}): the checkpoint is damaged"
        )
    model.load_state_dict(weights)
    return model
