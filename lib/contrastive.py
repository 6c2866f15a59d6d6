"""Contrastive tuning for few labels, SetFit (Tunstall et al. 2022, arXiv 2209.11055): pairs of rows, then a logistic regression.

Rows of the same label are pulled together and others apart, by the trainer and the loss of sentence-transformers, on the token ids
that training and scoring share. What comes out is a plain `PooledClassifier`. Letters: N rows, H hidden size, C classes.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from lib.batching import IntArray
from lib.errors import UsageError
from lib.heads import PooledClassifier
from lib.learning import Team, read_rows
from lib.mapped import LabelledSet, Subset
from lib.schema import Task
from lib.train_config import ContrastiveSection, HeadSection, TrainConfig

PROGRESS_SECONDS = 5.0

HEAD_ITERATIONS = 1000
"""At most, of the logistic regression's solver."""

LEFT_TO = {
    "optim": ({"seed"}, "there is no ordinary training; set it in [contrastive]"),
    "loss": (set(), "the head is a logistic regression"),
    "stopping": ({"metric", "keep"}, "there is one evaluation, at the end"),
    "lora": (set(), "the whole encoder is tuned"),
}
"""Of the sections that contrastive tuning takes the place of: the keys that still count, and why the others do not."""


def check_contrastive(config: TrainConfig) -> None:
    """Raise `UsageError` if contrastive tuning is asked for together with what it cannot do, or set but not asked for."""
    wanted, model, head = config.contrastive, config.model, config.head
    if wanted.iterations is None:
        if wanted.model_fields_set:
            raise UsageError(
                f"contrastive.{min(wanted.model_fields_set)} is set, but there is no contrastive tuning; set contrastive.iterations,"
                " 20 for example"
            )
        return
    for name, (kept, why) in LEFT_TO.items():
        given = sorted(getattr(config, name).model_fields_set - kept)
        if given:
            raise UsageError(f"{name}.{given[0]} with contrastive.iterations: {why}; leave it out")
    resources = config.resources
    refused = {
        f"resources.num_workers = {resources.num_workers}": (
            resources.num_workers > 1,
            "few rows are tuned by one worker",
        ),
        f'resources.strategy = "{resources.strategy}"': (
            resources.strategy != "ddp",
            "few rows are tuned by one worker",
        ),
        "tasks": (bool(config.tasks.named), "pairs are of one labelled set"),
        "model.freeze_layers": (model.freeze_layers is not None, "the whole encoder is tuned"),
        "model.window_stride": (model.window_stride is not None, "a pair is of two texts, not of their windows"),
        "model.compile": (model.compile, "pairs do not go through the compiled pass"),
        "head.hidden_sizes": (bool(head.hidden_sizes), "the head is a logistic regression"),
        "head.dropout": ("dropout" in head.model_fields_set, "the head is a logistic regression"),
        "train.weight_column": (config.train.weight_column is not None, "pairs have no weights"),
        "train.text_column of two": (not isinstance(config.train.text_column, str), "a pair is of two single texts"),
    }
    for key, (is_set, why) in refused.items():
        if is_set:
            raise UsageError(f"{key} with contrastive.iterations: {why}; leave one of the two out")
    if wanted.iterations:
        import_sentence_transformers()


def check_contrastive_task(config: TrainConfig, task: Task) -> None:
    """Raise `UsageError` unless rows have one label each."""
    if config.contrastive.iterations is not None and task is not Task.MULTI_CLASS:
        raise UsageError(
            f"contrastive.iterations pairs rows by the one label that each has, those of this data are {task.value}; leave it out"
        )


def head_of(config: TrainConfig) -> HeadSection:
    """The head that is put on the encoder: for contrastive tuning one of our own, on the mean of the tokens if nothing else is said."""
    if config.contrastive.iterations is None or config.head.pooling is not None:
        return config.head
    return config.head.model_copy(update={"pooling": "mean"})


def import_sentence_transformers() -> Any:
    """Sentence-transformers, with what its trainer needs. Raises `UsageError` if one of them is not installed."""
    try:
        import accelerate  # noqa: F401
        import datasets
        import sentence_transformers
    except ImportError as error:
        raise UsageError(
            f"contrastive.iterations needs sentence-transformers, which cannot be imported ({error});"
            " pip install 'sentence-transformers[train]', on every node"
        ) from None
    datasets.disable_progress_bars()
    return sentence_transformers


def draw_pairs(targets: IntArray, iterations: int, seed: int) -> tuple[IntArray, IntArray, npt.NDArray[np.float32]]:
    """First and second rows of the pairs, and 1 for the same label, 0 for another; for each row `iterations` of both kinds.

    A row that is alone with its label is paired with itself, as SetFit does: dropout makes the two differ.
    """
    chance = np.random.default_rng([seed, len(targets)])
    firsts, seconds, same = [], [], []
    for label in np.unique(targets):
        rows, others = np.flatnonzero(targets == label), np.flatnonzero(targets != label)
        own = np.repeat(np.arange(len(rows)), iterations)
        steps = chance.integers(1, len(rows), len(own)) if len(rows) > 1 else 0
        firsts += [rows[own], rows[own]]
        seconds += [rows[(own + steps) % len(rows)], chance.choice(others, len(own))]
        same += [np.ones(len(own), np.float32), np.zeros(len(own), np.float32)]
    return np.concatenate(firsts), np.concatenate(seconds), np.concatenate(same)


class PooledTexts(nn.Module):
    """What sentence-transformers calls a module: features in, features with an embedding out."""

    def __init__(self, model: PooledClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: dict[str, torch.Tensor], **_unused: Any) -> dict[str, torch.Tensor]:
        """Ids and mask (B, L) to the pooled texts (B, H)."""
        return {**features, "sentence_embedding": self.model.read(features["input_ids"], features["attention_mask"])}


@dataclass(frozen=True)
class PairCollator:
    """From pairs of row numbers to the padded ids of both sides."""

    data: LabelledSet
    chosen: IntArray
    valid_label_columns: ClassVar[list[str]] = ["label"]
    """read by the trainer"""

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The trainer's inputs."""
        found = {"label": torch.tensor([pair["label"] for pair in pairs])}
        for side in ("first", "second"):
            ids, mask, _ = self.data.gather(self.chosen[[pair[side] for pair in pairs]])
            found[f"{side}_input_ids"] = torch.from_numpy(ids)
            found[f"{side}_attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return found


def tune(model: PooledClassifier, rows: Subset, wanted: ContrastiveSection, seed: int, team: Team) -> tuple[int, float]:
    """Tune the encoder on pairs and make the logistic regression on its features the head, in place; steps, and their mean loss.

    Raises `UsageError` if a label has no row left, or the encoder has become one of no numbers.
    """
    steps, loss = tune_encoder(model, rows, wanted, seed, team) if wanted.iterations else (0, 0.0)
    texts = read_rows(
        cast(Any, model),
        lambda model, *inputs: model.embed(*inputs),
        int(model.config.hidden_size),
        rows.data,
        rows.chosen,
        team,
    )
    if not np.isfinite(texts).all():
        raise UsageError(
            f"{int((~np.isfinite(texts)).any(axis=1).sum())} of {len(texts)} training rows have features that are no finite numbers after"
            f" {steps} steps of contrastive tuning; lower contrastive.learning_rate, under another --run-id"
        )
    fit_head(model, texts, rows.targets)
    return steps, loss


def tune_encoder(
    model: PooledClassifier, rows: Subset, wanted: ContrastiveSection, seed: int, team: Team
) -> tuple[int, float]:
    """The contrastive phase: cosine similarities towards 1 and 0, by their squared error."""
    library = import_sentence_transformers()
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
    from transformers import PrinterCallback, ProgressCallback

    assert wanted.iterations is not None
    firsts, seconds, same = draw_pairs(rows.targets, wanted.iterations, seed)
    sentences = library.SentenceTransformer(modules=[PooledTexts(model)], device=str(team.device))
    model.head.requires_grad_(False)  # no part of the loss
    with tempfile.TemporaryDirectory(prefix="pairs-") as folder, on_its_own():
        trainer = library.SentenceTransformerTrainer(
            model=sentences,
            args=library.SentenceTransformerTrainingArguments(
                output_dir=folder,
                num_train_epochs=wanted.epochs,
                per_device_train_batch_size=wanted.batch_size,
                learning_rate=wanted.learning_rate,
                warmup_steps=wanted.warmup_fraction,
                bf16=team.dtype is torch.bfloat16,
                fp16=team.dtype is torch.float16,
                use_cpu=team.device.type == "cpu",
                dataloader_pin_memory=team.device.type != "cpu",
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"first": firsts, "second": seconds, "label": same}),
            loss=CosineSimilarityLoss(sentences),
            data_collator=PairCollator(rows.data, rows.chosen),
            callbacks=[progress_lines(wanted.batch_size)],
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        found = trainer.train()
    model.head.requires_grad_(True)
    return int(found.global_step), float(found.training_loss)


@contextlib.contextmanager
def on_its_own() -> Iterator[None]:
    """Without the variable of Ray Train by which the trainer would believe that there are other workers: it would leave out the last batch."""
    kept = os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ["LOCAL_RANK"] = kept


def progress_lines(batch_size: int) -> Any:
    """A callback that says every few seconds how far the pairs are."""
    from transformers import TrainerCallback

    class Lines(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Made here: transformers is imported where it is used."""

        printed, last = time.monotonic(), 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            """After each optimizer step."""
            now, steps = time.monotonic(), state.global_step - self.last
            if now - self.printed < PROGRESS_SECONDS:
                return
            rate = steps / (now - self.printed)
            print(
                f"contrastive: step {state.global_step}/{state.max_steps}, {rate * batch_size:.0f} pairs/s,"
                f" {(state.max_steps - state.global_step) / rate:.0f} s left",
                flush=True,
            )
            self.printed, self.last = now, state.global_step

    return Lines()


def fit_head(model: PooledClassifier, texts: npt.NDArray[np.float32], targets: IntArray) -> LogisticRegression:
    """Fit scikit-learn's logistic regression to pooled texts (N, H), and make its coefficients the head's, in place.

    Of two classes it has one row w and b: half of it with either sign gives the same probabilities. Raises `UsageError` if a label has no row.
    """
    labels = model.config.id2label
    gone = [labels[number] for number in range(len(labels)) if number not in targets]
    if gone:
        raise UsageError(
            f"label {gone[0]!r} has no training row left, which a logistic regression needs; see data.duplicates"
        )
    found = LogisticRegression(max_iter=HEAD_ITERATIONS).fit(texts, targets)
    weight, bias = found.coef_, found.intercept_
    if len(labels) == 2:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    linear = next(one for one in model.head if isinstance(one, nn.Linear))
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight))
        linear.bias.copy_(torch.from_numpy(bias))
    return found
