"""The workers of a training run on the cluster: room for them, the run's claim, restarts, and what their errors mean."""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
import ray.train
from ray.exceptions import OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from torch.cuda import OutOfMemoryError as GpuOutOfMemoryError

from lib.committing import deciding, differences, find_committed
from lib.config import Section
from lib.errors import IncompleteError, TextsweepError, UsageError, at_work
from lib.failures import RetryPolicy, StartWatch, causes_of
from lib.fitting import Job
from lib.pretrain_config import FitConfig
from lib.rendezvous import OneAddressConfig
from lib.runtime import Cluster
from lib.states import STATES_FOLDER, forget_unreadable_states
from lib.storage import Store, explained
from lib.train_config import TrainConfig

RUNS_FOLDER = "_train"

MAX_FAILURES = 3
"""Restarts of the workers in one execution of the job."""

SHOWN_CHARACTERS = 300
"""Of what Ray says of a worker's death, which is a page."""

RESIZE_SECONDS = 30.0
"""Between looks for room for more workers, if there may be more: taking them costs what was trained since the last evaluation."""

RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for one look of the controller: 2 s as Ray ships
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it shows every line that a worker prints twice
}


WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait sleep instead of spinning: on shared cores spinning ones take the time that other processes need."""


def place_workers(config: FitConfig, cluster: Cluster) -> tuple[bool, int]:
    """Whether workers use GPUs, and how many CPUs each gets. Raises `UsageError` if the cluster cannot hold them."""
    wanted = config.resources.num_workers
    least = config.resources.min_workers or wanted
    if least > wanted:
        raise UsageError(
            f"resources.min_workers = {least} is more than resources.num_workers = {wanted}; give at most that"
        )
    asked = f"resources.num_workers = {wanted}" if least == wanted else f"resources.min_workers = {least}"
    use_gpu = cluster.gpus >= 1 if config.resources.use_gpu is None else config.resources.use_gpu
    if use_gpu:
        room = sum(int(min(node.gpus, node.cpus)) for node in cluster.nodes)
        if least > room:
            raise UsageError(
                f"{asked} with a GPU and a CPU each, the cluster has room for {room} ({cluster});"
                f" lower {asked.split()[0]}, set resources.use_gpu = false, or add GPU nodes"
            )
        return True, 1
    most = int(max((node.cpus for node in cluster.nodes), default=0))
    for count, cpus in itertools.product(range(wanted, least - 1, -1), range(most, 0, -1)):
        if sum(int(node.cpus // cpus) for node in cluster.nodes) >= count:
            return False, cpus
    raise UsageError(
        f"{asked} with a CPU each, the cluster has {cluster};"
        f" lower {asked.split()[0]} to at most {int(cluster.cpus)}, or add nodes"
    )


def check_folder(output: Store, cluster: Cluster) -> None:
    """Raise what forbids writing there; say so if several nodes must see the same folder."""
    output.check_writable()
    if output.is_local and len(cluster.nodes) > 1:
        print(f"output.path {output.url} is a local path: all {len(cluster.nodes)} nodes must see it there", flush=True)


@contextlib.contextmanager
def claimed(folder: Store, config: Section, run_id: str) -> Iterator[None]:
    """Start this run, or go on with it.

    A mistake that is found inside, before anything is learned, gives the name back to whom mends it. Raises `UsageError` if an
    unfinished run of this name has another configuration.
    """
    is_new = claim(folder, config, run_id)
    try:
        yield
    except UsageError:
        if is_new:
            remove_run(folder)
        raise


def claim(folder: Store, config: Section, run_id: str) -> bool:
    """Whether this run is a new one, and no unfinished one. Raises `UsageError` if that has another configuration."""
    if folder.create("run.json", json.dumps(deciding(config)).encode()):
        return True
    found = differences(config, json.loads(folder.read("run.json") or b"{}"))
    if found:
        raise UsageError(
            f"{folder.url}: run {run_id!r} was started with another configuration ({'; '.join(found)}); give this one"
            " another --run-id, or the old configuration to go on"
        )
    print(f"going on with run {run_id}", flush=True)
    return False


class QuietTrainer(TorchTrainer):
    """Without the actor that waits for the controller's death to free its placement group: the job's end frees it, too.

    Ray 2.60: without a dashboard, as in a local Ray, that actor prints a warning every second. And with our own rule for trying again.
    """

    def _create_default_callbacks(self) -> list[Any]:
        found: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [StartWatch(), *(one for one in found if type(one).__name__ != "PlacementGroupCleanerCallback")]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        settings["failure_policy"] = RetryPolicy(self.run_config.failure_config)  # type: ignore[arg-type]
        return super()._initialize_and_run_controller(**settings)  # type: ignore[misc]


def run_workers(work: Callable[[], str | None], job: Job, use_gpu: bool) -> None:
    """Run `work` on all workers, restarting them from their last checkpoint if some die.

    It returns why the run is hopeless, if it is. The job is part of it, and not a configuration for it: that one Ray Train's
    controller reads, too, and would import torch and transformers for it, 5 of its 7 s of CPU (measured).
    """
    for name, value in RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    forget_unreadable_states(job.folder)
    where: dict[str, Any] = {"storage_path": job.folder.root}
    if not job.folder.is_local:
        where["storage_filesystem"] = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(job.folder.fs))
    resources = job.config.resources
    least, most = resources.min_workers, resources.num_workers
    trainer = QuietTrainer(
        work,  # type: ignore[arg-type]
        torch_config=OneAddressConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=most if least is None else (least, most),
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": job.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=STATES_FOLDER,
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]
            **where,
        ),
    )
    try:
        result = run_interruptibly(trainer.fit)
    except TrainingFailedError as error:
        explain(error, job)
        raise
    except (RayActorError, WorkerCrashedError, OutOfMemoryError) as error:
        raise IncompleteError(
            f"Ray Train's controller died: {str(error).splitlines()[0]}; run the same command again to go on after the last"
            " evaluation"
        ) from error
    failure = getattr(result, "return_value", None)
    if failure:
        is_fp16 = job.config.model.precision == "fp16"
        first = "set model.precision to bf16 or fp32, whose numbers do not overflow at 65,504, or " if is_fp16 else ""
        raise UsageError(
            f"{failure}; {first}lower optim.learning_rate or raise optim.warmup_fraction, under another --run-id"
        )


def run_to_commit(work: Callable[[], str | None], job: Job, use_gpu: bool) -> dict[str, Any]:
    """Run `work` on all workers, remove what the run needed, and return what its `metrics.json` holds."""
    run_workers(work, job, use_gpu)
    metrics = find_committed(job.output, job.config, job.run_id)
    assert metrics is not None, f"{job.output.url}: the workers ended without an error, and committed nothing"
    remove_run(job.folder)
    return metrics


def run_interruptibly(function: Callable[[], Any]) -> Any:
    """Call a function that waits inside Ray so that SIGTERM ends the wait.

    Ray 2.60 waits in C++, where the exception of a signal handler is lost, and `fit` puts its own handler on Ctrl-C: seen
    as a driver that trained on for minutes after SIGTERM. A thread of its own leaves the main one to the signals.
    """
    executor = ThreadPoolExecutor(max_workers=1)
    try:
        return executor.submit(function).result()
    finally:
        executor.shutdown(wait=False)


def explain(error: TrainingFailedError, job: Job) -> None:
    """Raise what a person can act on, if that is what ended the workers; return if it looks like a bug."""
    causes = causes_of(error)
    least, most = job.config.resources.min_workers, job.config.resources.num_workers
    for cause in causes:
        if isinstance(cause, GpuOutOfMemoryError):
            raise UsageError(
                f"a worker ran out of GPU memory with {job.config.optim.batch_size} rows a step on"
                f" {'' if least is None else f'{least} to '}{most} workers and model.max_length = {job.max_length};"
                f" {less_memory(job)}, under another --run-id"
            ) from error
        if isinstance(cause, TextsweepError):
            with at_work():
                raise cause from error
    deaths = (RayActorError, WorkerCrashedError, OutOfMemoryError, WorkerGroupStartupFailedError)
    if any(isinstance(cause, deaths) for cause in causes):
        first = " ".join(str(causes[0]).split())[:SHOWN_CHARACTERS]
        raise IncompleteError(
            f"workers died more than {MAX_FAILURES} times: {first}; run the same command again to go on after the last evaluation"
        ) from error


def less_memory(job: Job) -> str:
    """What makes a training's steps need less memory."""
    if isinstance(job.config, TrainConfig) and job.config.contrastive.iterations is not None:
        return "lower contrastive.batch_size or model.max_length"
    return "raise optim.accumulation_steps (the result is the same)"


def run_folder(output: Store, run_id: str) -> Store:
    """Where a run keeps what it needs until it has committed."""
    return output.at(f"{RUNS_FOLDER}/{run_id}")


def committed_before(output: Store, config: FitConfig, run_id: str) -> dict[str, Any] | None:
    """What `metrics.json` holds if this run has committed; what it needed goes, too, if it was killed before it could remove that."""
    metrics = find_committed(output, config, run_id)
    if metrics is not None:
        remove_run(run_folder(output, run_id))
    return metrics


def remove_run(folder: Store) -> None:
    """Remove tokenized data and training states of a run that has committed, or will not begin."""
    with contextlib.suppress(FileNotFoundError), explained(folder.url, "remove"):
        folder.fs.rm(folder.root, recursive=True)
    if folder.is_local:
        with contextlib.suppress(OSError):
            Path(folder.root).parent.rmdir()
