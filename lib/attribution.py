"""Which words an answer comes from: integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) on the embeddings.

What is explained is the logarithm of the odds of a label's score: its logit for multi-label; for one label a row its logit
against those of all others together, since softmax does not see what all logits share; for regression the number. Not the
score itself: near 0 and 1 it stands still, whatever the words say. The words' values are what they add to it, from a text
of padding to the text as it is, and so sum to the difference of the two.

Letters: W windows of one text (1 without windows), L their padded length, H hidden size, S points on the way, C classes.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lib.batching import pad
from lib.checkpoint import Card, Checkpoint, tokenizer_of
from lib.errors import UsageError
from lib.mapped import LabelledSet
from lib.model import load_classifier, logits_of, pool_windows
from lib.schema import MULTI_LABEL_THRESHOLD, Head, Task, label_name, slices_of
from lib.tokenization import Tokenizer
from lib.windows import split
from lib.words import Located, Word, kept_ids, locate, locate_ids

FIRST_STEPS, MOST_STEPS = 16, 512
"""Points on the way from padding to the text: twice as many until the words' values sum to what they should."""

TOLERANCE = 0.02
"""By how much the sum may miss, as a part of the sum of the values without their signs."""

ROUNDING = 1e-5
"""Of fp32; where the words say nothing, no more than this is missing."""

PASS_TOKENS = 4096
"""Of one forward and backward pass."""

Margin = Callable[[torch.Tensor], torch.Tensor]
"""From embeddings (S, W, L, H) to what is explained (S,)."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Where one answer for one text comes from."""

    task: Task
    label: str
    value: float
    """log-odds of the label's score, or the number"""
    without: float
    """the same without the words: padding in their places, special tokens kept"""
    missing: float
    """value - without - the sum of the words' values; 0 but for the finite number of steps"""
    steps: int
    text: str
    words: tuple[Word, ...]
    """in order; what the model does not read is in none"""
    missed_threshold: float | None = None
    """of a label that is explained and not given, as the likeliest of all: the threshold that its score is below"""

    @property
    def converged(self) -> bool:
        """Whether the words' values sum to what they should."""
        return is_near(self.missing, self.words)


@dataclass(frozen=True, kw_only=True)
class Explainer:
    """A classifier in fp32, and what is needed to explain its answers."""

    model: nn.Module
    tokenizer: Tokenizer
    card: Card
    """of the head that is explained, as if there were no other"""
    pad_token_id: int
    device: torch.device
    place: slice
    """of that head's outputs"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One text as the model takes it."""

    located: Located
    ids: npt.NDArray[np.integer]
    """(W, L)"""
    mask: npt.NDArray[np.bool_]
    """(W, L)"""
    type_ids: npt.NDArray[np.integer] | None = None
    """(W, L), for a pair of texts"""


def check_captum(wanted_by: str) -> None:
    """Raise `UsageError` if captum is not installed."""
    try:
        import captum.attr  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{wanted_by} needs captum, which cannot be imported ({error}); pip install captum") from None


def new_explainer(
    model: nn.Module,
    tokenizer: Tokenizer,
    card: Card,
    pad_token_id: int,
    device: torch.device,
    place: slice = slice(None),
) -> Explainer:
    """Take a classifier that nothing else uses: its weights need no gradients from now on."""
    return Explainer(
        model=model.requires_grad_(False).eval().to(device),
        tokenizer=tokenizer,
        card=card,
        pad_token_id=pad_token_id,
        device=device,
        place=place,
    )


def explain_texts(
    checkpoint: Checkpoint, texts: Sequence[str | None], scores: npt.NDArray[np.floating]
) -> Iterator[list[Explanation]]:
    """Explain the answers for texts, given their scores (N, C): for multi-label each label that is given, else the likeliest.

    None for a text that has no answer, whose scores are not looked at.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_classifier(checkpoint.folder, checkpoint.trust)
    card, pad_token_id = checkpoint.card, checkpoint.facts.pad_token_id
    explainer = new_explainer(model, tokenizer_of(checkpoint), card, pad_token_id, device)
    heads = [
        (head, replace(explainer, card=card.alone(head.name) if card.several else card, place=place))
        for head, place in slices_of(card.heads)
    ]
    for text, row in zip(texts, scores, strict=True):
        if text is None or not np.isfinite(row).all():
            yield []
            continue
        encoded = row_of(explainer, text)
        found = [
            (head, explain(own, encoded, index), missed_threshold)
            for head, own in heads
            for index, missed_threshold in answered(head, row[own.place])
        ]
        yield [replace(one, label=label_name(head, one.label), missed_threshold=limit) for head, one, limit in found]


def answered(head: Head, scores: npt.NDArray[np.floating]) -> list[tuple[int, float | None]]:
    """The classes that a head's scores (C,) stand for: for multi-label each label that is given, else the likeliest.

    With the threshold of one that is not given: its score is below it.
    """
    without = MULTI_LABEL_THRESHOLD if head.task is Task.MULTI_LABEL else -np.inf
    limits = np.array(head.thresholds or [without] * len(scores), np.float32)
    likeliest = int(scores.argmax())
    if head.task is Task.MULTI_LABEL and (scores >= limits).any():
        return [(int(index), None) for index in np.flatnonzero(scores >= limits)]
    return [(likeliest, None if scores[likeliest] >= limits[likeliest] else float(limits[likeliest]))]


def row_of(explainer: Explainer, text: str) -> Row:
    """A text as scoring gives it to the model."""
    ids, size = explainer.tokenizer.encode([text]).ids, explainer.card.max_length
    sizes = np.array([len(ids)]) if explainer.card.windows is None else split(np.array([len(ids)]), size)[1]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    padded, mask = pad(ids, offsets, np.arange(len(sizes)), explainer.pad_token_id)
    return Row(located=locate(explainer.tokenizer, text), ids=padded, mask=mask)


def explain_rows(
    explainer: Explainer, data: LabelledSet, errors: Sequence[dict[str, Any]], most_steps: int, seconds: float
) -> int:
    """Add to each worst error where its answer comes from, for multi-label that of the likeliest label; how many were explained.

    After so many seconds the rest is left as it is. `text` is then the text that the words are places in.
    """
    until = time.monotonic() + seconds
    for count, one in enumerate(errors):
        if time.monotonic() > until:
            return count
        ids, mask, type_ids = data.gather(np.array([one["row"]]))
        row = Row(located=locate_ids(explainer.tokenizer, ids[mask]), ids=ids, mask=mask, type_ids=type_ids)
        answered = explainer.card.labels.index(one["answered"]) if isinstance(one["answered"], str) else None
        found = explain(explainer, row, likeliest(explainer, row) if answered is None else answered, most_steps)
        one["text"] = found.text
        one["explained"] = {
            **{name: getattr(found, name) for name in ("label", "value", "without", "missing", "steps")},
            "words": [[word.start, word.end, round(word.value, 5)] for word in found.words],
        }
    return len(errors)


def explain(explainer: Explainer, row: Row, label: int, most_steps: int = MOST_STEPS) -> Explanation:
    """Explain the answer that is the class numbered `label` for one text. Raises `UsageError` without captum."""
    check_captum("an explanation")
    from captum.attr import IntegratedGradients

    layer, states, baseline = embeddings_of(explainer, row)
    margin = margin_of(explainer, row, layer, label)
    method, rows_a_pass = IntegratedGradients(margin), max(1, PASS_TOKENS // row.ids.size)
    with torch.no_grad():
        value, without = float(margin(states)), float(margin(baseline))
    steps = FIRST_STEPS
    while True:
        found = method.attribute(states, baseline, n_steps=steps, internal_batch_size=rows_a_pass)
        places = found[0].double().sum(dim=-1).cpu().numpy()[row.mask]
        missing, words = value - without - float(places.sum()), row.located.words(places)
        if is_near(missing, words) or 2 * steps > most_steps:
            break
        steps *= 2
    return Explanation(
        task=explainer.card.task,
        label=explainer.card.labels[label],
        value=value,
        without=without,
        missing=missing,
        steps=steps,
        text=row.located.text,
        words=words,
    )


def is_near(missing: float, words: Sequence[Word]) -> bool:
    """Whether so little is missing from the sum of words' values that they are right."""
    return abs(missing) <= ROUNDING + TOLERANCE * sum(abs(one.value) for one in words)


def embeddings_of(explainer: Explainer, row: Row) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The layer whose output the way leads through, and that output (1, W, L, H) for the text and for padding in its place.

    It is the whole embedding layer of the family, with positions and norm. On the words' vectors alone a padding vector of
    zeros has a norm of zero, and all changes in a point that no number of steps finds (DeBERTa: 64 steps missed 0.12 of
    0.28). Padding is put in as vectors, not as ids: RoBERTa and MPNet count positions by ids.
    """
    encoder: Any = explainer.model.base_model
    words = encoder.get_input_embeddings()
    layer = getattr(encoder, "embeddings", words)
    ids = torch.from_numpy(row.ids).to(explainer.device)
    kept = torch.from_numpy(np.isin(row.ids, kept_ids(explainer.tokenizer)) | ~row.mask).to(explainer.device)
    found: list[torch.Tensor] = []

    def note(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        found.append(output)

    with torch.no_grad():
        padding = words(torch.where(kept, ids, explainer.pad_token_id))
        for context in (contextlib.nullcontext(), replaced(words, padding)):
            with context, hooked(layer, note):
                run(explainer, row, 1)
    states, baseline = (one[None] for one in found)
    return layer, states, baseline


def margin_of(explainer: Explainer, row: Row, layer: nn.Module, label: int) -> Margin:
    """What is explained, as a function of the embedding layer's output."""
    card = explainer.card

    def margin(states: torch.Tensor) -> torch.Tensor:
        with replaced(layer, states.flatten(0, 1)):
            logits = run(explainer, row, len(states))
        if card.task is Task.REGRESSION:
            return logits[:, 0]
        logits = logits / card.temperature
        if card.task is Task.MULTI_LABEL:
            return logits[:, label]
        others = [index for index in range(logits.shape[1]) if index != label]
        return logits[:, label] - torch.logsumexp(logits[:, others], dim=1)

    return margin


def run(explainer: Explainer, row: Row, copies: int) -> torch.Tensor:
    """Logits (copies, C) of as many copies of a row, those of its windows pooled."""

    def tensor(values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(explainer.device).repeat(copies, 1)

    segments = None if row.type_ids is None else tensor(row.type_ids)
    logits = logits_of(explainer.model, tensor(row.ids), tensor(row.mask), segments)[:, explainer.place]
    if explainer.card.windows is None:
        return logits
    counts = torch.full((copies,), len(row.ids), device=logits.device)
    return pool_windows(logits, counts, explainer.card.windows.pooling)


def likeliest(explainer: Explainer, row: Row) -> int:
    """The class with the largest logit."""
    with torch.no_grad():
        return int(run(explainer, row, 1)[0].argmax())


@contextlib.contextmanager
def hooked(layer: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Let a hook see, or change, what a layer puts out."""
    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def replaced(layer: nn.Module, output: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Let a layer put out something else."""
    return hooked(layer, lambda *_: output)
