"""Classifying: a classifier in training: its labelled sets, what is wrong with their rows, its model, and what validation says of it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from transformers import PreTrainedModel

from lib.augmentation import new_augmenter
from lib.batching import IntArray, epoch_batches, sample_rows
from lib.calibration import Decision, FloatArray
from lib.checkpoint import fetch
from lib.contrastive import head_of, tune
from lib.errors import UsageError, say
from lib.fitting import Fit, Job
from lib.label_noise import LISTED, find_suspects, rows_to_look_at
from lib.labelled import SETS, LabelledIndex
from lib.learning import Learner, Team, features_of_rows
from lib.loss import Objective, SeveralObjectives
from lib.mapped import LabelledSet, Subset, known_rows, map_set, split_rows, without_known
from lib.metrics import summarize
from lib.model import new_classifier
from lib.schema import Head, label_name, slices_of, task_of
from lib.storage import Store
from lib.tokenization import load_tokenizer
from lib.train_config import TrainConfig
from lib.tuning import add_adapters, compile_passes, freeze, recompute_layers

SUSPECTS_NAME = "label_noise.json"

MAX_KNOWN = 0.001
"""The part of a set that may be known from training, or of the test rows from validation, if duplicates are refused."""

TEACHERS = {
    "train": ("training", "and may be known by heart"),
    "valid": ("validation", "by which the checkpoint is chosen"),
}
"""Sets that later ones should share no text with, what they are called, and what comes of it."""


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
class ClassifierJob(Job):
    """What a worker is told of a classifier."""

    config: TrainConfig
    replacing: str
    """augment.model, made absolute; without one base"""
    tasks: tuple[TaskJob, ...]
    """one, or one for each head"""

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


def open_sets(job: ClassifierJob, task: TaskJob) -> dict[str, Subset]:
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
        if not len(parts[1]):
            raise UsageError(
                f"valid.fraction = {job.config.valid.fraction}: of {len(train):,} rows none can be set aside, for no label has two; give"
                ' more rows or a valid.path, or set valid.fraction = 0 with stopping.keep = "last"'
            )
        sets["train"], sets["valid"] = (Subset(train, part) for part in parts)
    return sets


def mix_sets(several: Sequence[dict[str, Subset]]) -> dict[str, Subset]:
    """The sets of all tasks as one of each kind: the rows of one task after those of the other. A task without one has no rows in it."""
    if len(several) == 1:
        return several[0]
    found = {}
    for name in SETS:
        parts = [sets[name] for sets in several if name in sets]
        if parts:
            starts = np.cumsum([0, *(len(part.data) for part in parts)])
            chosen = [start + part.chosen for start, part in zip(starts[:-1], parts, strict=True)]
            found[name] = Subset(LabelledSet.mix([part.data for part in parts]), np.concatenate(chosen))
    return found


def check_duplicates(
    sets: dict[str, Subset], config: TrainConfig, rank: int
) -> tuple[dict[str, Subset], dict[str, dict[str, int]]]:
    """Count rows whose text a set before theirs has taught, and do what `data.duplicates` says.

    Returns the sets, and what was counted: of the rows known from "train" those of each other set, of the rows known from "valid"
    those of "test". Raises `UsageError` if they are to be refused, or if leaving them out would leave nothing.
    """
    known: dict[str, dict[str, int]] = {}
    is_one = sets["valid"] is sets["train"]
    for teacher, (what, use) in TEACHERS.items():
        if is_one and teacher == "valid":
            known[teacher] = known["train"]
            continue
        others = {
            name: one for name, one in sets.items() if name not in ("train", teacher) and one is not sets["train"]
        }
        left, known[teacher] = look_for_known(sets[teacher], others, what, use, config, rank)
        sets = sets | dict.fromkeys(("train", "valid") if is_one else (teacher,), left)
    return sets, known


def check_tasks_apart(
    several: Mapping[str, dict[str, Subset]], config: TrainConfig, rank: int
) -> tuple[dict[str, dict[str, Subset]], dict[str, dict[str, dict[str, int]]]]:
    """The same between tasks: what one learns from, and another one is evaluated on.

    Returns each task's sets, and of each the rows of its other sets that other tasks learn from: task, set, count.
    """
    found, known = dict(several), {name: dict[str, dict[str, int]]() for name in several}
    for teacher, sets in several.items():
        places = {
            f"tasks.{task}.{name}": (task, name)
            for task, others in several.items()
            for name in ("valid", "test")
            if task != teacher and name in others
        }
        others = {place: several[task][name] for place, (task, name) in places.items()}
        what, use = f"tasks.{teacher} training", TEACHERS["train"][1]
        left, counts = look_for_known(sets["train"], others, what, use, config, rank)
        found[teacher] = sets | {"train": left}
        for place, (task, name) in places.items():
            known[task].setdefault(teacher, {})[name] = counts[place]
    return found, known


def look_for_known(
    learned: Subset, others: Mapping[str, Subset], what: str, use: str, config: TrainConfig, rank: int
) -> tuple[Subset, dict[str, int]]:
    """Count rows of other sets that have a text of the rows that are learned from, and do what `data.duplicates` says.

    Returns what may be learned from. `what` those rows are, and the `use` of the others that suffers, is for messages.
    """
    known = known_rows(learned, others)
    shown = ", ".join(f"{count:,} of {len(others[name]):,} {name} rows" for name, count in known.items() if count)
    if not shown:
        return learned, known
    shown += f" have the text of a {what} row"
    if config.data.duplicates == "refuse":
        if any(count > MAX_KNOWN * len(others[name]) for name, count in known.items()):
            raise UsageError(
                f'data.duplicates = "refuse": {shown}, expected at most {MAX_KNOWN:.1%}; remove them, or set'
                f' data.duplicates = "drop" to leave them out of {what}'
            )
    elif config.data.duplicates == "drop":
        left = without_known(learned, others)
        if not len(left):
            raise UsageError(f'data.duplicates = "drop": {shown}, and no {what} row is left without them')
        if rank == 0:
            say(f"{shown}: {len(learned) - len(left):,} {what} rows are left out")
        return left, known
    if rank == 0:
        say(f"WARNING: {shown}, {use} (data.duplicates)")
    return learned, known


def new_model(job: ClassifierJob) -> PreTrainedModel:
    """The model as it is before training, the same on every worker."""
    config, trust = job.config, job.config.model.trust
    base = fetch(job.base, trust)
    model = new_classifier(
        base, job.labels, task_of(job.heads), config.model.dropout, config.optim.seed, trust, head_of(config)
    )
    freeze(model, config)
    add_adapters(model, config.lora)
    return model


class ClassifierFit(Fit):
    """One attempt at fine-tuning a classifier, on one worker."""

    job: ClassifierJob
    sets: dict[str, Subset]
    learner: Learner

    def __init__(self, job: ClassifierJob, team: Team) -> None:
        checked = [check_duplicates(open_sets(job, task), job.config, team.rank) for task in job.tasks]
        own = {task.name: sets for task, (sets, _) in zip(job.tasks, checked, strict=True)}
        apart, self.known_from_tasks = check_tasks_apart(own, job.config, team.rank)
        """of each task, by the other task that learns from them, how many rows of each set"""
        self.sets_of = list(apart.values())
        """each task's own rows"""
        self.known = [known for _, known in checked]
        """of each task, by the set that they are known from, how many rows of each other set"""
        sets, optim = mix_sets(self.sets_of), job.config.optim
        steps_per_epoch = math.ceil(len(sets["train"]) / optim.batch_size)
        model: Any = new_model(job)
        if job.config.model.gradient_checkpointing:
            recompute_layers(model)
        if job.config.model.compile:
            compile_passes(model)
        self.suspects = look_for_label_noise(job, model.to(team.device), sets["train"], team)
        epochs = optim.epochs if job.config.contrastive.iterations is None else 0
        augmenter = new_augmenter(job.config, job.base, job.replacing, job.max_length, team.device)
        seen_at = None if augmenter is None else augmenter.rows_of
        learner = Learner(model.to(team.device), optim, job.objective, team, steps_per_epoch * epochs, seen_at)
        super().__init__(job, team, sets, learner, steps_per_epoch)

    def new_model(self) -> PreTrainedModel:
        """The model as it is before training, the same on every worker."""
        return new_model(self.job)

    def run(self) -> None:
        """Train to the end or until stopping is due, and leave the best weights in the model of every worker."""
        if self.job.config.contrastive.iterations is not None and not self.progress.history:
            self.tune_on_pairs()
        super().run()

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


def look_for_label_noise(job: ClassifierJob, model: PreTrainedModel, rows: Subset, team: Team) -> dict[str, Any] | None:
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


def add_texts(job: ClassifierJob, listed: list[dict[str, Any]], data: LabelledSet) -> None:
    """Add the text of each `row` that is listed, as the model reads it."""
    model, trust = job.config.model, job.config.model.trust
    tokenizer = load_tokenizer(fetch(job.base, trust), job.max_length, trust.code, model.truncation, model.windows)
    for one in listed:
        one["text"] = tokenizer.text_of(data.ids_of(one["row"]))


def name_rows(listed: list[dict[str, Any]], data: LabelledSet) -> None:
    """Say of each `row` that is listed, a number in a mapped set, in which `shard` it is, and its number there, as dead letters do."""
    for one in listed:
        one |= data.place_of(one["row"])
