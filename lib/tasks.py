"""What a run's tasks do: read footers, read and tokenize blocks, write them.

A process that reads or writes imports neither torch nor transformers: that would be half of its start and more than half of its
memory (torch alone 1.9 of 3.9 s and 220 of 400 MB), and a cluster starts many. The tokenizer comes ready made from the driver.
"""

import functools
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from lib import blocks as work
from lib.archive import Columns
from lib.blocks import Footer, ScoreJob
from lib.checkpoint import fetch
from lib.planning import Block
from lib.progress import reported
from lib.sampling import Sampled, Window, sample_shard
from lib.storage import Store
from lib.tokenization import Tokenizer, load_tokenizer

MAX_ATTEMPTS = 3
"""Times that a block is tried in the pipeline if it, or a neighbour, kills its worker."""


class ChunkSource(Datasource):
    """One read task per block; each returns one table."""

    def __init__(self, blocks: Sequence[Block], job: ScoreJob, tokenizer: Any, progress: Any) -> None:
        super().__init__()
        self.blocks, self.job, self.tokenizer, self.progress = blocks, job, tokenizer, progress

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
        job, tokenizer, progress = self.job, self.tokenizer, self.progress
        rows = sum(chunk.num_scored for chunk in block)
        size = sum(chunk.text_bytes for chunk in block)
        metadata = BlockMetadata(num_rows=rows, size_bytes=size, input_files=None, exec_stats=None)
        return ReadTask(lambda: read_counted(job, block, tokenizer, progress), metadata)


def read_counted(job: ScoreJob, block: Block, tokenizer: Any, progress: Any) -> list[pa.Table]:
    """Read a block, unless that has killed its worker too often: Ray Data retries a task for ever, and takes no limit."""
    if ray.get(progress.count_read.remote(block[0].name)) > MAX_ATTEMPTS:
        progress.note.remote(f"{block[0].shard}: reading it killed its worker {MAX_ATTEMPTS} times")
        return []
    with reported(progress):
        tables = work.read_block(job, block, get_tokenizer(tokenizer, job), progress.note.remote)
    for table in tables:
        progress.queue.remote(work.name_of(table))
    return tables


def write_counted(job: ScoreJob, table: pa.Table, progress: Any) -> pa.Table:
    """Write a block."""
    with reported(progress):
        return work.write_block(job, table)


@ray.remote(num_cpus=0.25)
def start_reader() -> None:
    """Do nothing: the process that does it has imported what reading needs, and stays for `read_footer_batch`."""


@ray.remote(num_cpus=0.25, max_retries=1)
def read_footer_batch(archive: Store, columns: Columns, shards: list[str]) -> list[Footer]:
    """Read the footers of some shards; one that cannot be read says why."""
    return [work.read_footer(archive, columns, shard) for shard in shards]


@ray.remote(num_cpus=0.25, max_retries=1)
def sample_shards(
    job: ScoreJob, windows: dict[tuple[str, str], list[Window]], tokenizer: Any, whole: bool
) -> list[Sampled]:
    """Read and tokenize windows of some shards, which are named with their identities."""
    known = get_tokenizer(tokenizer[0], job)
    return [sample_shard(job, shard, content, some, known, whole) for (shard, content), some in windows.items()]


def share_tokenizer(tokenizer: Tokenizer) -> Any:
    """Give a tokenizer to all tasks: a reference; None for one that is written in Python, which each process loads for itself."""
    return None if tokenizer.backend is None else ray.put(tokenizer)


def get_tokenizer(shared: Any, job: ScoreJob) -> Tokenizer:
    """The run's tokenizer, the same object in all tasks of one process: it remembers words."""
    if shared is not None:
        return get_once(shared)
    return load_tokenizer(
        fetch(job.model_url, job.trust), job.max_length, job.trust.code, job.truncation, job.windows, job.prompt
    )


@functools.lru_cache(maxsize=2)
def get_once(reference: Any) -> Tokenizer:
    """What a reference stands for."""
    found: Tokenizer = ray.get(reference)
    return found
