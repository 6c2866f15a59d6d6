"""Training on the cluster: check everything that can be wrong, tokenize, run the workers, commit the best checkpoint.

Run it again with the same run id and configuration and it goes on from the last evaluation, or, if the checkpoint is
committed, returns its metrics at once.
"""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
from ray.exceptions import OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from torch.cuda import OutOfMemoryError as GpuOutOfMemoryError

from lib.calibration import check_decision
from lib.checkpoint import fetch
from lib.config import LabelledSection, TestSection, TrainConfig, TrainModelSection, TrainSection, ValidSection
from lib.contrastive import check_contrastive, check_contrastive_task
from lib.errors import IncompleteError, TextsweepError, UsageError
from lib.facts import check_weights, max_positions, read_config
from lib.fitting import Job, TaskJob, deciding, find_committed, work
from lib.labelled import LabelledIndex, Source, find_sources, prepare
from lib.loss import Objective, check_loss, make_objective
from lib.metrics import choose_metric
from lib.runtime import Cluster
from lib.schema import Task
from lib.storage import Store, explained, open_store
from lib.tokenization import load_tokenizer
from lib.tracking import find_places
from lib.tuning import check_tuning

RUNS_FOLDER = "_train"

MAX_FAILURES = 3
"""Restarts of the workers in one execution of the job."""

RESIZE_SECONDS = 30.0
"""Between looks for room for more workers, if there may be more: taking them costs what was trained since the last evaluation."""

RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for one look of the controller: 2 s as Ray ships
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it shows every line that a worker prints twice
}


WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait sleep instead of spinning: on shared cores spinning ones take the time that other processes need."""


def train(config: TrainConfig, run_id: str, cluster: Cluster, data: Store | None = None) -> dict[str, Any]:
    """Fine-tune, commit the best checkpoint to `output.path`, and return what its `metrics.json` holds.

    `data`: a folder that holds the tokenized rows already, if there is one. Raises `UsageError` before any weights are loaded, `IncompleteError` if the same command can finish the run later.
    """
    output = open_store(config.output.path)
    found = find_committed(output, config, run_id)
    if found is not None:
        print(f"{output.url}: run {run_id} committed this checkpoint already", flush=True)
        return found
    check_recipe(config)
    output.check_writable()
    use_gpu, cpus_per_worker = place_workers(config, cluster)
    if output.is_local and len(cluster.nodes) > 1:
        print(f"output.path {output.url} is a local path: all {len(cluster.nodes)} nodes must see it there", flush=True)
    base = absolute_base(config.model)
    max_length, pad_token_id = check_base(base, config.model)
    several = {name: (one, find_labelled(name, one)) for name, one in configs_of(config).items()}
    metric = check_tasks(config, [sources[0].task for _, sources in several.values()])
    folder = output.at(f"{RUNS_FOLDER}/{run_id}")
    tracking = find_places(config, output, is_fresh=folder.info("run.json") is None)
    claim(folder, deciding(config), run_id)
    tasks = tuple(
        prepare_task(name, one, sources, base, max_length, data or folder.at("data"))
        for name, (one, sources) in several.items()
    )
    job = Job(
        config=config,
        run_id=run_id,
        base=base,
        max_length=max_length,
        pad_token_id=pad_token_id,
        tasks=tasks,
        metric=metric,
        output=output,
        folder=folder,
        cpus_per_worker=cpus_per_worker,
        tracking=tracking,
    )
    run_workers(job, use_gpu)
    metrics = find_committed(output, config, run_id)
    assert metrics is not None, f"{output.url}: the workers ended without an error and without a checkpoint"
    remove_run(folder)
    return metrics


def prepare_task(
    name: str, config: TrainConfig, sources: list[Source], base: str, max_length: int, folder: Store
) -> TaskJob:
    """Tokenize the rows of one task, and say what they are."""
    begun = time.monotonic()
    data = folder.at(name) if name else folder
    with naming(name):
        index = prepare(config, sources, base, max_length, data)
        objective = objective_of(config, index)
    print_sets(index, sources, max_length, time.monotonic() - begun)
    return TaskJob(name=name, index=index, objective=objective, data=data)


def objective_of(config: TrainConfig, index: LabelledIndex) -> Objective:
    """What training makes small, given what the rows of a task are."""
    counts, num_rows = index.label_counts["train"], index.rows["train"]
    return make_objective(config.loss, config.optim.rdrop, index.task, index.labels, counts, num_rows)


# before any work


def check_recipe(config: TrainConfig) -> None:
    """Raise `UsageError` for what does not go together, whatever the rows are."""
    check_tuning(config)
    check_contrastive(config)
    check_validation(config)
    check_long_texts(config)


def absolute_base(model: TrainModelSection) -> str:
    """`model.base` for workers, which Ray moves to another working directory."""
    return model.base if model.base.startswith("package:") else open_store(model.base).url


def configs_of(config: TrainConfig) -> dict[str, TrainConfig]:
    """A configuration for each task, as if it were the only one; the only one has no name."""
    columns = LabelledSection.model_fields
    return {
        name: config.model_copy(
            update={
                "train": TrainSection(path=one.path, **{key: getattr(one, key) for key in columns}),
                "valid": ValidSection(path=one.valid, fraction=config.valid.fraction),
                "test": TestSection(path=one.test),
            }
        )
        for name, one in config.tasks.named.items()
    } or {"": config}


@contextlib.contextmanager
def naming(task: str) -> Iterator[None]:
    """Say of which task a mistake is."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"task {task!r}: {error}" if task else str(error)) from None


def find_labelled(name: str, config: TrainConfig) -> list[Source]:
    """List the labelled sets of a task, and check what must fit its kind."""
    with naming(name):
        sources = find_sources(config)
        check_kind(config, sources[0].task)
    return sources


def check_kind(config: TrainConfig, task: Task) -> None:
    """Raise `UsageError` for what is not for rows of a kind."""
    check_decision(config.decision, task)
    check_loss(config.loss, config.optim.rdrop, task)
    check_contrastive_task(config, task)
    if config.data.label_noise and task is not Task.MULTI_CLASS:
        raise UsageError(
            f"data.label_noise looks at rows with one label each, those of this data are {task.value}; leave it out"
        )


def check_tasks(config: TrainConfig, tasks: Sequence[Task]) -> str:
    """The metric that chooses the checkpoint; of several tasks their mean. Raises `UsageError` for what several cannot share."""
    if len(tasks) == 1:
        return choose_metric(config.stopping.metric, tasks[0])
    names = ", ".join(config.tasks.named)
    if config.data.label_noise:
        raise UsageError(
            f"data.label_noise with tasks ({names}): it looks at one labelled set; train on each alone to look at it"
        )
    if not config.valid.fraction:
        raise UsageError(
            f"valid.fraction = 0 with tasks ({names}): give each task rows of its own as tasks.NAME.valid, and leave it out"
        )
    for key in ("class_weights", "positive_weights"):
        if isinstance(getattr(config.loss, key), dict):
            raise UsageError(f'loss.{key} with tasks ({names}): labels of which of them? "balanced" is for all')
    default = "loss" if Task.REGRESSION in tasks else "macro_f1"
    for task in tasks:
        choose_metric(config.stopping.metric or default, task)
    return config.stopping.metric or default


def place_workers(config: TrainConfig, cluster: Cluster) -> tuple[bool, int]:
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


def check_base(base: str, model: TrainModelSection) -> tuple[int, int]:
    """The most tokens of a text that the base can take, up to `model.max_length`, and its padding id; loads no weights."""
    trust = model.trust
    folder = fetch(base, trust)
    config = read_config(folder, trust)
    check_weights(folder, "model.base", base, trust)
    length = min(model.max_length, max_positions(config))
    try:
        load_tokenizer(folder, length, trust.code, model.truncation, model.windows)
    except (OSError, ValueError) as error:
        raise UsageError(f"model.base {base}: its tokenizer cannot be loaded: {error}") from None
    return length, config.pad_token_id or 0


def check_validation(config: TrainConfig) -> None:
    """Raise `UsageError` if rows that were not learned from are needed, but none are set aside; say so if none are."""
    if config.valid.path is not None or config.valid.fraction:
        return
    decision = sorted(name for name, value in config.decision if value)
    needs = {
        'stopping.keep = "best"': config.stopping.keep == "best" and config.contrastive.iterations is None,
        f"decision.{decision[0] if decision else ''}": bool(decision),
    }
    for key, is_set in needs.items():
        if is_set:
            raise UsageError(
                f"valid.fraction = 0 with {key}: it would be chosen by the rows that were learned from; give valid.path or a"
                ' valid.fraction, or set stopping.keep = "last" and leave decision.* out'
            )
    print("valid.fraction = 0: all rows are learned from, and what is called validation are these rows", flush=True)


def check_long_texts(config: TrainConfig) -> None:
    """Raise `UsageError` if what becomes of long texts does not go together."""
    model, is_pair = config.model, not isinstance(config.train.text_column, str)
    if model.truncation == "head_tail" and is_pair:
        raise UsageError(
            "model.truncation = head_tail with two text columns: which of the two would lose its middle? Use head or tail"
        )
    if model.window_stride is None:
        given = sorted({"window_pooling", "max_windows"} & model.model_fields_set)
        if given:
            raise UsageError(
                f"model.{given[0]} is set, but there are no windows; set model.window_stride, a quarter of max_length for example"
            )
    elif is_pair:
        raise UsageError("model.window_stride with two text columns: windows are of one text; leave it out")
    elif model.truncation != "head":
        raise UsageError(
            f"model.window_stride with model.truncation = {model.truncation}: windows begin at the head; leave one of the two out"
        )


def claim(folder: Store, mine: dict[str, Any], run_id: str) -> None:
    """Start this run, whose configuration decides `mine`, or go on with it.

    Raises `UsageError` if an unfinished run of this name has another configuration.
    """
    if folder.create("run.json", json.dumps(mine).encode()):
        return
    theirs = json.loads(folder.read("run.json") or b"{}")
    differing = [
        f"{section}.{key} = {mine[section].get(key)!r}, it was {values.get(key)!r}"
        for section, values in theirs.items()
        for key in values
        if mine.get(section, {}).get(key) != values[key]
    ]
    if theirs != mine:
        raise UsageError(
            f"{folder.url}: run {run_id!r} was started with another configuration ({'; '.join(differing)}); give this one"
            " another --run-id, or the old configuration to go on"
        )
    print(f"going on with run {run_id}", flush=True)


def print_sets(index: LabelledIndex, sources: list[Source], max_length: int, seconds: float) -> None:
    """Say what is learned from, and what was left out."""
    for source in sources:
        dropped = index.dropped[source.name]
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        note = f"; left out {sum(dropped.values())} ({reasons})" if dropped else ""
        print(f"{source.name}: {index.rows[source.name]} rows from {source.store.url}{note}", flush=True)
    kind = index.task.value.replace("_", "-")
    learned = f"{len(index.labels)} labels" if index.task is not Task.REGRESSION else f"the number {index.labels[0]!r}"
    print(f"{learned}, {kind}, at most {max_length} tokens a text; ready in {seconds:.1f} s", flush=True)


# running the workers


class QuietTrainer(TorchTrainer):
    """Without the actor that waits for the controller's death to free its placement group: the job's end frees it, too.

    Ray 2.60: without a dashboard, as in a local Ray, that actor prints a warning every second.
    """

    def _create_default_callbacks(self) -> list[Any]:
        found: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [one for one in found if type(one).__name__ != "PlacementGroupCleanerCallback"]


def run_workers(job: Job, use_gpu: bool) -> None:
    """Run `work` on all workers, restarting them from their last checkpoint if some die."""
    for name, value in RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    where: dict[str, Any] = {"storage_path": job.folder.root}
    if not job.folder.is_local:
        where["storage_filesystem"] = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(job.folder.fs))
    resources = job.config.resources
    least, most = resources.min_workers, resources.num_workers
    trainer = QuietTrainer(
        work,  # type: ignore[arg-type]
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=most if least is None else (least, most),
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": job.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
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
        raise UsageError(f"{failure}; lower optim.learning_rate or raise optim.warmup_fraction, under another --run-id")


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
    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    causes = [cause for failure in failures for cause in chain_of(failure)]
    for cause in causes:
        if isinstance(cause, GpuOutOfMemoryError):
            raise UsageError(
                f"a worker ran out of GPU memory with {job.config.optim.batch_size} rows a step on"
                f" {job.config.resources.num_workers} workers and model.max_length = {job.max_length}; raise"
                " optim.accumulation_steps (the result is the same), under another --run-id"
            ) from error
        if isinstance(cause, TextsweepError):
            raise cause from error
    if any(isinstance(cause, (RayActorError, WorkerCrashedError, OutOfMemoryError)) for cause in causes):
        raise IncompleteError(
            f"workers died more than {MAX_FAILURES} times: {failures[0]}; run the same command again to go on after the"
            " last evaluation"
        ) from error


def chain_of(error: BaseException | None) -> list[BaseException]:
    """An exception and its causes."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = getattr(error, "cause", None) or error.__cause__
    return chain


def remove_run(folder: Store) -> None:
    """Remove tokenized data and training states of a committed run."""
    with contextlib.suppress(FileNotFoundError), explained(folder.url, "remove"):
        folder.fs.rm(folder.root, recursive=True)
    if folder.is_local:
        with contextlib.suppress(OSError):
            Path(folder.root).parent.rmdir()
