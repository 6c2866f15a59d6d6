"""Tracking: a run shown in MLflow and TensorBoard while it learns. The only module that knows these libraries.

A tracker decides nothing: what goes wrong with one in mid-run is said once, and training goes on.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lib.config import masked
from lib.errors import UsageError, say
from lib.pretrain_config import FitConfig
from lib.storage import Store, open_store

Entry = dict[str, float]
"""One evaluation, as `metrics.json` has it."""

OF_TRAINING = (
    "train_loss",
    "grad_norm",
    "skipped_steps",
    "loss_scale",
    "epoch",
    "seconds",
    "workers",
    "rows_per_second",
)
"""What of an entry is shown as train/...; the rest is valid/..."""

LAST_WRITTEN = "train/loss"
"""Of an evaluation, so that whoever finds it finds all of it."""

MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it tells its makers how it is used, and keeps an id in the home folder
    "MLFLOW_ALLOW_FILE_STORE": "true",  # a folder of files is "in maintenance mode", and needs no database
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # a server that does not answer holds up an evaluation for so many seconds,
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # twice; as MLflow ships 120 s, eight times
}

RUN_TAG, OUTPUT_TAG = "textsweep.run_id", "textsweep.output"
"""Which run of MLflow is this one: a run id alone may be the date of an orchestrator, which many have."""

MAX_BATCH = 100
"""Parameters that MLflow takes at once."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a run is shown."""

    mlflow: str | None
    """a tracking server, or a folder"""
    experiment: str
    tensorboard: Store | None
    """the folder of all runs"""

    def __str__(self) -> str:
        shown = [f"MLflow at {masked(self.mlflow)}, experiment {self.experiment!r}"] if self.mlflow else []
        shown += [f"tensorboard --logdir {self.tensorboard.url}"] if self.tensorboard else []
        return "; ".join(shown)


@dataclass(frozen=True, kw_only=True)
class About:
    """What the trackers are told of a run when it begins."""

    run_id: str
    output: str
    params: dict[str, str]


def about_run(run_id: str, output: Store, config: FitConfig) -> About:
    """What is told of a run, without passwords."""
    return About(run_id=run_id, output=masked(output.url), params=params_of(config))


def find_places(config: FitConfig, output: Store, is_fresh: bool) -> Places | None:
    """Where a run is to be shown, or None. Raises `UsageError` if a library is missing or a place is none.

    Whether the server answers is asked for a fresh run alone: one that goes on does so without it.
    """
    wanted = config.tracking
    given = sorted({"uri", "path", "experiment"} & wanted.model_fields_set)
    if not wanted.to:
        if given:
            raise UsageError(
                f'tracking.{given[0]} is set, but nothing is tracked; set tracking.to = "mlflow" or "tensorboard"'
            )
        return None
    for key, tracker in (("uri", "mlflow"), ("experiment", "mlflow"), ("path", "tensorboard")):
        if key in given and tracker not in wanted.to:
            raise UsageError(
                f"tracking.{key} is where {tracker} writes, and tracking.to does not name {tracker}; add it, or leave tracking.{key} out"
            )
    uri, folder = None, None
    if "mlflow" in wanted.to:
        load_mlflow()
        uri = wanted.uri or os.environ.get("MLFLOW_TRACKING_URI") or beside(output, "mlruns")
        if uri.startswith("s3://"):
            raise UsageError(
                f"tracking.uri {masked(uri)}: MLflow keeps no runs in S3; give a server (http://host:5000) or a local folder"
            )
        uri = uri if "://" in uri else open_store(uri).url
    if "tensorboard" in wanted.to:
        load_tensorboard()
        folder = open_store(wanted.path or beside(output, "tensorboard"))
    places = Places(mlflow=uri, experiment=wanted.experiment, tensorboard=folder)
    if is_fresh:
        check(places)
    print(f"tracking: {places}", flush=True)
    return places


def beside(output: Store, name: str) -> str:
    """A folder next to the output's, so that all checkpoints of a folder are shown together."""
    parent, _, _ = output.url.rpartition("/")
    return f"{output.url if parent.endswith('/') else parent}/{name}"


def load_mlflow() -> Any:
    """MLflow's client class. Raises `UsageError` without it."""
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise UsageError(
            f"tracking.to = mlflow needs mlflow, which cannot be imported ({error}); pip install mlflow-skinny, on every node"
        ) from None
    return MlflowClient


def load_tensorboard() -> Any:
    """PyTorch's writer of event files. Not tensorboardX, which Ray Train brings: its flush does not wait for what is queued."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f"tracking.to = tensorboard needs tensorboard, which cannot be imported ({error}); pip install tensorboard, on"
            " every node"
        ) from None
    return SummaryWriter


def check(places: Places) -> None:
    """Raise `UsageError` if one of the places cannot be written to, or does not answer."""
    if places.tensorboard is not None:
        places.tensorboard.check_writable()
    if places.mlflow is not None:
        if "://" not in places.mlflow:
            open_store(places.mlflow).check_writable()
        client = load_mlflow()
        from mlflow.exceptions import MlflowException

        try:
            client(tracking_uri=places.mlflow).get_experiment_by_name(places.experiment)
        except (MlflowException, OSError) as error:
            raise UsageError(
                f"tracking.uri {masked(places.mlflow)}: MLflow does not answer: {first_line(error)}; start the server, correct"
                " the key, or leave mlflow out of tracking.to"
            ) from None


def first_line(error: Exception) -> str:
    """What went wrong, without what may be secret."""
    return masked(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}")


def params_of(config: FitConfig) -> dict[str, str]:
    """Every key of a configuration that has a value, as text without credentials."""
    return {
        f"{section}.{key}": masked(value if isinstance(value, str) else json.dumps(value))
        for section, values in config.model_dump(mode="json", exclude={"tracking"}).items()
        for key, value in values.items()
        if value is not None
    }


def values_of(entry: Entry) -> dict[str, float]:
    """The numbers of an evaluation by the names that they are shown under."""
    named = {
        f"train/{name.removeprefix('train_')}" if name in OF_TRAINING else f"valid/{name}": float(value)
        for name, value in entry.items()
        if name != "step"
    }
    return {name: named[name] for name in sorted(named, key=lambda name: name == LAST_WRITTEN)}


class Shown(Protocol):
    """A run in one tracker."""

    last_step: int
    """whose evaluation is there; all before it are there, too"""

    def write(self, values: dict[str, float], step: int) -> None:
        """Add numbers of a step."""

    def flush(self) -> None:
        """Let them be seen."""

    def end(self, status: str) -> None:
        """FINISHED or FAILED."""


class MlflowRun:
    """A run of MLflow: the one with this run's id and output, or a new one."""

    def __init__(self, places: Places, about: About) -> None:
        self.client = load_mlflow()(tracking_uri=places.mlflow)
        found = self.client.get_experiment_by_name(places.experiment)
        experiment = found.experiment_id if found else self.client.create_experiment(places.experiment)
        same = self.client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{about.run_id}'")
        mine = [run for run in same if run.data.tags.get(OUTPUT_TAG) == about.output]
        tags = {RUN_TAG: about.run_id, OUTPUT_TAG: about.output}
        run = mine[0] if mine else self.client.create_run(experiment, tags=tags, run_name=about.run_id)
        self.id = run.info.run_id
        if mine:
            self.client.update_run(self.id, "RUNNING")
        self.add_params({name: one for name, one in about.params.items() if name not in run.data.params})
        written = self.client.get_metric_history(self.id, LAST_WRITTEN) if mine else []
        self.last_step = max((one.step for one in written), default=0)

    def add_params(self, params: dict[str, str]) -> None:
        """A parameter is written once: those of a run that goes on with other resources stay."""
        from mlflow.entities import Param

        several = [Param(name, value) for name, value in params.items()]
        for start in range(0, len(several), MAX_BATCH):
            self.client.log_batch(self.id, params=several[start : start + MAX_BATCH])

    def write(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, [Metric(name, value, now, step) for name, value in values.items()])

    def flush(self) -> None:
        """Nothing is held back."""

    def end(self, status: str) -> None:
        self.client.set_terminated(self.id, status)


class TensorBoardRun:
    """Event files in a folder of the run's own; on a storage that cannot append, the file is written again as it grows."""

    def __init__(self, runs: Store, about: About, last_step: int) -> None:
        self.folder = runs.at(f"{about.output.rstrip('/').rpartition('/')[2]}/{about.run_id}")
        self.last_step = last_step
        self.temporary = None if self.folder.is_local else tempfile.TemporaryDirectory()
        self.local = Path(self.temporary.name if self.temporary else self.folder.root)
        # Steps behind the last one are hidden: those of an attempt that was killed before its checkpoint was.
        self.writer = load_tensorboard()(str(self.local), purge_step=last_step + 1)
        if not last_step:
            self.writer.add_text("config", "\n".join(f"    {name} = {one}" for name, one in about.params.items()), 0)

    def write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self.writer.flush()
        if self.temporary:
            for file in self.local.iterdir():
                self.folder.replace(file.name, file.read_bytes())

    def end(self, status: str) -> None:
        self.writer.add_text("status", status, self.last_step)
        self.writer.close()
        self.flush()


class Tracker:
    """Shows one attempt at a run in all its places, on rank 0."""

    def __init__(self, places: Places, about: About, last_step: int) -> None:
        """`last_step`: of the last evaluation, if the run goes on."""
        self.places = places
        self.opened: dict[str, Shown] = {}
        self.warned: set[str] = set()
        self.last_step = last_step
        """that TensorBoard has: its files are not read again"""
        self.open: dict[str, Callable[[], Shown]] = {}
        tensorboard = places.tensorboard
        if places.mlflow is not None:
            self.open["MLflow"] = lambda: MlflowRun(places, about)
        if tensorboard is not None:
            self.open["TensorBoard"] = lambda: TensorBoardRun(tensorboard, about, self.last_step)

    def log(self, history: Sequence[Entry]) -> None:
        """Add all evaluations that are not there yet, those that a tracker missed included."""

        def add(shown: Shown) -> None:
            for entry in history:
                step = int(entry["step"])
                if step > shown.last_step:
                    shown.write(values_of(entry), step)
                    shown.last_step = step
            shown.flush()
            if isinstance(shown, TensorBoardRun):
                self.last_step = shown.last_step

        self.try_each(add)

    def end(self, results: dict[str, Entry | None], step: int, failed: bool = False) -> None:
        """Add what the run comes to, as best/... and test/..., and close it."""
        values = {
            f"{name}/{key}": float(value)
            for name, entry in results.items()
            for key, value in (entry or {}).items()
            if isinstance(value, (int, float))
        }

        def close(shown: Shown) -> None:
            if values:
                shown.write(values, step)
            shown.flush()
            shown.end("FAILED" if failed else "FINISHED")

        self.try_each(close)

    def try_each(self, action: Callable[[Shown], None]) -> None:
        """Do something in each place; what fails is said once, and tried again at the next evaluation."""
        for name, open_run in self.open.items():
            try:
                if name not in self.opened:
                    self.opened[name] = open_run()
                action(self.opened[name])
            except Exception as error:  # noqa: BLE001 - whatever another's library raises, a night of training is worth more
                self.opened.pop(name, None)
                if name not in self.warned:
                    self.warned.add(name)
                    say(
                        f"WARNING: {name} does not take what this run reports ({first_line(error)}); training goes on, and what"
                        " is missing there is added when it answers again"
                    )
