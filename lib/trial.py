"""One trial of a search: a training of one configuration in one process, which is looked at on the validation rows as it learns.

It is what a worker of `jobs.train` does, without what a trial has no use for: checkpoints, test rows, a model folder. Knows Ray Tune's
worker side; the process may run several trials, one after the other.
"""

import contextlib
import gc
import io
import math
import os
import time
from dataclasses import dataclass
from typing import Any, Literal

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # read when torch is loaded; Ray Tune gives trials no environment of their own

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from ray import tune

from lib.checkpoint import fetch
from lib.classifying import ClassifierFit, ClassifierJob
from lib.config import masked
from lib.errors import IncompleteError, UsageError, at_work
from lib.learning import Team
from lib.mapped import local_paths
from lib.metrics import steps_to_keep
from lib.model import choose_dtype
from lib.space import Point

WHOLE = 100.0
"""Percent of a trial's steps."""


class Look(BaseModel):
    """What the validation rows said in the middle of a trial."""

    model_config = ConfigDict(frozen=True)

    percent: float
    """of its steps"""
    step: int
    value: float | None
    """None: no finite number"""


class Record(BaseModel):
    """What is known of a trial at its end; kept as JSON, so that it is not run again."""

    model_config = ConfigDict(frozen=True)

    number: int
    """1: the configuration as it was given"""
    point: Point
    status: Literal["done", "stopped", "failed"]
    value: float | None
    """of the metric that compares trials; of one that was stopped at its last look"""
    step: int
    steps: int
    """it would have made, or has"""
    seconds: float
    looks: list[Look]
    history: list[dict[str, float | None]]
    """its evaluations, as in metrics.json; None: no finite number"""
    reason: str | None = None
    """why it failed"""


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """What every trial's process is told."""

    jobs: dict[int, ClassifierJob]
    points: dict[int, Point]
    percents: tuple[float, ...]
    """of a trial's steps, after which it is looked at"""
    known: dict[int, Record]
    """trials that an earlier execution has finished: what was seen of them is told to the scheduler again"""
    use_gpu: bool


class TrialFit(ClassifierFit):
    """A training that is looked at, and keeps no weights but those it is to average."""

    def __init__(self, number: int, plan: TrialPlan, team: Team) -> None:
        job = plan.jobs[number]
        with contextlib.redirect_stderr(
            io.StringIO()
        ):  # rows known from training: the winner's training says so once more
            super().__init__(job, team)
        self.number = number
        self.point = plan.points[number]
        total = self.learner.total_steps
        self.due = {math.ceil(total * percent / WHOLE): percent for percent in plan.percents if total}
        self.looks: list[Look] = []

    def after_step(self) -> None:
        """Look at it if that is due. Ends the thread, by `SystemExit`, if it is not to go on."""
        step, history = self.progress.step, self.progress.history
        percent = self.due.get(step)
        if percent is None or step == self.learner.total_steps or self.progress.stopped:
            return
        if history and history[-1]["step"] == step:
            seen = history[-1]
        elif int(self.learner.bad_step) >= 0:
            self.assess()  # which says so, and stops
            return
        else:
            logits = self.learner.evaluate(self.sets["valid"])
            assert logits is not None, "a trial is one worker"
            seen = self.summary(logits)
        value = finite(seen[self.job.metric])
        self.looks.append(Look(percent=percent, step=step, value=value))
        tell(self.record("stopped", value), percent)

    def print_evaluation(self, entry: dict[str, float]) -> None:
        """Nothing: the search says a line for each trial."""

    def keep(self) -> None:
        """Say which evaluations are best; their weights are of use only where they are averaged."""
        if self.job.config.stopping.average > 1:
            super().keep()
        else:
            self.progress.kept = steps_to_keep(self.progress.history, self.job.config.stopping, self.job.metric)

    def save(self) -> None:
        """Nothing: a trial that is lost begins anew."""

    def resume(self) -> None:
        """Nothing."""

    def restore_kept(self) -> None:
        """Only where weights are averaged there is something to evaluate."""
        if len(self.progress.kept) > 1:
            super().restore_kept()

    def result(self) -> Record:
        """What came out of a trial that was not stopped."""
        progress = self.progress
        if progress.failure is not None or not progress.kept:
            return self.record("failed", None, progress.failure or "no evaluation gave a finite number")
        best = next(entry for entry in progress.history if entry["step"] == progress.kept[0])
        if len(progress.kept) > 1:
            logits = self.learner.evaluate(self.sets["valid"])
            assert logits is not None, "a trial is one worker"
            best = self.validation(logits)
        value = finite(best[self.job.metric])
        if value is None:
            return self.record("failed", None, "no evaluation gave a finite number")
        if self.tracker is not None:
            self.tracker.end({"best": best}, progress.step)
        return self.record("done", value)

    def record(
        self, status: Literal["done", "stopped", "failed"], value: float | None, reason: str | None = None
    ) -> Record:
        """What is known now."""
        return Record(
            number=self.number,
            point=self.point,
            status=status,
            value=value,
            step=self.progress.step,
            steps=max(self.learner.total_steps, self.progress.step),
            seconds=round(time.monotonic() - self.begun, 3),
            looks=list(self.looks),
            history=[{name: finite(one) for name, one in entry.items()} for entry in self.progress.history],
            reason=reason,
        )


def run_trial(config: dict[str, Any], plan: TrialPlan) -> None:
    """What Ray Tune runs for trial `number`.

    What is wrong with the configuration is a trial that failed, and is kept as one. What is wrong with this node or the storage is
    raised, and Ray Tune's to try again.
    """
    number = config["number"]
    if number in plan.known:
        tell_again(plan.known[number])
        return
    begun, job = time.monotonic(), plan.jobs[number]
    bring(job)
    try:
        with at_work():
            fit = TrialFit(number, plan, alone(job, plan.use_gpu))
            try:
                fit.run()
                found = fit.result()
            except SystemExit:
                if fit.tracker is not None:
                    fit.tracker.end({}, fit.progress.step)
                raise
    except (UsageError, torch.cuda.OutOfMemoryError) as error:
        reason = masked(str(error).splitlines()[0])
        if isinstance(error, torch.cuda.OutOfMemoryError):
            reason = f"out of GPU memory ({reason}); raise optim.accumulation_steps"
        found = Record(
            number=number, point=plan.points[number], status="failed", value=None, step=0, steps=0,
            seconds=round(time.monotonic() - begun, 3), looks=[], history=[], reason=reason,
        )  # fmt: skip
    fit = None  # type: ignore[assignment]
    gc.collect()
    if plan.use_gpu:
        torch.cuda.empty_cache()
    tell(found, WHOLE)


def bring(job: ClassifierJob) -> None:
    """Bring a trial's models and rows to this machine. Raises `IncompleteError`: the search has seen all of them before."""
    try:
        for url in dict.fromkeys((job.base, job.replacing)):
            fetch(url, job.config.model.trust)
        for task in job.tasks:
            for files in task.index.files.values():
                local_paths(task.data, files)
    except UsageError as error:
        raise IncompleteError(
            f"{error}; it was there when the search began: every node must see it, run the same command again"
        ) from error


def finite(value: float) -> float | None:
    """A number as JSON knows it."""
    return value if math.isfinite(value) else None


def tell(record: Record, percent: float) -> None:
    """Report to Ray Tune, and wait for what its scheduler says to it: `SystemExit` ends the trial."""
    value = math.nan if record.value is None else record.value
    tune.report({"percent": percent, "value": value, "record": record.model_dump_json()})


def tell_again(record: Record) -> None:
    """Report what was seen of a trial that is over, so that the scheduler compares new ones with it."""
    for look in record.looks:
        tell(record.model_copy(update={"value": look.value}), look.percent)
    if record.status != "stopped":
        tell(record, WHOLE)


def alone(job: ClassifierJob, use_gpu: bool) -> Team:
    """The team of one worker, on this process's GPU or on its share of the processors."""
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch.set_num_threads(min(job.cpus_per_worker, os.cpu_count() or 1))
    device = torch.device("cuda:0" if use_gpu else "cpu")
    return Team(rank=0, size=1, device=device, dtype=choose_dtype(job.config.model.precision, device))
