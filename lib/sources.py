"""Rows to learn from: Parquet cut into blocks, and the Ray Data tasks that turn each block into one file of token ids, once."""

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from pandas.util import hash_array

from lib.archive import BadShardError, Columns, list_shards, read_row_groups
from lib.errors import IncompleteError, TextsweepError, UsageError, at_work
from lib.mapped import SHARD_KEY
from lib.planning import Chunk, bundle, chunks_of, with_identities
from lib.reading import ChangedShardError, Rows, read_rows
from lib.schema import RowError
from lib.storage import Store, explained
from lib.tokenization import Tokenizer

BLOCK_BYTES = 16 * 2**20
"""Text of one tokenizing task: seconds of work, and no more than a few hundred tasks for gigabytes."""

INDEX_NAME = "index.json"

Tokenizers = TypeVar("Tokenizers", bound=tuple[Tokenizer, ...])


@dataclass(frozen=True, kw_only=True)
class Source:
    """The shards of one set, and how to read them."""

    name: str
    """train, valid or test"""
    store: Store
    blocks: tuple[tuple[Chunk, ...], ...]
    columns: Columns
    """the text, and as key columns what else is learned from"""
    fingerprint: str
    """of the listing: path and identity of every shard"""
    block_bytes: int
    """text of one chunk, which the shards' identities tell of"""


def find_source(name: str, path: str, columns_of: Callable[[Store, str], Columns]) -> Source:
    """List one set and cut it into blocks for tokenizing; reads footers only. Raises `UsageError`.

    `columns_of` says what is read, given the first shard, or raises `BadShardError`.
    """
    store, shards = list_shards(path, key=f"{name}.path")
    shards = with_identities(shards, BLOCK_BYTES)
    chunks: list[Chunk] = []
    columns: Columns | None = None
    for shard, shard_identity in zip(shards["path"].to_pylist(), shards["identity"].to_pylist(), strict=True):
        try:
            with explained(f"{store.url}/{shard}", "read"):
                columns = columns or columns_of(store, shard)
                groups = read_row_groups(store, shard, columns)
        except BadShardError as error:
            raise UsageError(
                f"{name}.path: {store.url}/{shard}: {error}; set the train.*_column keys, or mend the file"
            ) from None
        chunks += [chunk for chunk in chunks_of(shard, shard_identity, groups, BLOCK_BYTES) if chunk.rows]
    assert columns is not None
    listing = shards.select(["path", "identity"]).to_pylist()
    return Source(
        name=name,
        store=store,
        blocks=tuple(bundle(chunks, BLOCK_BYTES)),
        columns=columns,
        fingerprint=hashlib.sha256(json.dumps([store.url, listing]).encode()).hexdigest()[:16],
        block_bytes=BLOCK_BYTES,
    )


def fingerprint_of(sources: Sequence[Source]) -> str:
    """Of all files that are learned from, and of their order."""
    return hashlib.sha256("|".join(source.fingerprint for source in sources).encode()).hexdigest()[:16]


def read_index(folder: Store, fingerprint: str) -> bytes | None:
    """The index that an earlier attempt of this run left beside its tokenized rows, as JSON, if there is one.

    Raises `UsageError` if the files have changed since.
    """
    kept = folder.read(INDEX_NAME)
    before = fingerprint if kept is None else json.loads(kept)["fingerprint"]
    if before != fingerprint:
        raise UsageError(
            f"{folder.url}: this run was started with other files than there are now (fingerprint {before}, now {fingerprint});"
            " give the run another --run-id"
        )
    return kept


def items_of(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """One item for each block of each set, in plain types: what a tokenizing task is told."""
    return [
        {"set": source.name, "number": number, "chunks": json.dumps([asdict(chunk) for chunk in block])}
        for source in sources
        for number, block in enumerate(source.blocks)
    ]


def tokenize_all(
    items: list[dict[str, Any]], tokenize_block: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Run one Ray Data task for each item; the tasks write files, what comes back is a report for each, in the items' order."""

    def tokenize(batch: pa.Table) -> pa.Table:
        return pa.table({"report": [json.dumps(report_of(tokenize_block, item)) for item in batch.to_pylist()]})

    if not items:
        return []
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    blocks = ray.data.from_items(items, override_num_blocks=len(items))
    found = blocks.map_batches(tokenize, batch_size=None, batch_format="pyarrow").take_all()
    reports = [json.loads(row["report"]) for row in found]
    for report in reports:
        if "failure" in report:
            raise (UsageError if report["is_usage"] else IncompleteError)(report["failure"])
    assert len(reports) == len(items), f"{len(items)} blocks were to be tokenized, {len(reports)} came back"
    return sorted(reports, key=lambda one: (one["set"], one["number"]))


def report_of(tokenize_block: Callable[[dict[str, Any]], dict[str, Any]], item: dict[str, Any]) -> dict[str, Any]:
    """What came of one block. An error is a report, too: what a task raises comes back wrapped, its type lost."""
    try:
        with at_work():
            return tokenize_block(item)
    except TextsweepError as error:
        return {"failure": str(error), "is_usage": isinstance(error, UsageError)}


def share(load: Callable[[], Tokenizers]) -> Callable[[], Tokenizers]:
    """What gives a tokenizing task its tokenizers: those that this process has loaded, which travel ready made.

    Loading them imports torch and transformers: 4.8 s of CPU in each of a cluster's processes, where the task without it starts
    in 1.4 (measured). One that is written in Python does not travel; each process loads it for itself.
    """
    tokenizers = load()
    return load if any(one.backend is None for one in tokenizers) else lambda: tokenizers


def read_block(source: Source, chunks: list[Chunk]) -> Iterator[tuple[str, int, Rows]]:
    """Read chunks, shard by shard: the shard, the number in it of the first row, the rows.

    Raises `IncompleteError` if a shard is not the one that was listed.
    """
    for shard, group in itertools.groupby(chunks, key=lambda chunk: chunk.shard):
        where = f"{source.store.url}/{shard}"
        try:
            with explained(where, "read"):
                read = 0
                before: Chunk | None = None
                for chunk, rows in read_rows(source.store, list(group), source.columns, source.block_bytes):
                    read = read if chunk is before else 0
                    yield shard, chunk.start + read, rows
                    before, read = chunk, read + len(rows.errors)
        except (ChangedShardError, BadShardError) as error:
            raise IncompleteError(f"{source.name}.path: {where} changed while it was read: {error}") from error


def unreadable(rows: Rows) -> Counter[str]:
    """How many rows have no text that can be used, by reason."""
    counts = {error: int((rows.errors == error).sum()) for error in RowError if error is not RowError.NONE}
    return Counter({f"{error.name.lower()} text": count for error, count in counts.items() if count})


def write_batches(folder: Store, name: str, batches: Sequence[pa.RecordBatch], shards: Sequence[str] = ()) -> None:
    """Write record batches as one uncompressed Arrow file, which can be memory-mapped; `shards`: the file that each comes from."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batches[0].schema) as writer:
        for batch, shard in itertools.zip_longest(batches, shards):
            writer.write_batch(batch, custom_metadata=None if shard is None else {SHARD_KEY: shard})
    folder.replace(name, sink.getvalue().to_pybytes())


def hash_texts(sides: Sequence[pa.Array]) -> npt.NDArray[np.uint64]:
    """A number for each text, or pair of texts, that tells equal ones."""
    found = np.zeros(len(sides[0]), np.uint64)
    for side in sides:
        found = found * np.uint64(0x9E3779B97F4A7C15) + hash_array(side.to_numpy(zero_copy_only=False))
    return found
