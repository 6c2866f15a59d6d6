"""Fitting: what every worker of a training run does, whatever is learned: steps, evaluations, what is kept, where it goes on.

Which rows a step sees and in which order is decided by (seed, step) alone, so a run that was killed goes on exactly where
its last evaluation left it. Knows Ray Train's worker side, not the cluster.
"""

import contextlib
import logging
import math
import os
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from lib.batching import IntArray, evaluation_places
from lib.calibration import FloatArray
from lib.committing import find_committed, provenance
from lib.learning import Stepper, Team
from lib.mapped import Selection, local_copy, places_text
from lib.metrics import is_better, shown, steps_to_keep
from lib.model import choose_dtype
from lib.pretrain_config import FitConfig
from lib.sharding import Weights, broadcast_weights, copy_weights, load_optimizer, load_weights, mean_of, whole_state
from lib.states import STATE_NAME, find_whole, read_state
from lib.storage import Store
from lib.tracking import Places, Tracker, about_run

PROGRESS_SECONDS = 5.0


SHOWN_ROWS = 8
"""Of a batch, in a message."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told."""

    config: FitConfig
    run_id: str
    base: str
    """model.base, made absolute: Ray Train moves workers to another working directory"""
    max_length: int
    pad_token_id: int
    metric: str
    """which chooses the checkpoint"""
    output: Store
    folder: Store
    """of this run: tokenized data and Ray Train's checkpoints; removed at the end"""
    cpus_per_worker: int
    tracking: Places | None


@dataclass
class Progress:
    """How far a run is; plain types, saved with every evaluation by the first worker, the same on all but for `spent`."""

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
    spent: dict[str, float] = field(default_factory=dict)
    """this worker's seconds by what they went for: steps, reading rows (a part of these), evaluation, saving"""


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


JobT = TypeVar("JobT", bound=Job)
FitT = TypeVar("FitT", bound="Fit")


class Fit(ABC):
    """One attempt at a run, on one worker. What is learned, and what evaluations mean, a subclass says."""

    def __init__(
        self, job: Job, team: Team, sets: Mapping[str, Selection], learner: Stepper, steps_per_epoch: int
    ) -> None:
        """Of the sets `train` and `valid` are looked at."""
        self.job = job
        self.team = team
        self.sets = sets
        self.learner = learner
        self.steps_per_epoch = steps_per_epoch
        self.progress = Progress()
        self.kept: dict[int, Weights] = {}
        """by step, on rank 0"""
        self.resume()
        self.tracker: Tracker | None = None
        if team.rank == 0 and job.tracking is not None:
            about = about_run(job.run_id, job.output, job.config)
            self.tracker = Tracker(job.tracking, about, self.progress.step)
        self.begun = time.monotonic() - self.progress.seconds
        self.printed = (time.monotonic(), self.progress.step)

    @abstractmethod
    def batches_of(self, epoch: int) -> list[IntArray]:
        """The places in the training set of each batch of an epoch."""

    @abstractmethod
    def summary(self, found: FloatArray) -> dict[str, float]:
        """The few numbers that validation gives, from what `Stepper.evaluate` found."""

    @abstractmethod
    def new_model(self) -> PreTrainedModel:
        """The model as it is before training, the same on every worker."""

    def run(self) -> None:
        """Train to the end or until stopping is due, and leave the best weights in the model of every worker."""
        config, learner, progress, train = self.job.config, self.learner, self.progress, self.sets["train"]
        places = evaluation_places(self.steps_per_epoch, config.stopping.evaluations_per_epoch)
        loaded, batches = -1, []
        while progress.step < learner.total_steps and not progress.stopped:
            epoch, place = divmod(progress.step, self.steps_per_epoch)
            if epoch != loaded:
                loaded, batches = epoch, self.batches_of(epoch)
                learner.begin_epoch(epoch)
            before = float(train.data.read_seconds[0])
            with self.spending("steps"):
                learner.step(progress.step, train.data, train.chosen[batches[place]])
            progress.spent["reading"] = progress.spent.get("reading", 0) + float(train.data.read_seconds[0]) - before
            progress.step += 1
            if place + 1 in places:
                with self.spending("evaluation"):
                    self.assess()
                with self.spending("saving"):
                    self.save()
                self.printed = (time.monotonic(), progress.step)  # an evaluation is no part of the steps' speed
            self.after_step()
        if progress.failure is None:
            self.restore_kept()

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Add the seconds of a block to what was spent. On GPUs a step is waited for where its result is looked at."""
        begun = time.monotonic()
        yield
        self.progress.spent[what] = self.progress.spent.get(what, 0) + time.monotonic() - begun

    def after_step(self) -> None:
        """What follows each optimizer step, and its evaluation where there is one."""
        self.print_progress()

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
        shown = places_text([train.data.place_of(int(row)) for row in rows[:SHOWN_ROWS]])
        more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        return (
            f"the training loss is no finite number from step {step + 1} (epoch {epoch + 1}) on; its batch were the training rows"
            f" {shown}{more}"
        )

    def print_progress(self) -> None:
        """On rank 0, every few seconds."""
        now, (last, last_step) = time.monotonic(), self.printed
        if self.team.rank or now - last < PROGRESS_SECONDS or self.progress.step == last_step:
            return
        progress, total, steps = self.progress, self.learner.total_steps, self.progress.step - last_step
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
        """Go on from the last checkpoint that Ray Train committed, if there is one that can be read."""
        committed = [] if ray.train.get_checkpoint() is None else ray.train.get_all_reported_checkpoints()
        states = [one.checkpoint for one in reversed(committed)]
        state, place = find_whole(states) if self.team.rank == 0 else (None, None)
        place = self.team.broadcast(place)
        if place is None:
            return
        state = state or read_state(states[place])
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

    def run_record(self, best: dict[str, float]) -> dict[str, Any]:
        """What `metrics.json` says of the run itself."""
        progress = self.progress
        return {
            "run_id": self.job.run_id,
            "seconds": progress.seconds,
            "metric": self.job.metric,
            "best": best,
            "averaged_steps": progress.kept if len(progress.kept) > 1 else None,
            "resumed_after": progress.resumed_after,
            "spent_seconds": {name: round(one, 3) for name, one in progress.spent.items()},
            "history": progress.history,
        }

    def provenance(self, data: str) -> dict[str, Any]:
        """How the checkpoint was made, for its card; `data`: fingerprint of the files that were learned from."""
        return provenance(self.job.config, self.job.run_id) | {
            "seed": self.job.config.optim.seed,
            "data": data,
            "rows": {name: len(one) for name, one in self.sets.items()},
            "precision": str(self.team.dtype).removeprefix("torch."),
            "workers": self.team.size,
        }

    def end(self, best: dict[str, float], **tested: Any) -> None:
        """Say, here and where the run is shown, that the model is committed, with its validation and perhaps other metrics."""
        kept = self.progress.kept
        if self.tracker is not None:
            self.tracker.end({"best": best, **tested}, self.progress.step)
        steps = f"step {kept[0]}" if len(kept) == 1 else f"steps {kept}, averaged,"
        print(f"committed the weights of {steps} to {self.job.output.url}", flush=True)

    def restore_kept(self) -> None:
        """Make the weights that rank 0 keeps, or the mean of several, every worker's candidate."""
        kept = mean_of(list(self.kept.values())) if self.team.rank == 0 else None
        broadcast_weights(self.learner.candidate, kept)

    def trained_model(self) -> PreTrainedModel:
        """On rank 0, at the end: the model that is committed, whole and on its own."""
        if not self.team.sharded:
            return self.learner.candidate
        model = self.new_model()
        load_weights(model, mean_of(list(self.kept.values())))
        return model


def run_worker(
    job: JobT, new_fit: Callable[[JobT, Team], FitT], conclude: Callable[[FitT], None], data: Sequence[Store]
) -> str | None:
    """What each worker runs: train, then `conclude`, which all of them call and which commits what was learned.

    `data`: tokenized rows, whose copies on this node go at the end. Returns why the run is hopeless, if it is.
    """
    team = join_team(job)
    done = team.rank == 0 and find_committed(job.output, job.config, job.run_id) is not None
    if team.broadcast(done):  # killed between the commit and the end
        return None
    fit = new_fit(job, team)
    fit.run()
    if fit.progress.failure is None:
        conclude(fit)
    dist.barrier(group=team.control)
    if not job.folder.is_local and ray.train.get_context().get_local_rank() == 0:
        for store in data:
            shutil.rmtree(local_copy(store), ignore_errors=True)
    return fit.progress.failure
