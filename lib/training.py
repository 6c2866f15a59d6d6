"""Fine-tuning on the cluster: check everything that can be wrong, tokenize, run the workers, commit the best checkpoint.

Run it again with the same run id and configuration and it goes on from the last evaluation, or, if the checkpoint is
committed, returns its metrics at once.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from lib.augmentation import check_augment, check_augmenter
from lib.calibration import check_decision
from lib.checkpoint import fetch
from lib.classifying import ClassifierJob, TaskJob
from lib.contrastive import check_contrastive, check_contrastive_task
from lib.errors import UsageError
from lib.facts import check_weights, max_positions, read_config
from lib.finetuning import work
from lib.heads import check_head
from lib.labelled import LabelledIndex, LabelledSource, find_sources, prepare
from lib.loss import Objective, check_loss, make_objective
from lib.metrics import check_stopping, choose_metric
from lib.pretrain_config import PretrainModelSection
from lib.runtime import Cluster
from lib.schema import Task
from lib.storage import Store, open_store
from lib.tokenization import load_tokenizer
from lib.tracking import find_places
from lib.train_config import LabelledSection, TestSection, TrainConfig, TrainModelSection, TrainSection, ValidSection
from lib.tuning import check_tuning
from lib.workers import check_folder, claimed, committed_before, place_workers, run_folder, run_to_commit


def train(config: TrainConfig, run_id: str, cluster: Cluster, data: Store | None = None) -> dict[str, Any]:
    """Fine-tune, commit the best checkpoint to `output.path`, and return what its `metrics.json` holds.

    `data`: a folder that holds the tokenized rows already, if there is one. Raises `UsageError` before anything is learned,
    `IncompleteError` if the same command can finish the run later.
    """
    output = open_store(config.output.path)
    found = committed_before(output, config, run_id)
    if found is not None:
        print(f"{output.url}: run {run_id} committed this checkpoint already", flush=True)
        return found
    check_recipe(config)
    check_folder(output, cluster)
    use_gpu, cpus_per_worker = place_workers(config, cluster)
    base = absolute(config.model.base)
    max_length, pad_token_id = check_base(base, config.model)
    replacing = find_replacing(config, base, max_length)
    several = {name: (one, find_labelled(name, one)) for name, one in configs_of(config).items()}
    metric = check_tasks(config, [sources[0].task for _, sources in several.values()])
    folder = run_folder(output, run_id)
    tracking = find_places(config, output, is_fresh=folder.info("run.json") is None)
    with claimed(folder, config, run_id):
        tasks = tuple(
            prepare_task(name, one, sources, base, max_length, data or folder.at("data"))
            for name, (one, sources) in several.items()
        )
    job = ClassifierJob(
        config=config,
        run_id=run_id,
        base=base,
        replacing=replacing,
        max_length=max_length,
        pad_token_id=pad_token_id,
        tasks=tasks,
        metric=metric,
        output=output,
        folder=folder,
        cpus_per_worker=cpus_per_worker,
        tracking=tracking,
    )
    return run_to_commit(lambda: work(job), job, use_gpu)


def prepare_task(
    name: str, config: TrainConfig, sources: list[LabelledSource], base: str, max_length: int, folder: Store
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
    check_augment(config)
    check_validation(config)
    check_long_texts(config)
    check_head(config.head)
    check_stopping(config.stopping)


def find_replacing(config: TrainConfig, base: str, max_length: int) -> str:
    """The model that replaces words in training rows, for workers; the base, if there is none of its own.

    Raises `UsageError` if it cannot do it, or the tokenizer does not tell words: here, not in the workers.
    """
    replacing = base if config.augment.model is None else absolute(config.augment.model)
    check_augmenter(config, base, replacing, max_length)
    return replacing


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


def find_labelled(name: str, config: TrainConfig) -> list[LabelledSource]:
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
    if "train" in config.tasks.named:
        raise UsageError(
            "tasks.train: its loss would be called as that of training, train_loss; give the task another name"
        )
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


def absolute(url: str) -> str:
    """A model's place as it is known in any working directory."""
    return url if url.startswith("package:") else open_store(url).url


def check_base(base: str, model: TrainModelSection | PretrainModelSection) -> tuple[int, int]:
    """The most tokens of a text that the base can take, up to `model.max_length`, and its padding id; loads no weights."""
    trust = model.trust
    folder = fetch(base, trust)
    config = read_config(folder, trust)
    check_weights(folder, "model.base", base, trust)
    length = min(model.max_length, max_positions(config))
    try:
        if isinstance(model, TrainModelSection):
            load_tokenizer(folder, length, trust.code, model.truncation, model.windows)
        else:
            load_tokenizer(folder, length, trust.code)
    except (OSError, ValueError) as error:
        raise UsageError(f"model.base {base}: its tokenizer cannot be loaded: {error}") from None
    return length, config.pad_token_id or 0


def check_validation(config: TrainConfig) -> None:
    """Raise `UsageError` if rows that were not learned from are needed, but none are set aside; say so if none are, or if a share is of no use."""
    if config.valid.path is not None and config.valid.fraction != ValidSection().fraction:
        print(f"valid.fraction = {config.valid.fraction} is not used: valid.path names the rows", flush=True)
    if config.valid.path is not None or config.valid.fraction:
        return
    decision = sorted(name for name, value in config.decision if value)
    needs = {
        'stopping.keep = "best"': config.stopping.keep == "best" and config.contrastive.iterations is None,
        f"decision.{decision[0] if decision else ''}": bool(decision),
    }
    for key, is_set in needs.items():
        if is_set:
            place = "each task its valid" if config.tasks.named else "valid.path"
            raise UsageError(
                f"valid.fraction = 0 with {key}: it would be chosen by the rows that were learned from; give {place} or a"
                ' valid.fraction, or set stopping.keep = "last" and leave decision.* out'
            )
    print("valid.fraction = 0: all rows are learned from, and what is called validation are these rows", flush=True)


def check_long_texts(config: TrainConfig) -> None:
    """Raise `UsageError` if what becomes of long texts does not go together."""
    model, sets = config.model, [config.train, *config.tasks.named.values()]
    is_pair = any(not isinstance(one.text_column, str) for one in sets)
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


def print_sets(index: LabelledIndex, sources: list[LabelledSource], max_length: int, seconds: float) -> None:
    """Say what is learned from, and what was left out."""
    for source in sources:
        dropped = index.dropped[source.name]
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        note = f"; left out {sum(dropped.values())} ({reasons})" if dropped else ""
        print(f"{source.name}: {index.rows[source.name]:,} rows from {source.store.url}{note}", flush=True)
    kind = index.task.value.replace("_", "-")
    learned = f"{len(index.labels)} labels" if index.task is not Task.REGRESSION else f"the number {index.labels[0]!r}"
    print(f"{learned}, {kind}, at most {max_length} tokens a text; ready in {seconds:.1f} s", flush=True)
