"""The scoring pipeline on Ray Data: read chunks and tokenize -> predict (actors) -> write one object per chunk.

One block of Ray Data is one or more whole chunks; which ones travels as the block's Arrow schema metadata. What Ray 2.60
needs for blocks to stay whole: a read task that returns one table, `override_num_blocks`, and no `target_max_block_size`.
"""

import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata

from lib import blocks as work
from lib import checkpoint as checkpoints
from lib.archive import Columns
from lib.blocks import ERROR, IDS, TRUNCATED, TYPE_IDS, Footer, ScoreJob
from lib.config import LimitsSection, ScoreResources
from lib.errors import IncompleteError, TextsweepError, UsageError, raise_if_stopped
from lib.planning import MAX_WAVE_BLOCKS, Block, Chunk, bundle, chunks_of, identity
from lib.predictor import Predictor, to_results
from lib.progress import Counts, Progress, Reporter, end_actors, read_progress
from lib.runtime import Cluster
from lib.storage import Store

TASK_CPUS_WITHOUT_GPU = 0.25
"""Reading and tokenizing take under 5% of the time that a CPU forward pass takes: they share what the actor leaves."""

MAX_FAILED_BLOCKS = 16
"""Blocks of one wave that may fail and are tried again alone; more than that is no fluke, and the run ends."""

IN_FLIGHT_BLOCKS = 2
"""Blocks waiting at each actor while it scores one: it is never idle, and one lost worker costs no more."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a cluster is divided between readers, actors and writers."""

    num_actors: int
    actor_gpus: float
    actor_cpus: float
    task_cpus: float
    """of each reading and of each writing task"""
    threads: int
    """of one actor's forward pass on a CPU"""


def plan_layout(cluster: Cluster, wanted: ScoreResources) -> Layout:
    """Divide a cluster so that readers and writers always find a CPU: actors that take every CPU would wait for ever.

    Raises `UsageError` with the numbers if it cannot hold them.
    """
    if not cluster.cpus:
        raise UsageError(f"the cluster ({cluster}) has no CPU to read and write with; add a worker node")
    if cluster.gpus >= 1:
        actors = wanted.num_actors or int(cluster.gpus)
        if actors > cluster.gpus:
            raise UsageError(
                f"resources.num_actors = {actors}, one GPU each, but the cluster has {cluster}; ask for at most {int(cluster.gpus)}"
            )
        return Layout(num_actors=actors, actor_gpus=1, actor_cpus=0, task_cpus=min(1.0, cluster.cpus / 2), threads=1)
    smallest = min(node.cpus for node in cluster.nodes if node.cpus)
    nodes = [node for node in cluster.nodes if node.cpus]
    actors = wanted.num_actors or len(nodes)
    per_node = math.ceil(actors / len(nodes))
    share = max(smallest - 1, smallest / 2) / per_node
    if share < TASK_CPUS_WITHOUT_GPU:
        most = int(max(smallest - 1, smallest / 2) / TASK_CPUS_WITHOUT_GPU) * len(nodes)
        raise UsageError(
            f"resources.num_actors = {actors} leaves {share:.2g} CPUs for each, but the cluster has {cluster}; ask for at most {most}"
        )
    threads = max(1, int(min(smallest, os.cpu_count() or 1) / per_node))
    actor_cpus = math.floor(share * 100) / 100
    task_cpus = TASK_CPUS_WITHOUT_GPU if actor_cpus != TASK_CPUS_WITHOUT_GPU else TASK_CPUS_WITHOUT_GPU - 0.05
    return Layout(num_actors=actors, actor_gpus=0, actor_cpus=actor_cpus, task_cpus=task_cpus, threads=threads)


class ChunkSource(Datasource):
    """One read task per block; each returns one table."""

    def __init__(self, blocks: Sequence[Block], job: ScoreJob, progress: Any) -> None:
        super().__init__()
        self.blocks, self.job, self.progress = blocks, job, progress

    def get_name(self) -> str:
        """The operator's name in Ray's progress and dashboard."""
        return "Chunks"

    def estimate_inmemory_data_size(self) -> int | None:
        """Text in all blocks, in bytes."""
        return sum(chunk.text_bytes for block in self.blocks for chunk in block)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """A task for each block, however many Ray would like."""
        return [self._task(block) for block in self.blocks]

    def _task(self, block: Block) -> ReadTask:
        job, progress = self.job, self.progress
        rows = sum(chunk.rows for chunk in block)
        size = sum(chunk.text_bytes for chunk in block)
        metadata = BlockMetadata(num_rows=rows, size_bytes=size, input_files=None, exec_stats=None)
        return ReadTask(lambda: work.read_block(job, block, progress.fail.remote), metadata)


class PredictBlock:
    """The actor: a model loaded once, then blocks of token ids in, blocks of predictions out."""

    def __init__(self, job: ScoreJob, threads: int, progress: Any) -> None:
        ray.get(progress.enlist.remote(ray.get_runtime_context().current_actor))
        try:
            loaded = checkpoints.load(job.model_url, job.max_length, job.trust)
            if loaded.digest != job.model_digest:
                raise UsageError(
                    f"model.path {job.model_url}: on this node it is not the model that the run was planned with;"
                    " give every node the same folder, and do not change a model in place"
                )
            self.predictor = Predictor(loaded, job.precision, job.token_budget, threads)
        except TextsweepError as error:
            ray.get(progress.fail.remote(str(error), isinstance(error, UsageError)))
            raise
        self.job = job
        self.report = Reporter(progress)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Score a block: key columns and the columns that scoring adds, rows in the order they came."""
        ids = table[IDS].combine_chunks()
        errors = table[ERROR].to_numpy()
        offsets = ids.offsets.to_numpy()
        type_ids = table[TYPE_IDS].combine_chunks().values.to_numpy() if TYPE_IDS in table.column_names else None
        scores = self.predictor.probabilities(ids.values.to_numpy(), offsets, type_ids, self.report)
        self.report.flush()
        results = to_results(
            self.job.schema, self.job.thresholds, scores, np.diff(offsets), table[TRUNCATED].to_numpy(), errors
        )
        carried = self.job.columns.carried.names
        keys = [table[name].combine_chunks() for name in carried]
        named = pa.table(
            [*keys, *(column.combine_chunks() for column in results.columns)],
            names=[*carried, *results.column_names],
        )
        return named.replace_schema_metadata(table.schema.metadata)


@ray.remote(num_cpus=0.25)
def read_footer_batch(archive: Store, columns: Columns, shards: list[str]) -> list[Footer]:
    """Read the footers of some shards; one that cannot be read says why."""
    return [work.read_footer(archive, columns, shard) for shard in shards]


def read_footers(job: ScoreJob, shards: Sequence[str], batch: int = 64) -> Iterator[Footer]:
    """Read the footers of shards with Ray tasks, in order."""
    pending = [
        read_footer_batch.remote(job.archive, job.columns, list(shards[start : start + batch]))
        for start in range(0, len(shards), batch)
    ]
    for reference in pending:
        while not ray.wait([reference], timeout=1)[0]:
            raise_if_stopped()
        yield from ray.get(reference)


def build_dataset(job: ScoreJob, blocks: Sequence[Block], layout: Layout, progress: Any) -> Dataset:
    """The three operators: read chunks and tokenize -> predict -> write."""
    dataset = ray.data.read_datasource(
        ChunkSource(blocks, job, progress),
        override_num_blocks=len(blocks),
        num_cpus=layout.task_cpus,
    )
    # `map_batches` refuses whole blocks as batches on GPUs, and any batch size cuts or mixes chunks; this is what it calls.
    dataset = dataset.map_batches_internal(
        PredictBlock,
        fn_constructor_args=(job, layout.threads, progress),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=layout.actor_cpus,
        num_gpus=layout.actor_gpus,
        compute=ActorPoolStrategy(size=layout.num_actors, max_tasks_in_flight_per_actor=IN_FLIGHT_BLOCKS),
    )
    return dataset.map_batches(
        lambda table: work.write_block(job, table, progress.fail.remote),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=layout.task_cpus,
    )


def operator_names(dataset: Dataset) -> list[str]:
    """Names of the physical operators that Ray would run, first to last."""
    from ray.data._internal.logical.optimizers import get_execution_plan

    plan = get_execution_plan(dataset._logical_plan)
    operator, names = (plan[0] if isinstance(plan, tuple) else plan).dag, []
    while operator.input_dependencies:
        names.append(operator.name)
        operator = operator.input_dependencies[0]
    return names[::-1]


@dataclass
class Outcome:
    """What a run did, kept up to date while it goes on."""

    planned: dict[str, Chunk] = field(default_factory=dict)
    """chunks this run set out to do, by object name"""
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """what the objects say, by name"""
    bad_shards: dict[str, str] = field(default_factory=dict)
    """shards without a readable footer or the right columns, and why"""
    changed: set[str] = field(default_factory=set)
    """shards whose content was not the planned one any more"""
    missing: list[str] = field(default_factory=list)
    """objects that are not there after every attempt"""
    counts: Counts = field(default_factory=Counts)

    @property
    def planned_rows(self) -> int:
        """Rows that this run knows it has to do."""
        return sum(chunk.rows for chunk in self.planned.values())

    @property
    def finished_rows(self) -> int:
        """Rows in objects that are there."""
        return sum(int(result["rows"]) for result in self.results.values())


Show = Callable[[Outcome], None]
"""Called about once a second, and after every chunk."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """A run that is going on."""

    job: ScoreJob
    layout: Layout
    stall_seconds: float
    progress: Any
    """handle of the `Progress` actor"""
    outcome: Outcome
    show: Show


def score_wave(run: Running, blocks: Sequence[Block], max_failed: int) -> Iterator[dict[str, Any] | None]:
    """Run blocks through the pipeline; yields each chunk's result as its object appears, and None at least once a second.

    Raises `IncompleteError` if no micro-batch and no chunk was finished for `stall_seconds`, and what Ray raises if more
    than `max_failed` blocks fail.
    """
    context = DataContext.get_current()
    context.target_max_block_size = None  # otherwise Ray cuts blocks in mid-chunk
    context.max_errored_blocks = max_failed
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # one progress line is ours; Ray's go to its log files
    context.print_on_execution_start = False
    dataset = build_dataset(run.job, blocks, run.layout, run.progress)
    operators = operator_names(dataset)
    # With equal remote arguments Ray fuses the read into the actor, which then reads S3 while the GPU waits.
    assert len(operators) == 3, f"expected reader, predictor and writer, Ray planned {operators}"
    inbox: queue.Queue[dict[str, Any] | Exception | None] = queue.Queue()
    threading.Thread(target=consume, args=(dataset, inbox), daemon=True).start()
    moved_at, batches = time.monotonic(), -1
    while True:
        try:
            item = inbox.get(timeout=1)
        except queue.Empty:
            counts = read_progress(run.progress)
            if counts and counts.batches != batches:
                moved_at, batches = time.monotonic(), counts.batches
            if time.monotonic() - moved_at > run.stall_seconds:
                raise IncompleteError(describe_stall(run.stall_seconds, counts, run.layout)) from None
            yield None
            continue
        if item is None:
            return
        if isinstance(item, Exception):
            raise item
        moved_at = time.monotonic()
        yield item


def consume(dataset: Dataset, inbox: "queue.Queue[dict[str, Any] | Exception | None]") -> None:
    """Pull results off the pipeline until it ends, in a thread of its own, so that the main thread can print and be stopped."""
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for text in pa.table(table)["result"].to_pylist():
                inbox.put(json.loads(text))
    except Exception as error:  # noqa: BLE001 - handed to the main thread, which raises it
        inbox.put(error)
    else:
        inbox.put(None)


def explain_ray_error(error: ray.exceptions.RayError, counts: Counts) -> Exception:
    """Turn what Ray raises when a run cannot go on into our error; Ray keeps causes as text only, so tasks report theirs.

    An error in a task that reported nothing is a bug and comes back as it is.
    """
    if counts.mistake is not None:
        return UsageError(counts.mistake)
    again = "finished chunks are kept, run the same command again"
    if counts.failures:
        return IncompleteError(f"{'; '.join(counts.failures)}; {again}")
    if isinstance(error, ray.exceptions.RayTaskError):
        return error
    return IncompleteError(f"Ray gave up: {type(error).__name__}: {str(error).strip()[-500:]}; {again}")


def describe_stall(stall_seconds: float, counts: Counts | None, layout: Layout) -> str:
    """Say what the run sees when nothing moves."""
    free = ray.available_resources()
    seen = f"{free.get('CPU', 0):g} of {ray.cluster_resources().get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free"
    causes = f"; reported: {'; '.join(counts.failures)}" if counts and counts.failures else ""
    return f"no micro-batch was finished for {stall_seconds:g} s (limits.stall_seconds); {seen}, {layout.num_actors} actors were asked for{causes}; run the same command again"


def score(job: ScoreJob, shards: pa.Table, layout: Layout, limits: LimitsSection, show: Show) -> Outcome:
    """Score all chunks of unfinished shards (columns path, identity), wave by wave; returns what came of it.

    What is missing after a wave is tried once more, a block for each chunk. Raises `IncompleteError` when the cluster
    or the storage fails for good; whatever was finished by then stays finished.
    """
    progress = Progress.remote()  # type: ignore[attr-defined]
    run = Running(
        job=job, layout=layout, stall_seconds=limits.stall_seconds, progress=progress, outcome=Outcome(), show=show
    )
    identities = dict(zip(shards["path"].to_pylist(), shards["identity"].to_pylist(), strict=True))
    blocks = bundle(plan_chunks(job, identities, run.outcome), job.chunk_bytes)
    while wave := list(islice(blocks, MAX_WAVE_BLOCKS)):
        run_wave(run, wave)
    return run.outcome


def plan_chunks(job: ScoreJob, identities: dict[str, str], outcome: Outcome) -> Iterator[Chunk]:
    """Read footers and yield the chunks that have rows; empty ones are written here, bad shards noted."""
    for footer in read_footers(job, list(identities)):
        if footer.problem is not None:
            outcome.bad_shards[footer.shard] = footer.problem
            continue
        for chunk in chunks_of(footer.shard, identities[footer.shard], footer.row_groups, job.chunk_bytes):
            outcome.planned[chunk.name] = chunk
            if chunk.rows:
                yield chunk
            else:
                outcome.results[chunk.name] = work.write_empty(job, chunk)


def run_wave(run: Running, blocks: Sequence[Block]) -> None:
    """Run one wave, then whatever is missing of it once more, and settle every chunk: there, changed, or missing.

    The second time the first failure is raised: what fails twice is no fluke.
    """
    collect(run, blocks, MAX_FAILED_BLOCKS)
    missing = unsettled(run, blocks)
    if missing:
        alone = [(chunk,) for chunk in missing]
        collect(run, alone, max_failed=0)
        run.outcome.missing.extend(chunk.name for chunk in unsettled(run, alone))


def collect(run: Running, blocks: Sequence[Block], max_failed: int) -> None:
    """Run blocks and note their results as they come."""
    outcome = run.outcome
    try:
        for result in score_wave(run, blocks, max_failed):
            if result is not None:
                outcome.results[result["name"]] = result
            outcome.counts = read_progress(run.progress) or outcome.counts
            run.show(outcome)
            raise_if_stopped()
    except ray.exceptions.RayError as error:
        outcome.counts = read_progress(run.progress) or outcome.counts
        raise explain_ray_error(error, outcome.counts) from error
    finally:
        end_actors(run.progress)


def unsettled(run: Running, blocks: Sequence[Block]) -> list[Chunk]:
    """Chunks without a result that are still to do: their object is not there, and their shard is what it was."""
    job, outcome, left = run.job, run.outcome, []
    for chunk in (chunk for block in blocks for chunk in block if chunk.name not in outcome.results):
        if job.output.info(chunk.name) is not None:
            outcome.results[chunk.name] = work.read_result(job, chunk.name)
            continue
        now = job.archive.info(chunk.shard)
        if now is None or identity(now.size, now.etag, now.mtime_ns, job.chunk_bytes) != chunk.identity:
            outcome.changed.add(chunk.shard)
        else:
            left.append(chunk)
    return left
