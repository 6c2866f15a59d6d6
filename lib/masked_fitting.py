"""Further pre-training on one worker, from rows of token ids up to the committed encoder with its masked-language head."""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from lib.batching import IntArray, epoch_batches
from lib.calibration import FloatArray
from lib.checkpoint import Card, commit, fetch
from lib.committing import METRICS_NAME
from lib.config import masked
from lib.corpus import CorpusIndex
from lib.fitting import Fit, Job, run_worker
from lib.language_model import load_language_model, save_language_model
from lib.learning import Team
from lib.mapped import Selection, TokenSet, local_paths
from lib.masked_learning import MaskedLearner, summarize_masked
from lib.masking import new_masking
from lib.metrics import shown
from lib.pretrain_config import PretrainConfig
from lib.schema import Task
from lib.storage import Store
from lib.tokenization import load_tokenizer
from lib.tuning import recompute_layers


@dataclass(frozen=True, kw_only=True)
class PretrainJob(Job):
    """What a worker is told of a masked-language model."""

    config: PretrainConfig
    index: CorpusIndex
    data: Store
    """its tokenized rows"""


class PretrainFit(Fit):
    """One attempt at further pre-training, on one worker."""

    job: PretrainJob

    def __init__(self, job: PretrainJob, team: Team) -> None:
        config, optim = job.config, job.config.optim
        sets = {name: open_set(job, files) for name, files in job.index.files.items()}
        steps_per_epoch = math.ceil(len(sets["train"]) / optim.batch_size)
        model, self.has_new_head = new_model(job)
        if self.has_new_head and team.rank == 0:
            print(
                f"{masked(config.model.base)} has no masked-language head: a new one is learned, its decoder tied to the embeddings"
                f" (optim.head_learning_rate = {optim.head_learning_rate or optim.learning_rate})",
                flush=True,
            )
        if config.model.gradient_checkpointing:
            recompute_layers(model)
        trust = config.model.trust
        tokenizer = load_tokenizer(fetch(job.base, trust), job.max_length, trust.code)
        masking = new_masking(tokenizer, config.mlm.probability, config.mlm.whole_words)
        placed: Any = model
        learner = MaskedLearner(placed.to(team.device), optim, masking, team, steps_per_epoch * optim.epochs)
        super().__init__(job, team, sets, learner, steps_per_epoch)

    def batches_of(self, epoch: int) -> list[IntArray]:
        """The places in the training set of each batch of an epoch."""
        optim = self.job.config.optim
        return epoch_batches(self.sets["train"].lengths, optim.batch_size, optim.seed, epoch)

    def summary(self, found: FloatArray) -> dict[str, float]:
        """Masked cross entropy, perplexity and accuracy."""
        return summarize_masked(found)

    def new_model(self) -> PreTrainedModel:
        """The model as it is before training, the same on every worker."""
        return new_model(self.job)[0]


def open_set(job: PretrainJob, files: list[str]) -> Selection:
    """Map the rows of one set."""
    rows = TokenSet(local_paths(job.data, files), job.pad_token_id, job.max_length)
    return Selection(rows, np.arange(len(rows)))


def new_model(job: PretrainJob) -> tuple[PreTrainedModel, bool]:
    """The model as it is before training, and whether its head is new."""
    model = job.config.model
    return load_language_model(
        fetch(job.base, model.trust), "model.base", model.trust, model.dropout, job.config.optim.seed
    )


def work(job: PretrainJob) -> str | None:
    """What each worker runs. Returns why the run is hopeless, if it is."""
    return run_worker(job, PretrainFit, conclude, [job.data])


def conclude(fit: PretrainFit) -> None:
    """Evaluate on the validation rows, on all workers, and commit, on the first."""
    found = fit.learner.evaluate(fit.sets["valid"])
    if found is not None:
        publish(fit, found)


def publish(fit: PretrainFit, found: FloatArray) -> None:
    """Write the model's folder with its metrics, given what the validation rows gave, and commit it."""
    job, trust = fit.job, fit.job.config.model.trust
    best, index = fit.validation(found), job.index
    metrics: dict[str, Any] = {
        **fit.run_record(best),
        "texts": index.texts,
        "rows": index.rows,
        "tokens": index.tokens,
        "dropped": index.dropped,
        "new_head": fit.has_new_head,
    }
    card = Card(
        labels=(),
        task=Task.EMBEDDING,
        max_length=job.max_length,
        metrics={"valid": best},
        trained=fit.provenance(index.fingerprint),
    )
    with tempfile.TemporaryDirectory() as folder:
        base = fetch(job.base, trust)
        save_language_model(fit.trained_model(), base, trust, folder)
        load_tokenizer(base, job.max_length, trust.code).reference.save_pretrained(folder)
        (Path(folder) / METRICS_NAME).write_text(json.dumps(metrics, indent=1), encoding="utf-8")
        (Path(folder) / "README.md").write_text(readme(job, metrics), encoding="utf-8")
        commit(job.output, folder, card)
    fit.end(best)


def readme(job: PretrainJob, metrics: dict[str, Any]) -> str:
    """The encoder's model card."""
    config, texts = job.config, metrics["texts"]
    words = "whole words" if config.mlm.whole_words else "tokens"
    laid = "packed with separators between them" if config.mlm.packing else "one text a row"
    head = " Its masked-language head was new." if metrics["new_head"] else ""
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
---

# An encoder pre-trained further

From `{masked(config.model.base)}`, on {texts["train"]:,} texts ({metrics["tokens"]["train"]:,} tokens in {metrics["rows"]["train"]:,} rows of at
most {job.max_length}, {laid}): {config.mlm.probability:.0%} of the {words} were asked for, of these 80% masked, 10% changed, 10% as they are
(Devlin et al. 2018).{head} It is to be fine-tuned, and answers nothing by itself:

    python -m jobs.train --set model.base=THIS_FOLDER --set train.path=... --set output.path=...

Of masked tokens of {texts["valid"]:,} texts that were set aside: {shown(metrics["best"])}. Texts may be told again from what a language
model has learned of them: give it to whom you would give the texts.

Run `{job.run_id}`, seed {config.optim.seed}, fingerprint of the texts {job.index.fingerprint}. `textsweep.json` has the whole configuration,
`metrics.json` all evaluations.
"""
