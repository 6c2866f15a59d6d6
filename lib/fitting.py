"""Fitting: what every worker of a training run does, from mapped rows to the best checkpoint, committed.

Which rows a step sees and in which order is decided by (seed, step) alone, so a run that was killed goes on exactly where
its last evaluation left it. Knows Ray Train's worker side, not the cluster.
"""

import itertools
import json
import logging
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from lib.attribution import check_captum, explain_rows, new_explainer
from lib.batching import IntArray, epoch_batches, sample_rows
from lib.calibration import Decision, FloatArray, decide
from lib.checkpoint import CARD_NAME, COMMIT_NAME, Card, commit, fetch
from lib.config import StoppingSection, TrainConfig, masked
from lib.contrastive import head_of, tune
from lib.errors import UsageError, say
from lib.label_noise import LISTED, find_suspects, rows_to_look_at
from lib.labelled import LabelledIndex
from lib.learning import Learner, Team, features_of_rows
from lib.loss import Objective, SeveralObjectives
from lib.mapped import LabelledSet, Subset, known_rows, local_copy, map_set, split_rows, without_known
from lib.metrics import describe, is_better, shown, summarize, worst_errors
from lib.model import choose_dtype, load_classifier, new_classifier
from lib.model_card import model_card
from lib.schema import Head, label_name, slices_of, task_of
from lib.sharding import broadcast_weights, load_optimizer, load_weights, whole, whole_state
from lib.storage import Store
from lib.tokenization import load_tokenizer
from lib.tracking import About, Places, Tracker, params_of
from lib.training_report import training_report
from lib.tuning import add_adapters, compile_passes, freeze, merge_adapters, recompute_layers

METRICS_NAME = "metrics.json"

Weights = dict[str, torch.Tensor]
"""A model's parameters and buffers by name, in host memory."""

PROGRESS_SECONDS = 5.0

STATE_NAME = "state.pt"

SUSPECTS_NAME = "label_noise.json"

SHOWN_ROWS = 8
"""Of a batch, in a message."""

EXPLAINED_STEPS = 64
"""At most, for each of the worst errors."""

EXPLAINED_SECONDS = 60.0
"""For all of the worst errors together."""

MAX_KNOWN = 0.001
"""The part of a set that may be known from training if duplicates are refused."""


@dataclass(frozen=True, kw_only=True)
class TaskJob:
    """What a worker is told of one labelled set with its head."""

    name: str
    """empty if there are no others"""
    index: LabelledIndex
    objective: Objective
    data: Store
    """its tokenized rows"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told."""

    config: TrainConfig
    run_id: str
    base: str
    """model.base, made absolute: Ray Train moves workers to another working directory"""
    max_length: int
    pad_token_id: int
    tasks: tuple[TaskJob, ...]
    """one, or one for each head"""
    metric: str
    """which chooses the checkpoint"""
    output: Store
    folder: Store
    """of this run: tokenized data and Ray Train's checkpoints; removed at the end"""
    cpus_per_worker: int
    tracking: Places | None = None

    @property
    def heads(self) -> tuple[Head, ...]:
        """What the model's outputs answer."""
        return tuple(Head(name=one.name, task=one.index.task, labels=one.index.labels) for one in self.tasks)

    @property
    def labels(self) -> tuple[str, ...]:
        """Of all heads."""
        return tuple(label_name(head, label) for head in self.heads for label in head.labels)

    @property
    def objective(self) -> Objective | SeveralObjectives:
        """What training makes small."""
        parts = tuple(one.objective for one in self.tasks)
        return (
            parts[0]
            if len(parts) == 1
            else SeveralObjectives(parts=parts, places=tuple(place for _, place in slices_of(self.heads)))
        )


@dataclass
class Progress:
    """How far a run is; plain types, saved with every evaluation, the same on all workers."""

    step: int = 0
    """optimizer steps done"""
    best_value: float | None = None
    kept: list[int] = field(default_factory=list)
    """steps whose weights are kept, the best one or the last one first"""
    stale: int = 0
    """evaluations since the best one"""
    stopped: bool = False
    failure: str | None = None
    """why going on makes no sense, for the user"""
    seconds: float = 0.0
    """of training, attempts that were killed left out"""
    resumed_after: list[int] = field(default_factory=list)
    """steps after which the run went on because workers had died"""
    history: list[dict[str, float]] = field(default_factory=list)


def join_team(job: Job) -> Team:
    """Say who this worker is, and set up its device and threads."""
    logging.getLogger().setLevel(logging.WARNING)  # else a line of Ray's for every report
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    assert isinstance(device, torch.device)
    cores = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    torch.set_num_threads(min(job.cpus_per_worker, cores))
    return Team(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=device,
        dtype=choose_dtype(job.config.model.precision, device),
        control=dist.new_group(backend="gloo"),
        sharded=job.config.resources.strategy == "fsdp" and context.get_world_size() > 1,
    )


def open_sets(job: Job, task: TaskJob) -> dict[str, Subset]:
    """Map all sets of a task; without one for validation a part of the training rows is set aside, the same on every worker.

    With `valid.fraction = 0` the training rows are the validation rows, too.
    """
    index, windows = task.index, job.config.model.windows
    mapped = {
        name: map_set(task.data, files, index.labels, index.task, job.pad_token_id, job.max_length, windows)
        for name, files in index.files.items()
    }
    sets = {name: Subset(one, np.arange(len(one))) for name, one in mapped.items()}
    if "valid" not in sets and not job.config.valid.fraction:
        sets["valid"] = sets["train"]
    elif "valid" not in sets:
        train = mapped["train"]
        parts = split_rows(train.targets, job.config.valid.fraction, job.config.optim.seed)
        sets["train"], sets["valid"] = (Subset(train, part) for part in parts)
    return sets


def mix_sets(several: Sequence[dict[str, Subset]]) -> dict[str, Subset]:
    """The sets of all tasks as one of each kind: the rows of one task after those of the other. A task without one has no rows in it."""
    if len(several) == 1:
        return several[0]
    found = {}
    for name in ("train", "valid", "test"):
        parts = [sets[name] for sets in several if name in sets]
        if parts:
            starts = np.cumsum([0, *(len(part.data) for part in parts)])
            chosen = [start + part.chosen for start, part in zip(starts[:-1], parts, strict=True)]
            found[name] = Subset(LabelledSet.mix([part.data for part in parts]), np.concatenate(chosen))
    return found


def check_duplicates(
    sets: dict[str, Subset], config: TrainConfig, rank: int
) -> tuple[dict[str, Subset], dict[str, int]]:
    """Count the rows of other sets that are known from training, and do what `data.duplicates` says; the sets, and the counts.

    Raises `UsageError` if they are to be refused.
    """
    known = known_rows({name: one for name, one in sets.items() if name == "train" or one is not sets["train"]})
    shown = ", ".join(f"{count:,} of {len(sets[name]):,} {name} rows" for name, count in known.items() if count)
    if config.data.duplicates == "refuse":
        for name, count in known.items():
            if count > MAX_KNOWN * len(sets[name]):
                raise UsageError(
                    f'data.duplicates = "refuse": {shown} have the text of a training row, expected at most {MAX_KNOWN:.1%};'
                    ' remove them, or set data.duplicates = "drop" to leave them out of training'
                )
    before = len(sets["train"])
    if config.data.duplicates == "drop":
        without = without_known(
            {name: one for name, one in sets.items() if name == "train" or one is not sets["train"]}
        )
        sets = {name: without.get(name, without["train"]) for name in sets}
    if shown and rank == 0:
        left_out = before - len(sets["train"])
        what = f": {left_out:,} of those are left out" if left_out else ", and may be known by heart (data.duplicates)"
        say(f"{'' if left_out else 'WARNING: '}{shown} have the text of a training row{what}")
    return sets, known


def new_model(job: Job) -> PreTrainedModel:
    """The model as it is before training, the same on every worker."""
    config, trust = job.config, job.config.model.trust
    base = fetch(job.base, trust)
    model = new_classifier(
        base, job.labels, task_of(job.heads), config.model.dropout, config.optim.seed, trust, head_of(config)
    )
    freeze(model, config)
    add_adapters(model, config.lora)
    return model


class Fit:
    """One attempt at a run, on one worker."""

    def __init__(self, job: Job, team: Team) -> None:
        self.job = job
        self.team = team
        checked = [check_duplicates(open_sets(job, task), job.config, team.rank) for task in job.tasks]
        self.sets_of = [sets for sets, _ in checked]
        """each task's own rows"""
        self.known = [known for _, known in checked]
        self.sets = mix_sets(self.sets_of)
        self.steps_per_epoch = math.ceil(len(self.sets["train"]) / job.config.optim.batch_size)
        optim = job.config.optim
        model: Any = new_model(job)
        if job.config.model.gradient_checkpointing:
            recompute_layers(model)
        if job.config.model.compile:
            compile_passes(model)
        self.suspects = look_for_label_noise(job, model.to(team.device), self.sets["train"], team)
        epochs = optim.epochs if job.config.contrastive.iterations is None else 0
        self.learner = Learner(model.to(team.device), optim, job.objective, team, self.steps_per_epoch * epochs)
        self.progress = Progress()
        self.kept: dict[int, Weights] = {}
        """by step, on rank 0"""
        self.resume()
        self.tracker = new_tracker(job, self.progress.step) if team.rank == 0 else None
        self.begun = time.monotonic() - self.progress.seconds
        self.printed = (time.monotonic(), self.progress.step)

    def run(self) -> None:
        """Train to the end or until stopping is due, and leave the best weights in the model of every worker."""
        config, learner, progress, train = self.job.config, self.learner, self.progress, self.sets["train"]
        places = evaluation_places(self.steps_per_epoch, config.stopping.evaluations_per_epoch)
        if config.contrastive.iterations is not None and not progress.history:
            self.tune_on_pairs()
        loaded, batches = -1, []
        while progress.step < learner.total_steps and not progress.stopped:
            epoch, place = divmod(progress.step, self.steps_per_epoch)
            if epoch != loaded:
                loaded, batches = epoch, self.batches_of(epoch)
                learner.begin_epoch(epoch)
            learner.step(progress.step, train.data, train.chosen[batches[place]])
            progress.step += 1
            self.after_step()
            if place + 1 in places:
                self.assess()
                self.save()
        if progress.failure is None:
            self.restore_kept()

    def after_step(self) -> None:
        """What follows each optimizer step."""
        self.print_progress()

    def batches_of(self, epoch: int) -> list[IntArray]:
        """The places in the training set of each batch of an epoch."""
        optim, sizes = self.job.config.optim, [len(sets["train"]) for sets in self.sets_of]
        rows = sample_rows(sizes, self.job.config.sampling.temperature, optim.seed, epoch)
        lengths = self.sets["train"].lengths[rows]
        return [rows[places] for places in epoch_batches(lengths, optim.batch_size, optim.seed, epoch)]

    def parts_of(self, name: str, logits: FloatArray) -> list[tuple[int, FloatArray]]:
        """The logits of a set, task by task: the task's number, and its head's logits of its own rows."""
        found, start = [], 0
        for number, (sets, (_, place)) in enumerate(zip(self.sets_of, slices_of(self.job.heads), strict=True)):
            if name in sets:
                found.append((number, logits[start : start + len(sets[name]), place]))
                start += len(sets[name])
        return found

    def summary(self, logits: FloatArray) -> dict[str, float]:
        """The few numbers that validation gives; of several tasks the means, and each one's behind its name."""
        found = {}
        for number, own in self.parts_of("valid", logits):
            head = self.job.heads[number]
            found[head.prefix] = summarize(self.sets_of[number]["valid"].targets, own, Decision(task=head.task))
        if len(found) == 1:
            return found[""]
        shared = [key for key in next(iter(found.values())) if all(key in one for one in found.values())]
        means = {key: float(np.mean([one[key] for one in found.values()])) for key in shared}
        return means | {prefix + key: value for prefix, one in found.items() for key, value in one.items()}

    def tune_on_pairs(self) -> None:
        """Contrastive tuning in place of the ordinary steps, from its beginning if it was killed; with the one evaluation at its end."""
        config, model = self.job.config, cast(Any, self.learner.model)
        steps, loss = tune(model, self.sets["train"], config.contrastive, config.optim.seed, self.team)
        self.learner.loss_sum += loss
        self.progress.step, self.steps_per_epoch = steps, max(1, steps // config.contrastive.epochs)
        self.assess()
        self.save()

    def assess(self) -> None:
        """Evaluate on the validation rows, and decide what is best and whether to stop: on rank 0, for all."""
        progress, stopping, metric = self.progress, self.job.config.stopping, self.job.metric
        means, bad_step = self.learner.means()
        found = self.learner.evaluate(self.sets["valid"])
        before = progress.history[-1] if progress.history else {"step": 0, "seconds": 0.0}
        entry: dict[str, float] = {}
        if found is not None:
            seconds = time.monotonic() - self.begun
            rows = self.rows_until(progress.step) - self.rows_until(int(before["step"]))
            entry = {
                "step": progress.step,
                "epoch": round(progress.step / self.steps_per_epoch, 4),
                "seconds": round(seconds, 3),
                "rows_per_second": round(rows / max(1e-3, seconds - before["seconds"]), 3),
                "workers": self.team.size,
                **means,
                **self.summary(found),
            }
        entry = self.team.broadcast(entry)
        progress.history.append(entry)
        progress.seconds = entry["seconds"]
        if not math.isfinite(entry["train_loss"]):
            progress.failure = self.team.broadcast(None if bad_step is None else self.describe_bad(bad_step))
            progress.stopped = True
        elif stopping.keep == "last" or is_better(entry[metric], progress.best_value, metric):
            progress.best_value, progress.stale = entry[metric], 0
        else:
            progress.stale += 1
            progress.stopped = progress.stale >= stopping.patience
        self.keep()
        self.print_evaluation(entry)
        if self.tracker is not None:
            self.tracker.log(progress.history)
            if progress.failure is not None:
                self.tracker.end({}, progress.step, failed=True)
        self.printed = (time.monotonic(), progress.step)

    def rows_until(self, step: int) -> int:
        """Training rows of the first steps; the last batch of an epoch may be smaller."""
        epochs, place = divmod(step, self.steps_per_epoch)
        rows = len(self.sets["train"])
        return epochs * rows + min(rows, place * self.job.config.optim.batch_size)

    def keep(self) -> None:
        """Keep the weights of the best or of the last evaluations, as many as are averaged at the end."""
        progress, stopping = self.progress, self.job.config.stopping
        progress.kept = steps_to_keep(progress.history, stopping, self.job.metric)
        if progress.step in progress.kept and (self.team.rank == 0 or self.team.sharded):
            self.kept[progress.step] = copy_weights(self.learner.candidate)
        self.kept = {step: self.kept[step] for step in progress.kept} if self.team.rank == 0 else {}

    def describe_bad(self, step: int) -> str:
        """Say where the training loss ceased to be a number."""
        train = self.sets["train"]
        epoch, place = divmod(step, self.steps_per_epoch)
        rows = train.chosen[self.batches_of(epoch)[place]]
        found = [train.data.place_of(int(row)) for row in rows[:SHOWN_ROWS]]
        shown = "; ".join(f"{shard}: {', '.join(str(one['row']) for one in ones)}" for shard, ones in by_shard(found))
        return (
            f"the training loss is no finite number from step {step + 1} (epoch {epoch + 1}) on; its batch were the training rows {shown}"
            f"{f' and {len(rows) - SHOWN_ROWS} more' if len(rows) > SHOWN_ROWS else ''}"
        )

    def print_progress(self) -> None:
        """On rank 0, every few seconds."""
        now, (last, last_step) = time.monotonic(), self.printed
        if self.team.rank or now - last < PROGRESS_SECONDS:
            return
        progress, total = self.progress, self.learner.total_steps
        steps = progress.step - last_step
        loss = float(self.learner.loss_sum) * self.team.size / max(1, self.learner.num_steps)
        print(
            f"epoch {(progress.step - 1) // self.steps_per_epoch + 1}/{self.job.config.optim.epochs},"
            f" step {progress.step}/{total}: loss {loss:.4f},"
            f" {steps * self.job.config.optim.batch_size / (now - last):.0f} rows/s,"
            f" {(total - progress.step) * (now - last) / steps:.0f} s left",
            flush=True,
        )
        self.printed = (now, progress.step)

    def print_evaluation(self, entry: dict[str, float]) -> None:
        """On rank 0, one line for each evaluation."""
        if self.team.rank:
            return
        progress, metric = self.progress, self.job.metric
        if progress.failure is not None:
            note = progress.failure
        elif self.job.config.stopping.keep == "last":
            note = "the last so far"
        elif progress.kept[:1] == [progress.step]:
            note = "the best so far"
        else:
            note = (
                "none so far"
                if progress.best_value is None
                else f"best: {progress.best_value:.4f} at step {progress.kept[0]}"
            )
        print(
            f"validation at step {progress.step}: {shown(entry)}; {metric}: {note}{'; stopping here' if progress.stopped else ''}",
            flush=True,
        )

    def save(self) -> None:
        """Report a Ray Train checkpoint that `resume` goes on from."""
        metric = self.job.metric
        metrics = {"step": self.progress.step, metric: self.progress.history[-1][metric]}
        average = self.learner.average
        learned = {
            "model": self.learner.model.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "average": None if average is None else average.state_dict(),
        }
        if self.team.sharded:
            learned = whole_state(learned, keep=self.team.rank == 0)
        if self.team.rank:
            ray.train.report(metrics, checkpoint=None)
            return
        state = {
            **learned,
            "scaler": self.learner.scaler.state_dict(),
            "progress": asdict(self.progress),
            "kept": {step: one for step, one in self.kept.items() if step != self.progress.step},
        }
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, Path(folder) / STATE_NAME)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def resume(self) -> None:
        """Go on from the last checkpoint that Ray Train committed, if there is one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE_NAME, map_location="cpu", weights_only=True)
        load_weights(self.learner.model, state["model"])
        load_optimizer(self.learner.optimizer, state["optimizer"])
        self.learner.scaler.load_state_dict(state["scaler"])
        if self.learner.average is not None:
            load_weights(self.learner.average, state["average"])
        self.progress = Progress(**state["progress"])
        self.progress.resumed_after.append(self.progress.step)
        now = {self.progress.step: copy_weights(self.learner.candidate)}
        if self.team.rank == 0:
            self.kept = {step: (state["kept"] | now)[step] for step in self.progress.kept}
            workers = f"{self.team.size} worker{'' if self.team.size == 1 else 's'}"
            print(f"{workers} resuming after step {self.progress.step} of {self.learner.total_steps}", flush=True)

    def validation(self, logits: FloatArray) -> dict[str, float]:
        """What validation says of the weights that are committed: the best evaluation, or one of the mean of several."""
        best = next(entry for entry in self.progress.history if entry["step"] == self.progress.kept[0])
        if len(self.progress.kept) == 1:
            return best
        return best | self.summary(logits)

    def restore_kept(self) -> None:
        """Make the weights that rank 0 keeps, or the mean of several, every worker's candidate."""
        kept = mean_of(list(self.kept.values())) if self.team.rank == 0 else None
        broadcast_weights(self.learner.candidate, kept)

    def trained_model(self) -> PreTrainedModel:
        """On rank 0, at the end: the model that is committed, whole and on its own."""
        if not self.team.sharded:
            return self.learner.candidate
        model = new_model(self.job)
        load_weights(model, mean_of(list(self.kept.values())))
        return model


def new_tracker(job: Job, last_step: int) -> Tracker | None:
    """What shows this run elsewhere, if that is asked for."""
    if job.tracking is None:
        return None
    about = About(run_id=job.run_id, output=masked(job.output.url), params=params_of(job.config))
    return Tracker(job.tracking, about, last_step)


def steps_to_keep(history: list[dict[str, float]], stopping: StoppingSection, metric: str) -> list[int]:
    """Steps of the best evaluations, or of the last ones, first those; of equally good ones the earlier."""
    if stopping.keep == "last":
        entries = history[::-1]
    else:
        sign = 1 if metric == "loss" else -1
        entries = sorted(
            (one for one in history if is_better(one[metric], None, metric)),
            key=lambda one: sign * one[metric],
        )
    return [int(one["step"]) for one in entries[: stopping.average]]


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


def evaluation_places(steps_per_epoch: int, evaluations: int) -> set[int]:
    """After which steps of an epoch (1 is the first) validation runs; always after the last one."""
    return {math.ceil(steps_per_epoch * part / evaluations) for part in range(1, evaluations + 1)}


def work(settings: dict[str, Any]) -> str | None:
    """What each worker runs: train, evaluate on the test rows, commit. Returns why the run is hopeless, if it is."""
    job: Job = settings["job"]
    team = join_team(job)
    done = team.rank == 0 and find_committed(job.output, job.config, job.run_id) is not None
    if team.broadcast(done):  # killed between the commit and the end
        return None
    fit = Fit(job, team)
    fit.run()
    if fit.progress.failure is None:
        valid, test = fit.learner.evaluate(fit.sets["valid"]), fit.sets.get("test")
        found = None if test is None else fit.learner.evaluate(test)
        if valid is not None:
            publish(fit, valid, found)
    dist.barrier(group=team.control)
    if not job.folder.is_local and ray.train.get_context().get_local_rank() == 0:
        for task in job.tasks:
            shutil.rmtree(local_copy(task.data), ignore_errors=True)
    return fit.progress.failure


def publish(fit: Fit, valid: FloatArray, test: FloatArray | None) -> None:
    """Write the model's folder with its metrics, given the logits of validation and test rows, and commit it."""
    job, progress, best = fit.job, fit.progress, fit.validation(valid)
    heads, found = [], {}
    tests = {} if test is None else dict(fit.parts_of("test", test))
    for number, logits in fit.parts_of("valid", valid):
        head, sets = job.heads[number], fit.sets_of[number]
        decision = decide(job.config.decision, logits, sets["valid"].targets, head.task)
        heads.append(replace(head, temperature=decision.temperature, thresholds=decision.thresholds))
        found[head.name] = task_metrics(fit, number, decision, logits, tests.get(number))
    rows = {name: len(one) for name, one in fit.sets.items()}
    trained = {
        "run_id": job.run_id,
        "config": deciding(job.config),
        "seed": job.config.optim.seed,
        "data": "|".join(task.index.fingerprint for task in job.tasks),
        "rows": rows,
        "label_counts": {task.name: task.index.label_counts for task in job.tasks}
        if len(found) > 1
        else job.tasks[0].index.label_counts,
        "precision": str(fit.team.dtype).removeprefix("torch."),
        "workers": fit.team.size,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "ray")},
        },
    }
    briefly = {name: brief(one["test"]) for name, one in found.items()}
    card = Card(
        labels=job.labels,
        task=task_of(heads),
        max_length=job.max_length,
        truncation=job.config.model.truncation,
        windows=job.config.model.windows,
        temperature=heads[0].temperature if len(heads) == 1 else 1.0,
        thresholds=heads[0].thresholds if len(heads) == 1 else None,
        several=tuple(heads) if len(heads) > 1 else (),
        metrics={"valid": best, "test": briefly[""] if len(found) == 1 else briefly},
        trained=trained,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = fit.trained_model()
        merge_adapters(model)
        model.save_pretrained(folder)
        for number, head in enumerate(heads):
            found[head.name]["unexplained"] = explain_errors(fit, number, found[head.name], card, folder)
            name_rows(found[head.name]["errors"], evaluated(fit, number, found[head.name]).data)
        metrics: dict[str, Any] = {
            "run_id": job.run_id,
            "seconds": progress.seconds,
            "rows": rows,
            "metric": job.metric,
            "best": best,
            "averaged_steps": progress.kept if len(progress.kept) > 1 else None,
            "resumed_after": progress.resumed_after,
            "history": progress.history,
            "label_noise": fit.suspects,
            **(found[""] if len(found) == 1 else {"tasks": found}),
        }
        trust = job.config.model.trust
        tokenizer = load_tokenizer(fetch(job.base, trust), job.max_length, trust.code, job.config.model.truncation)
        tokenizer.reference.save_pretrained(folder)
        (Path(folder) / METRICS_NAME).write_text(json.dumps(metrics, indent=1), encoding="utf-8")
        (Path(folder) / "report.html").write_text(training_report(card, metrics), encoding="utf-8")
        (Path(folder) / "README.md").write_text(model_card(card, metrics), encoding="utf-8")
        commit(job.output, folder, card)
    if fit.tracker is not None:
        tested = {f"{name}_test" if name else "test": one["test"] for name, one in found.items()}
        fit.tracker.end({"best": best, **tested}, progress.step)
    steps = f"step {progress.kept[0]}" if len(progress.kept) == 1 else f"steps {progress.kept}, averaged,"
    print(f"committed the weights of {steps} to {job.output.url}", flush=True)


def task_metrics(
    fit: Fit, number: int, decision: Decision, valid: FloatArray, test: FloatArray | None
) -> dict[str, Any]:
    """What is known of one task at the end, given the logits of its validation and test rows."""
    index, sets = fit.job.tasks[number].index, fit.sets_of[number]
    described = {
        name: describe(sets[name].targets, logits, decision, index.labels)
        for name, logits in (("valid", valid), ("test", test))
        if logits is not None
    }
    return {
        "rows": {name: len(one) for name, one in sets.items()},
        "dropped": index.dropped,
        "known_from_training": fit.known[number],
        "labels": list(index.labels),
        "temperature": decision.temperature,
        "thresholds": decision.thresholds,
        "valid": described["valid"],
        "test": described.get("test"),
        "errors": find_errors(
            fit, number, decision, "valid" if test is None else "test", valid if test is None else test
        ),
        "label_counts": index.label_counts,
        "lengths": {"rows": index.sampled["train"], "longer_than": index.longer["train"]},
    }


def brief(metrics: dict[str, Any] | None) -> dict[str, Any] | None:
    """The single numbers of a set's metrics."""
    return {key: value for key, value in (metrics or {}).items() if not isinstance(value, (list, dict))} or None


def look_for_label_noise(job: Job, model: PreTrainedModel, rows: Subset, team: Team) -> dict[str, Any] | None:
    """Training rows whose label looks wrong, if that is asked for: the clearest ones, and how many there are. On rank 0.

    An attempt that goes on takes what the first one found.
    """
    if not job.config.data.label_noise:
        return None
    kept = job.folder.read(SUSPECTS_NAME)
    if team.broadcast(kept is not None):
        return json.loads(kept) if kept and team.rank == 0 else None
    seed = job.config.optim.seed
    looked_at = Subset(rows.data, rows.chosen[rows_to_look_at(len(rows), seed)])
    features = features_of_rows(model, looked_at, team)
    if features is None:
        return None
    suspects = find_suspects(features, looked_at.targets, looked_at.chosen, job.labels, seed)
    listed = [asdict(one) for one in suspects[:LISTED]]
    if job.config.output.report_text:
        add_texts(job, listed, rows.data)
    name_rows(listed, rows.data)
    found = {"rows": len(looked_at), "found": len(suspects), "listed": listed}
    job.folder.replace(SUSPECTS_NAME, json.dumps(found).encode())
    say(
        f"label noise: {len(suspects):,} of {len(looked_at):,} training rows look mislabelled; report.html lists the clearest"
    )
    return found


def name_rows(listed: list[dict[str, Any]], data: LabelledSet) -> None:
    """Say of each `row` that is listed, a number in a mapped set, in which `shard` it is, and its number there, as dead letters do."""
    for one in listed:
        one |= data.place_of(one["row"])


def by_shard(places: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Places of rows, shard by shard."""
    order = sorted(places, key=lambda one: (str(one["shard"]), one["row"]))
    return ((shard, list(ones)) for shard, ones in itertools.groupby(order, key=lambda one: str(one["shard"])))


def evaluated(fit: Fit, number: int, metrics: dict[str, Any]) -> Subset:
    """The rows that a task's errors are of: those of its test set, or without one of its validation set."""
    return fit.sets_of[number]["valid" if metrics["test"] is None else "test"]


def add_texts(job: Job, listed: list[dict[str, Any]], data: LabelledSet) -> None:
    """Add the text of each `row` that is listed, as the model reads it."""
    model, trust = job.config.model, job.config.model.trust
    tokenizer = load_tokenizer(fetch(job.base, trust), job.max_length, trust.code, model.truncation, model.windows)
    for one in listed:
        one["text"] = tokenizer.text_of(data.ids_of(one["row"]))


def find_errors(fit: Fit, number: int, decision: Decision, name: str, logits: FloatArray) -> list[dict[str, Any]]:
    """The worst errors on the rows of a task's set, with their texts, as the model reads them, if the configuration allows it."""
    job, rows = fit.job, fit.sets_of[number][name]
    errors = worst_errors(rows.targets, logits, decision, job.tasks[number].index.labels)
    for one in errors:
        one["row"] = int(rows.chosen[one["row"]])
    if job.config.output.report_text:
        add_texts(job, errors, rows.data)
    return errors


def explain_errors(fit: Fit, number: int, metrics: dict[str, Any], card: Card, folder: str) -> str | None:
    """Add to a task's worst errors whose texts are shown where their answers come from, by the model in `folder`.

    Returns why that was not done for all of them, if so, and warns: nothing of it ends a run that has been trained.
    """
    job, model, errors = fit.job, fit.job.config.model, metrics["errors"]
    rows = evaluated(fit, number, metrics)
    head, place = slices_of(job.heads)[number]
    if not job.config.output.report_text or not errors:
        return None
    try:
        check_captum("marking the words that the worst errors come from")
        base, trust = fetch(job.base, model.trust), model.trust
        tokenizer = load_tokenizer(base, job.max_length, trust.code, model.truncation, model.windows)
        own, classifier = card.alone(head.name) if card.several else card, load_classifier(folder, trust)
        explainer = new_explainer(classifier, tokenizer, own, job.pad_token_id, fit.team.device, place)
        done = explain_rows(explainer, rows.data, errors, EXPLAINED_STEPS, EXPLAINED_SECONDS)
    except UsageError as error:
        failure = str(error)
    except Exception as error:  # noqa: BLE001 - a report is no reason to lose what was learned
        failure = f"{type(error).__name__}: {error}"
    else:
        if done == len(errors):
            return None
        failure = f"{done} of {len(errors)} were explained in {EXPLAINED_SECONDS:.0f} s"
    say(f"WARNING: the words that the worst errors come from are not all marked in the report: {failure}")
    return failure


def find_committed(output: Store, config: TrainConfig, run_id: str) -> dict[str, Any] | None:
    """What `metrics.json` of a checkpoint that this very run committed holds, or None if there is no checkpoint.

    Raises `UsageError` if the checkpoint there is another run's.
    """
    if output.info(COMMIT_NAME) is None:
        return None
    raw = output.read(CARD_NAME)
    trained = Card.model_validate_json(raw).trained if raw else {}
    if trained.get("run_id") != run_id or trained.get("config") != deciding(config):
        same = trained.get("run_id") == run_id
        raise UsageError(
            f"output.path {output.url}: holds the checkpoint of run {trained.get('run_id', 'unknown')!r}"
            f"{' with another configuration' if same else ''}, this is run {run_id!r}; a committed checkpoint is never"
            " changed: give this run another output.path"
        )
    return json.loads(output.read(METRICS_NAME) or b"{}")


def deciding(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON, without credentials, and what decides no result: a run may go on with other workers."""
    found: dict[str, Any] = json.loads(masked(config.model_dump_json(exclude={"resources", "tracking"})))
    return found
