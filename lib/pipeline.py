"""The scoring pipeline on Ray Data: read chunks and tokenize -> predict (actors) -> write one object per chunk.

One block of Ray Data is one or more whole chunks; which ones travels as the block's Arrow schema metadata. What Ray 2.60
needs for blocks to stay whole: a read task that returns one table, `override_num_blocks`, and no `target_max_block_size`.
"""

import contextlib
import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from lib import blocks as work
from lib.actors import PredictBlock
from lib.blocks import Footer, ScoreJob
from lib.checkpoint import fetch
from lib.cost import Meter
from lib.course import FINISHING
from lib.errors import BudgetError, UsageError, say
from lib.outcome import Outcome
from lib.planning import MAX_WAVE_BLOCKS, Block, Chunk, bundle, chunks_of, identity, select_rows
from lib.progress import Counts, end_actors, read_progress, start_progress
from lib.runtime import Layout, ray_session
from lib.score_config import LimitsSection
from lib.suspects import settle
from lib.tasks import MAX_ATTEMPTS, ChunkSource, read_footer_batch, share_tokenizer, start_reader, write_counted
from lib.tokenization import load_tokenizer
from lib.watch import Running, Show, Watch, explain_ray_error

Selected = Mapping[str, npt.NDArray[np.int64]]
"""Row numbers, sorted, by shard."""

MAX_FAILURES = 16
"""Tasks of one wave that may fail with an error before the wave is cut short to see whether the error stays."""

MAX_WAVE_REPEATS = 3
"""Times that what is missing after a wave that was cut short is run as a wave again."""

FOOTER_BATCHES_AHEAD = 64
"""Tasks that read footers while a wave is put together: 4,096 shards."""

FIRST_READERS = 2
"""Processes that start while a job is planned."""

IN_FLIGHT_BLOCKS = 2
"""Blocks waiting at each actor while it scores one: it is never idle, and one lost worker costs no more."""

LEAVE_SECONDS, LEAVE_POLL_SECONDS = 20.0, 0.05
"""Until the pipeline's threads have ended, which takes well under a second as a rule; a stopped job has 40 s in all."""


@contextlib.contextmanager
def readers_started() -> Iterator[None]:
    """Connect to the cluster that runs already; its first reading processes start, 3 s each, while the job is planned.

    Only where a CPU is free: the job may have nothing to do, and must not make an autoscaler add a node for that.
    """
    with ray_session():
        if ray.available_resources().get("CPU", 0) >= 1:
            for _ in range(FIRST_READERS):
                start_reader.remote()
        yield


def read_footers(run: Running, shards: pa.ChunkedArray, batch: int = 64) -> Iterator[Footer]:
    """Read the footers of shards with Ray tasks, in order; a few batches ahead of who asks, not all at once.

    Raises `IncompleteError` if none was read for `limits.stall_seconds`.
    """
    job = run.job
    starts = range(0, len(shards), batch)
    names = (shards.slice(start, batch).to_pylist() for start in starts)
    tasks = ((some, read_footer_batch.remote(job.archive, job.columns, some)) for some in names)
    pending = deque(islice(tasks, FOOTER_BATCHES_AHEAD))
    try:
        while pending:
            some, reference = pending[0]
            watch = Watch(run)
            while not ray.wait([reference], timeout=1)[0]:
                watch.look()
            pending.popleft()
            pending.extend(islice(tasks, 1))
            try:
                yield from ray.get(reference)
            except ray.exceptions.WorkerCrashedError:  # some damaged footers abort PyArrow's process: which one is it?
                yield from (read_footer_alone(job, shard) for shard in some)
    finally:
        for _, reference in pending:
            ray.cancel(reference)


def read_footer_alone(job: ScoreJob, shard: str) -> Footer:
    """Read one footer in a task of its own; one that kills its process makes a bad shard."""
    try:
        found: list[Footer] = ray.get(read_footer_batch.remote(job.archive, job.columns, [shard]))
    except ray.exceptions.WorkerCrashedError:
        return Footer(
            shard,
            (),
            "reading its footer kills the process: it is damaged in a way that the Parquet reader does not survive",
        )
    return found[0]


def build_dataset(job: ScoreJob, blocks: Sequence[Block], layout: Layout, tokenizer: Any, progress: Any) -> Dataset:
    """The three operators: read chunks and tokenize -> predict -> write."""
    dataset = ray.data.read_datasource(
        ChunkSource(blocks, job, tokenizer, progress),
        override_num_blocks=len(blocks),
        num_cpus=layout.task_cpus,
        concurrency=min(layout.num_readers or len(blocks), len(blocks)),
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
        max_task_retries=MAX_ATTEMPTS - 1,
    )
    return dataset.map_batches(
        lambda table: write_counted(job, table, progress),
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


def consume(dataset: Dataset, executor: Any, inbox: "queue.Queue[dict[str, Any] | Exception | None]") -> None:
    """Pull results off the pipeline until it ends, in a thread of its own, so that the main thread can print and be stopped.

    Not with `iter_batches`: it tells which executor it has only after the first result, and has four more threads inside Ray.
    """
    try:
        for bundle in dataset._build_bundle_iterator(executor):
            for block in bundle.blocks:
                results: pa.Table = ray.get(block.ref)  # type: ignore[call-overload]
                if results.num_rows:  # none, and no columns, if nothing of a block was left to score
                    for text in results["result"].to_pylist():
                        inbox.put(json.loads(text))
    except Exception as error:  # noqa: BLE001 - handed to the main thread, which raises it
        inbox.put(error)
    else:
        inbox.put(None)


def score(
    job: ScoreJob,
    shards: pa.Table,
    layout: Layout,
    limits: LimitsSection,
    show: Show,
    selected: Selected | None = None,
    meter: Meter | None = None,
    run_id: str | None = None,
    outcome: Outcome | None = None,
) -> Outcome:
    """Score all chunks of unfinished shards (columns path, identity), wave by wave; returns what came of it.

    Whoever wants to know what came of a run that ends with an error gives its `outcome`. With `selected`, only those rows of each shard. With a `meter` whose budget is spent before the work is done, what is in
    flight is dropped, and the outcome says so.

    Raises `IncompleteError` when the cluster or the storage fails for good; whatever was finished by then stays finished.
    """
    run = start(job, layout, limits, show, meter, run_id, outcome)
    blocks = bundle(with_rows(run, plan_chunks(run, shards, selected)), job.chunk_bytes)
    try:
        while wave := list(islice(blocks, MAX_WAVE_BLOCKS)):
            run_wave(run, wave)
            run.outcome.close_wave()
    except BudgetError as error:
        run.outcome.over_budget = error
    run.outcome.counts = read_progress(run.progress) or run.outcome.counts
    run.outcome.course.note(run.outcome.counts)
    run.outcome.course.begin(FINISHING)
    return run.outcome


def start(
    job: ScoreJob,
    layout: Layout,
    limits: LimitsSection,
    show: Show,
    meter: Meter | None = None,
    run_id: str | None = None,
    outcome: Outcome | None = None,
) -> Running:
    """What every task of a run shares, brought to the cluster."""
    tokenizer = load_tokenizer(
        fetch(job.model_url, job.trust), job.max_length, job.trust.code, job.truncation, job.windows, job.prompt
    )
    return Running(
        job=job,
        layout=layout,
        limits=limits,
        tokenizer=share_tokenizer(tokenizer),
        progress=start_progress(job.version),
        outcome=outcome or Outcome(),
        show=show,
        meter=meter,
        run_id=run_id,
    )


def with_rows(run: Running, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Yield the chunks that have rows; the objects of the others are written here."""
    for chunk in chunks:
        if chunk.rows:
            yield chunk
        else:
            run.add(work.write_empty(run.job, chunk))


def plan_chunks(run: Running, shards: pa.Table, selected: Selected | None) -> Iterator[Chunk]:
    """Read footers and yield every chunk; bad shards are noted."""
    job, outcome = run.job, run.outcome
    identities = (value.as_py() for value in shards["identity"])
    for footer, shard_identity in zip(read_footers(run, shards["path"]), identities, strict=True):
        if footer.problem is not None:
            outcome.bad_shards[footer.shard] = footer.problem
            continue
        chunks = chunks_of(footer.shard, shard_identity, footer.row_groups, job.chunk_bytes)
        for chunk in select_rows(chunks, selected[footer.shard]) if selected else chunks:
            outcome.plan(chunk)
            yield chunk


def run_wave(run: Running, blocks: Sequence[Block]) -> None:
    """Run one wave and settle every chunk of it: there, changed, or bad.

    What is missing is tried alone. If the wave was cut short because too many tasks failed, one missing chunk goes first:
    either it raises what is wrong, or the trouble is over and the rest is a wave again.
    """
    for _ in range(MAX_WAVE_REPEATS):
        run.outcome.course.begin_wave()
        cut_short = run_blocks(run, blocks)
        run.outcome.course.end_wave()
        missing = unsettled(run, blocks)
        if not cut_short or not missing:
            break
        run.outcome.course.begin("missing chunks")
        settle(run, missing[:1])
        blocks = list(bundle(missing[1:], run.job.chunk_bytes))
        if not blocks:
            return
    if missing:
        run.outcome.course.begin("missing chunks")
    settle(run, missing)
    run.outcome.missing.extend(chunk.name for chunk in unsettled(run, [tuple(missing)]))


def run_blocks(run: Running, blocks: Sequence[Block]) -> bool:
    """Run blocks through the pipeline and note their results; returns whether it was cut short after `MAX_FAILURES`.

    Raises `IncompleteError` if no micro-batch and no chunk was finished for `limits.stall_seconds`.
    """
    context = DataContext.get_current()
    context.target_max_block_size = None  # otherwise Ray cuts blocks in mid-chunk
    context.max_errored_blocks = -1  # what is missing afterwards is seen and settled
    context.max_consecutive_actor_init_deaths = 2 * run.layout.num_actors  # a node may be lost while its actors start
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(
        logging.CRITICAL
    )  # one progress line is ours; Ray's lines go to its log files
    context.print_on_execution_start = False
    dataset = build_dataset(run.job, blocks, run.layout, run.tokenizer, run.progress)
    operators = operator_names(dataset)
    # With equal remote arguments Ray fuses the read into the actor, which then reads S3 while the GPU waits.
    assert len(operators) == 3, f"expected reader, predictor and writer, Ray planned {operators}"
    before = read_progress(run.progress) or Counts()
    inbox: queue.Queue[dict[str, Any] | Exception | None] = queue.Queue()
    executor = dataset._create_executor()
    consumer = threading.Thread(target=consume, args=(dataset, executor, inbox), daemon=True)
    consumer.start()
    watch = Watch(run)
    try:
        while True:
            try:
                item = inbox.get(timeout=1)
            except queue.Empty:
                counts = watch.look()
                if counts and counts.mistake is not None:
                    raise UsageError(counts.mistake) from None
                if counts and counts.num_failures - before.num_failures > MAX_FAILURES:
                    return True
                continue
            if item is None:
                return False
            if isinstance(item, Exception):
                raise item
            run.add(item)
            watch.moved()
    except BudgetError:
        note_waiting(run, inbox)
        raise
    except ray.exceptions.RayError as error:
        run.outcome.counts = read_progress(run.progress) or run.outcome.counts
        raise explain_ray_error(error, run.outcome.counts) from error
    finally:
        leave(executor, consumer)
        end_actors(run.progress)


def leave(executor: Any, consumer: threading.Thread) -> None:
    """End the pipeline and wait for its two threads.

    Ray 2.60: a thread that waits inside Ray while another one leaves it ends the process, with exit code 1 and without a word.
    """
    deadline = time.monotonic() + LEAVE_SECONDS
    while consumer.is_alive() or executor.is_alive():
        if time.monotonic() > deadline:
            say(f"WARNING: Ray Data has not ended within {LEAVE_SECONDS:g} s; this process may end with exit code 1")
            return
        executor.shutdown(force=True)  # does nothing before the consumer has started it, and the second time
        (consumer if consumer.is_alive() else executor).join(LEAVE_POLL_SECONDS)


def note_waiting(run: Running, inbox: "queue.Queue[dict[str, Any] | Exception | None]") -> None:
    """Note the results that have come by now, without waiting for any: their objects are there."""
    with contextlib.suppress(queue.Empty):
        while isinstance(item := inbox.get_nowait(), dict):
            run.add(item)


def unsettled(run: Running, blocks: Sequence[Block]) -> list[Chunk]:
    """Chunks without a result that are still to do: their object is not there, and their shard is what it was."""
    job, outcome, left = run.job, run.outcome, []
    for chunk in (chunk for block in blocks for chunk in block if chunk.name not in outcome.finished):
        if chunk.shard in outcome.bad_shards:
            continue
        if job.output.info(chunk.name) is not None:
            run.add(work.read_result(job, chunk.name))
            continue
        now = job.archive.info(chunk.shard)
        if now is None or identity(now.size, now.etag, now.mtime_ns, job.chunk_bytes) != chunk.identity:
            outcome.changed.add(chunk.shard)
        else:
            left.append(chunk)
    return left
