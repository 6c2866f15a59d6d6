"""Hyperparameter search on the cluster: check all trials, tokenize once, let Ray Tune run and end them, train the best once more.

A trial is one worker, so a cluster runs as many trials as it has GPUs rather than one trial on all of them: the step of a configuration
is the same however many workers share it. The points are known before the first trial runs, each trial that is over is a file of the
run's folder, and Ray Tune decides which ones go on: the same command after a kill runs what is not there.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lib.checkpoint import COMMIT_NAME
from lib.classifying import ClassifierJob, TaskJob
from lib.committing import deciding, differences
from lib.errors import UsageError
from lib.halving import clear_copies, percents_of, read_records, run_trials
from lib.labelled import LabelledIndex, LabelledSource
from lib.metrics import brief, is_better
from lib.runtime import Cluster
from lib.search_report import search_report
from lib.space import Point, SearchConfig, configuration_at, masked_point, point_text, points_of, read_space
from lib.storage import Store, open_store
from lib.toml import to_toml
from lib.tracking import Places, find_places
from lib.train_config import TrainConfig
from lib.training import (
    absolute,
    check_base,
    check_kind,
    check_recipe,
    check_tasks,
    configs_of,
    find_labelled,
    find_replacing,
    naming,
    objective_of,
    prepare_task,
    train,
)
from lib.trial import Record, TrialPlan
from lib.workers import check_folder, claim, place_workers, remove_run

SEARCHES_FOLDER, BEST_FOLDER = "_search", "best"

RESULT_NAME, RECIPE_NAME, REPORT_NAME = "search.json", "best.toml", "search.html"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A trial that was checked."""

    number: int
    point: Point
    """as it is shown"""
    config: TrainConfig
    base: str
    replacing: str
    max_length: int
    pad_token_id: int
    metric: str

    @property
    def tokens(self) -> str:
        """Equal for trials whose texts have the same token ids."""
        model = self.config.model
        deciding_tokens = [self.base, self.max_length, model.truncation, model.window_stride, model.max_windows]
        return hashlib.sha256(json.dumps(deciding_tokens).encode()).hexdigest()[:12]


def search(config: SearchConfig, run_id: str, cluster: Cluster) -> dict[str, Any]:
    """Run the trials, train the best configuration once more, and return what `search.json` holds.

    Raises `UsageError` before anything is trained or if every trial failed, `IncompleteError` if the same command can finish it later.
    """
    output = open_store(config.output.path)
    found = find_finished(output, config, run_id)
    if found is not None:
        print(f"{output.url}: run {run_id} finished this search already", flush=True)
        return found
    use_gpu, cpus, concurrent = place_trials(config, cluster)
    best_output = open_store(f"{config.output.path}/{BEST_FOLDER}")
    sources, trials = check_trials(config, best_output)
    check_folder(output, cluster)
    folder = output.at(f"{SEARCHES_FOLDER}/{run_id}")
    claim(folder, config, run_id)
    known = read_records(folder)
    tracking = find_places(config, best_output, is_fresh=not known)
    plan = TrialPlan(
        jobs=prepare_jobs(run_id, sources, trials, best_output, folder, cpus, tracking),
        points={one.number: one.point for one in trials},
        percents=percents_of(config.search),
        known=known,
        use_gpu=use_gpu,
    )
    print(f"{len(trials)} trials, {concurrent} at a time" + (f"; {len(known)} are over" if known else ""), flush=True)
    records = run_trials(config.search, plan, folder, cpus, concurrent)
    result = judge(config, run_id, trials, records)
    best = trials[result["best"]["trial"] - 1]
    if config.search.train_best:
        print(f"training the best once more: {point_text(best.point)}", flush=True)
        trained = train(best.config, run_id, cluster, folder.at("data").at(best.tokens))
        result["best"]["trained"] = {"validation": trained["best"], "test": brief_test(trained)}
    write_result(output, result, best.config)
    if not folder.is_local:
        clear_copies(list(dict.fromkeys(task.data for job in plan.jobs.values() for task in job.tasks)))
    remove_run(folder)
    return result


# before any work


def find_finished(output: Store, config: SearchConfig, run_id: str) -> dict[str, Any] | None:
    """What `search.json` of this very run holds, or None. Raises `UsageError` if something else is there."""
    raw = output.read(RESULT_NAME)
    if raw is None:
        if output.info(COMMIT_NAME) is not None:
            raise UsageError(
                f"output.path {output.url}: holds a checkpoint; give the search an output.path of its own, it commits its best"
                f" one as {BEST_FOLDER} in it"
            )
        return None
    found: dict[str, Any] = json.loads(raw)
    if found["run_id"] != run_id or differences(config, found["config"]):
        same = found["run_id"] == run_id
        raise UsageError(
            f"output.path {output.url}: holds the search of run {found['run_id']!r}{' with another configuration' if same else ''},"
            f" this is run {run_id!r}; a finished search is never changed: give this one another output.path"
        )
    return found


def place_trials(config: SearchConfig, cluster: Cluster) -> tuple[bool, int, int]:
    """Whether trials use a GPU each, how many CPUs each gets, and how many run at a time. Raises `UsageError` if they do not fit."""
    resources = config.resources
    if resources.strategy != "ddp":
        raise UsageError(
            f'resources.strategy = "{resources.strategy}" with jobs.search: a trial is one worker, which holds all weights; search with'
            " a smaller base, or leave it out"
        )
    use_gpu = cluster.gpus >= 1 if resources.use_gpu is None else resources.use_gpu
    room = sum(int(min(node.gpus, node.cpus)) if use_gpu else node.cpus >= 1 for node in cluster.nodes)
    concurrent = min(config.search.concurrent or max(1, room), config.search.trials)
    try:
        use_gpu, cpus = place_workers(resized(config, concurrent), cluster)
    except UsageError:
        if config.search.concurrent is None:
            raise
        raise UsageError(
            f"search.concurrent = {config.search.concurrent} with a CPU{' and a GPU' if use_gpu else ''} for each trial, the cluster"
            f" has {cluster};"
            " give less, or leave it out"
        ) from None
    return use_gpu, cpus, concurrent


def resized(config: TrainConfig, num_workers: int) -> TrainConfig:
    """The configuration with another number of workers."""
    update = {"num_workers": num_workers, "min_workers": None}
    return config.model_copy(update={"resources": config.resources.model_copy(update=update)})


def check_trials(config: SearchConfig, best_output: Store) -> tuple[dict[str, list[LabelledSource]], list[Planned]]:
    """List the labelled sets, and check the configuration of every trial. Raises `UsageError` that names the trial."""
    if config.valid.path is None and not config.valid.fraction and not config.tasks.named:
        raise UsageError(
            "valid.fraction = 0: trials are compared on validation rows; give valid.path or a valid.fraction"
        )
    points = points_of(config, read_space(config))
    if len(points) < config.search.trials:
        found_them = f"{len(points)} different configurations, the given one among them"
        print(
            f"search.trials = {config.search.trials}: search.space gave {found_them}; all of them are tried", flush=True
        )
    sources: dict[str, list[LabelledSource]] = {}
    trials = []
    for number, point in enumerate(points, 1):
        try:
            one = configuration_at(config, point, path=best_output.url)
            check_recipe(one)
            base = absolute(one.model.base)
            max_length, pad_token_id = check_base(base, one.model)
            replacing = find_replacing(one, base, max_length)
            for name, alone in configs_of(one).items():
                sources[name] = sources.get(name) or find_labelled(name, alone)
                with naming(name):
                    check_kind(alone, sources[name][0].task)
            metric = check_tasks(one, [found[0].task for found in sources.values()])
        except UsageError as error:
            raise UsageError(str(error) if number == 1 else f"trial {number} ({point_text(point)}): {error}") from None
        trials.append(
            Planned(
                number=number,
                point=masked_point(point),
                config=one,
                base=base,
                replacing=replacing,
                max_length=max_length,
                pad_token_id=pad_token_id,
                metric=metric,
            )
        )
    return sources, trials


def prepare_jobs(
    run_id: str,
    sources: dict[str, list[LabelledSource]],
    trials: Sequence[Planned],
    output: Store,
    folder: Store,
    cpus: int,
    tracking: Places | None,
) -> dict[int, ClassifierJob]:
    """Tokenize the rows, once for all trials whose token ids are the same, and say what each trial is to do."""
    prepared: dict[str, dict[str, TaskJob]] = {}
    jobs = {}
    for one in trials:
        data = folder.at("data").at(one.tokens)
        alone = configs_of(one.config)
        if one.tokens not in prepared:
            prepared[one.tokens] = {
                name: prepare_task(name, alone[name], found, one.base, one.max_length, data)
                for name, found in sources.items()
            }
        tasks = tuple(
            TaskJob(
                name=name,
                index=without_test(task.index, one.config),
                objective=objective_of(alone[name], task.index),
                data=task.data,
            )
            for name, task in prepared[one.tokens].items()
        )
        jobs[one.number] = ClassifierJob(
            config=as_trial(one.config),
            run_id=f"{run_id}-{one.number}",
            base=one.base,
            replacing=one.replacing,
            max_length=one.max_length,
            pad_token_id=one.pad_token_id,
            tasks=tasks,
            metric=one.metric,
            output=output,
            folder=folder,
            cpus_per_worker=cpus,
            tracking=tracking,
        )
    return jobs


def as_trial(config: TrainConfig) -> TrainConfig:
    """The configuration of one worker that stands for all: as many rows in a forward pass as each of them would have."""
    optim, workers = config.optim, config.resources.num_workers
    return resized(config, 1).model_copy(
        update={
            "optim": optim.model_copy(update={"accumulation_steps": optim.accumulation_steps * workers}),
            "data": config.data.model_copy(update={"label_noise": False}),
        }
    )


def without_test(index: LabelledIndex, config: TrainConfig) -> LabelledIndex:
    """A labelled set without its test rows; where duplicates are told by them their texts are needed, and only these are read."""
    if config.data.duplicates != "keep":
        return index
    return index.model_copy(update={"files": {name: one for name, one in index.files.items() if name != "test"}})


# the result


def judge(config: SearchConfig, run_id: str, trials: Sequence[Planned], records: dict[int, Record]) -> dict[str, Any]:
    """What `search.json` holds. Raises `UsageError` if no trial came to its end."""
    ordered = [records[one.number] for one in trials]
    done = [one for one in ordered if one.status == "done" and one.value is not None]
    if not done:
        reasons = "; ".join(f"trial {one.number}: {one.reason}" for one in ordered if one.reason)
        raise UsageError(
            f"no trial came to its end ({reasons}); search other values, such as a lower optim.learning_rate, under another --run-id"
        )
    metric, best = trials[0].metric, done[0]
    for one in done[1:]:
        if one.value is not None and is_better(one.value, best.value, metric):
            best = one
    return {
        "run_id": run_id,
        "config": deciding(config),
        "metric": metric,
        "best": {"trial": best.number, "point": best.point, "value": best.value, "trained": None},
        "seconds": round(sum(one.seconds for one in ordered), 3),
        "steps": sum(one.step for one in ordered),
        "steps_without_stopping": sum(one.steps for one in ordered),
        "trials": [one.model_dump(mode="json") for one in ordered],
    }


def brief_test(trained: dict[str, Any]) -> dict[str, Any] | None:
    """The single numbers of the test rows, of several tasks by their names."""
    several = {name: one["test"] for name, one in trained.get("tasks", {"": trained}).items() if one["test"]}
    found = {name: brief(one) for name, one in several.items()}
    return found.get("", found) or None


def write_result(output: Store, result: dict[str, Any], best: TrainConfig) -> None:
    """Write the report, the best configuration, and last the result, which says that the search is finished."""
    record = result["trials"][result["best"]["trial"] - 1]
    made = "committed by this run; the same --run-id returns at once" if result["best"]["trained"] else "free"
    comments = (
        f"The best of {len(result['trials'])} trials of search {result['run_id']}: trial {record['number']},"
        f" {result['metric']} {record['value']:.4f} on the validation rows.",
        f"python -m jobs.train --config {RECIPE_NAME} --run-id {result['run_id']}   (output.path is {made})",
    )
    output.replace(RECIPE_NAME, to_toml(best, comments).encode())
    output.replace(REPORT_NAME, search_report(result).encode())
    output.replace(RESULT_NAME, json.dumps(result, indent=1).encode())
