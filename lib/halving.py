"""Successive halving: trials run by Ray Tune, and ended by it where others were better (Li et al. 2018, arXiv 1810.05934).

A trial is looked at after the same parts of its own steps as every other, so that one of two epochs is compared with one of six where
both are as far in their schedules. What is over is a file; trials that are over already are told to the scheduler again.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import ray
from ray import tune
from ray.exceptions import OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lib.errors import IncompleteError, StoppedError, TextsweepError, at_work
from lib.failures import chain_of
from lib.mapped import local_copy
from lib.space import SearchSection, point_text
from lib.storage import Store
from lib.trial import WHOLE, Record, TrialPlan, run_trial

TRIALS_FOLDER = "trials"

MAX_FAILURES = 1
"""Of a trial's process or of storage, after which it is run again."""

STOP_SECONDS = 15.0
"""For Ray Tune to end what it runs, of the 30 that a job has."""

RAY_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # each trial is a file of ours
    "RAY_AIR_NEW_OUTPUT": "0",  # a line of ours for each trial
}


def percents_of(section: SearchSection) -> tuple[float, ...]:
    """After which percent of its steps a trial is looked at: the rungs of successive halving (Li et al. 2018)."""
    percents, percent = [], WHOLE * section.grace
    while percent < WHOLE and section.stopping == "asha":
        percents.append(percent)
        percent *= section.reduction
    return tuple(percents)


def read_records(folder: Store) -> dict[int, Record]:
    """The trials that are over."""
    names = [path for path in folder.list(TRIALS_FOLDER)["path"].to_pylist() if path.endswith(".json")]
    found = [Record.model_validate_json(folder.read(name) or b"") for name in names]
    return {one.number: one for one in found}


class Recorder(tune.Callback):
    """Writes a file and says a line for each trial that is over."""

    def __init__(self, folder: Store, metric: str, num_trials: int, known: dict[int, Record]) -> None:
        self.folder = folder
        self.metric = metric
        self.num_trials = num_trials
        self.records = dict(known)
        self.failure: TextsweepError | None = None
        """of the storage; raised at the end, since Ray Tune takes what is raised when a trial is over for the trial's"""
        self.is_stopped = False

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """End the whole search, and its trials, if that was asked for. Several times a second.

        Ray Tune ends its trials for an `Exception`, which `StoppedError` is not.
        """
        if self.is_stopped:
            raise IncompleteError("the search was asked to stop")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Keep what the trial said last."""
        record = Record.model_validate_json(trial.last_result["record"])
        if record.number in self.records:
            return
        try:
            self.folder.replace(f"{TRIALS_FOLDER}/{record.number:05d}.json", record.model_dump_json().encode())
        except TextsweepError as error:
            self.failure = error
            return
        self.records[record.number] = record
        print(f"[{len(self.records)}/{self.num_trials}] {record_text(record, self.metric)}", flush=True)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Say that it begins anew."""
        print(f"trial {trial.config['number']}: its process or storage failed; it is run once more", flush=True)


def record_text(record: Record, metric: str) -> str:
    """What came out of a trial, in one line."""
    value = "" if record.value is None else f"{metric} {record.value:.4f}"
    said = {
        "done": value,
        "stopped": f"{value} after {record.step} of {record.steps} steps, not among the best there, ended",
        "failed": f"failed: {record.reason}",
    }[record.status]
    return f"trial {record.number}: {said}; {point_text(record.point)}; {record.seconds:.0f} s"


def run_trials(section: SearchSection, plan: TrialPlan, folder: Store, cpus: int, concurrent: int) -> dict[int, Record]:
    """Run the trials that are not over. Raises `IncompleteError` if some could not be run; those that were are kept."""
    numbers = list(plan.jobs)
    metric = plan.jobs[numbers[0]].metric
    recorder = Recorder(folder, metric, len(numbers), plan.known)
    todo = [number for number in numbers if number not in plan.known]
    if todo:
        again = [number for number, one in plan.known.items() if one.looks or one.status == "done"]
        numbers = [*sorted(again), *todo]
        errors = run_stoppably(recorder, lambda: tune_trials(section, plan, recorder, numbers, cpus, concurrent))
        if recorder.failure is not None:
            with at_work():
                raise recorder.failure
        missing = [number for number in todo if number not in recorder.records]
        if missing:
            explain_missing(missing, errors)
    return recorder.records


def run_stoppably(recorder: Recorder, function: Callable[[], list[Exception]]) -> list[Exception]:
    """Let Ray Tune run in a thread of its own, so that a signal reaches the main one; it ends its trials before Ray is left.

    Ray 2.60 starts another Ray for a call that finds none.
    """
    executor = ThreadPoolExecutor(max_workers=1)
    future = executor.submit(function)
    try:
        return future.result()
    except StoppedError:
        recorder.is_stopped = True
        wait([future], timeout=STOP_SECONDS)
        raise
    finally:
        executor.shutdown(wait=False)


def tune_trials(
    section: SearchSection, plan: TrialPlan, recorder: Recorder, numbers: list[int], cpus: int, concurrent: int
) -> list[Exception]:
    """Let Ray Tune run trials by their numbers; returns the errors of those that failed more than `MAX_FAILURES` times.

    What is not of a trial's process comes from Ray Tune as text.
    """
    os.environ |= {name: os.environ.get(name, value) for name, value in RAY_TUNE_SETTINGS.items()}
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what fails is said in a line of ours
    resources: dict[str, float] = {"CPU": cpus, **({"GPU": 1} if plan.use_gpu else {})}
    with (
        tempfile.TemporaryDirectory() as scratch
    ):  # what Ray Tune keeps is not needed: every trial that is over is a file of ours
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, plan=plan), resources),
            param_space={"number": tune.grid_search(numbers)},
            tune_config=tune.TuneConfig(
                metric="value",
                mode="min" if recorder.metric == "loss" else "max",
                scheduler=scheduler_of(section),
                max_concurrent_trials=concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                callbacks=[recorder],
            ),
        )
        return [one if isinstance(one, Exception) else RuntimeError(one) for one in tuner.fit().errors]


def scheduler_of(section: SearchSection) -> TrialScheduler:
    """What decides whether a trial goes on after a look."""
    if section.stopping == "none":
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="percent",
        max_t=int(WHOLE),
        grace_period=WHOLE * section.grace,  # type: ignore[arg-type]
        reduction_factor=section.reduction,
    )


def clear_copies(stores: Sequence[Store]) -> None:
    """Remove what each node has copied of tokenized rows in S3."""

    def clear() -> None:
        for store in stores:
            shutil.rmtree(local_copy(store), ignore_errors=True)

    task = ray.remote(num_cpus=0)(clear)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    ray.get(
        [task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(one, soft=True)).remote() for one in nodes]
    )


def explain_missing(missing: list[int], errors: list[Exception]) -> None:
    """Raise what a person can act on for trials that could not be run, or what looks like a bug as it is."""
    shown_numbers = ", ".join(map(str, missing))
    for error in errors:
        causes = chain_of(error)
        found = next((one for one in causes if isinstance(one, IncompleteError)), None)
        if found is None and not any(
            isinstance(one, (RayActorError, WorkerCrashedError, OutOfMemoryError)) for one in causes
        ):
            raise error
    first = str(errors[0]).strip().splitlines()[-1] if errors else "Ray Tune says nothing of them"
    raise IncompleteError(
        f"trials {shown_numbers} failed {MAX_FAILURES + 1} times ({first}); run the same command again, the others are kept"
    )
