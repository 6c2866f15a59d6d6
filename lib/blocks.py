"""What happens to one block: read and tokenize, write, count. No Ray here: the pipeline calls these in its tasks.

A block is one or more whole chunks; which ones travels as its Arrow schema metadata.
"""

import io
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.archive import BAD_TEXT, BadShardError, Columns, read_row_groups
from lib.config import EngineChoice, PrecisionChoice, TokenPooling, Truncation, Trust
from lib.planning import Block, Chunk, RowGroup
from lib.publishing import FOOTER_KEY, read_record
from lib.reading import ChangedShardError, Rows, read_rows
from lib.schema import DEAD_LETTER_SCHEMA, DEAD_LETTER_TEXT, PredictionSchema, RowError, Task, label_name
from lib.storage import Store, explained
from lib.template import Prompt
from lib.tokenization import Tokenizer, Tokens
from lib.windows import Windows

IDS, TYPE_IDS, ERROR, TRUNCATED = "__ids", "__type_ids", "__error", "__truncated"
"""Columns that travel from reader to predictor beside the key columns."""

CHUNKS_KEY = b"textsweep.chunks"

SECONDS_KEY = b"textsweep.seconds"
"""How long a block has taken so far, by stage, as JSON. It travels with the block and stands in no object."""

SCORE_BINS = 20
"""Equal bins of the score from 0 to 1 that every object counts in its footer."""

LENGTH_EDGES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
"""The most tokens of a text in each bin of lengths; one more bin holds what is longer."""

SHOWN_ERROR_ROWS = 3
"""Rows of a chunk that are named for each reason of an error; the dead letters name all."""

OnFailure = Callable[[str], None]
"""Told why something could not be read or written, for the one line that the person on call sees."""


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """What every task of a run needs to know. Small: it travels with each of them."""

    archive: Store
    output: Store
    """the version's folder"""
    version: str
    columns: Columns
    schema: PredictionSchema
    model_url: str
    model_digest: str
    trust: Trust
    """what of the model's folder may be unpickled or run"""
    max_length: int
    truncation: Truncation
    windows: Windows | None
    prompt: Prompt | None
    precision: PrecisionChoice
    engine: EngineChoice
    embedding_pooling: TokenPooling | None
    """of the column that `schema` may have"""
    token_budget: int | None
    chunk_bytes: int


@dataclass(frozen=True)
class Footer:
    """What planning learns from one shard's footer."""

    shard: str
    row_groups: tuple[RowGroup, ...]
    problem: str | None
    """why it cannot be scored; None if it can"""


def read_block(job: ScoreJob, block: Block, tokenizer: Tokenizer, on_failure: OnFailure) -> list[pa.Table]:
    """Read and tokenize a block's chunks, leaving out those whose objects are there and those whose shards changed."""
    begun = time.perf_counter()
    todo = [chunk for chunk in block if job.output.info(chunk.name) is None]
    parts: list[pa.Table] = []
    for _, members in groupby(todo, key=lambda chunk: chunk.shard):
        try:
            parts.extend(read_chunks(job, list(members), tokenizer))
        except (ChangedShardError, BadShardError) as error:
            on_failure(str(error))
    if not parts:
        return []
    chunks = [record for part in parts for record in json.loads(part.schema.metadata[CHUNKS_KEY])]
    table = pa.concat_tables([part.replace_schema_metadata() for part in parts]).combine_chunks()
    named = table.replace_schema_metadata({CHUNKS_KEY: json.dumps(chunks).encode()})
    return [timed(named, "read", time.perf_counter() - begun)]


def name_of(table: pa.Table) -> str:
    """What a block is called: the name of its first chunk's object."""
    return Chunk(**json.loads(table.schema.metadata[CHUNKS_KEY])[0]).name


def timed(table: pa.Table, stage: str, seconds: float) -> pa.Table:
    """Write onto a block how long a stage took."""
    metadata = table.schema.metadata or {}
    known = json.loads(metadata.get(SECONDS_KEY, b"{}"))
    return table.replace_schema_metadata({**metadata, SECONDS_KEY: json.dumps({**known, stage: seconds}).encode()})


def read_chunks(job: ScoreJob, chunks: list[Chunk], tokenizer: Tokenizer) -> list[pa.Table]:
    """Read and tokenize chunks of one shard: tables of token ids, the first of which names the chunks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tables, at = [], chunks[0].start
    with explained(f"{job.archive.url}/{chunks[0].shard}", "read"):
        for chunk, rows in read_rows(job.archive, chunks, job.columns, job.chunk_bytes):
            at = max(at, chunk.start)
            tables.append(tokenize(tokenizer, pick(exclude(rows, at, chunk.excluded), at, chunk.only)))
            at += len(rows.errors)
    table = pa.concat_tables(tables).combine_chunks()
    return [table.replace_schema_metadata({CHUNKS_KEY: json.dumps([asdict(chunk) for chunk in chunks]).encode()})]


def exclude(rows: Rows, start: int, ranges: Sequence[Sequence[int]]) -> Rows:
    """Give rows in some ranges of the shard an error instead of their text; `start` is the first row's number."""
    if not ranges:
        return rows
    numbers = np.arange(start, start + len(rows.errors))
    out = np.any([(numbers >= first) & (numbers < last) for first, last in ranges], axis=0)
    good = rows.errors == RowError.NONE
    texts = tuple(column.filter(pa.array(~out[good])) for column in rows.texts)
    keys = rows.keys
    if BAD_TEXT in keys.column_names:
        found = keys[BAD_TEXT].to_pylist()
        sides = (column.filter(pa.array(out[good])).to_pylist() for column in rows.texts)
        for place, *joined in zip(np.flatnonzero(out & good), *sides, strict=True):
            found[place] = "\n".join(joined)
        keys = keys.set_column(keys.column_names.index(BAD_TEXT), BAD_TEXT, pa.array(found, pa.string()))
    return Rows(texts, np.where(out & good, RowError.CRASH, rows.errors).astype(np.uint8), keys)


def pick(rows: Rows, start: int, only: Sequence[int] | None) -> Rows:
    """Keep some rows, given by their numbers in the shard; `start` is the first row's number."""
    if only is None:
        return rows
    kept = np.isin(np.arange(start, start + len(rows.errors)), np.asarray(only, np.int64))
    good = rows.errors == RowError.NONE
    texts = tuple(column.filter(pa.array(kept[good])) for column in rows.texts)
    return Rows(texts, rows.errors[kept], rows.keys.filter(pa.array(kept)) if rows.keys.num_columns else rows.keys)


def tokenize(tokenizer: Tokenizer, rows: Rows) -> pa.Table:
    """Turn rows into the table that travels: ids (an empty list for a row with an error), flags, key columns. The text stays behind."""
    tokens = tokenizer.encode(*rows.texts)
    lengths = np.zeros(len(rows.errors), np.int32)
    truncated = np.zeros(len(rows.errors), np.bool_)
    good = rows.errors == RowError.NONE
    lengths[good], truncated[good] = tokens.lengths, tokens.truncated
    spread = Tokens(tokens.ids, lengths, truncated, tokens.type_ids)
    columns = {**dict(zip(rows.keys.column_names, rows.keys.columns, strict=True)), IDS: spread.id_lists()}
    if spread.type_ids is not None:
        columns[TYPE_IDS] = spread.type_id_lists()
    return pa.table({**columns, ERROR: pa.array(rows.errors), TRUNCATED: pa.array(truncated)})


def write_block(job: ScoreJob, table: pa.Table) -> pa.Table:
    """Cut a block back into its chunks and create one object for each, after checking every count.

    Returns one row a chunk, as JSON: what the object's footer says, its size, and how long it took by stage: the block's seconds
    are shared out by tokens.
    """
    spent: dict[str, float] = json.loads(table.schema.metadata.get(SECONDS_KEY, b"{}"))
    chunks = [Chunk(**record) for record in json.loads(table.schema.metadata[CHUNKS_KEY])]
    planned = sum(chunk.num_scored for chunk in chunks)
    assert table.num_rows == planned, (
        f"{[chunk.name for chunk in chunks]}: {table.num_rows} rows, planned were {planned}"
    )
    written, start = [], 0
    for chunk in chunks:
        begun = time.perf_counter()
        written.append(write_chunk(job, chunk, table.slice(start, chunk.num_scored)))
        written[-1]["seconds"] = {"write": time.perf_counter() - begun}
        start += chunk.num_scored
    total = sum(one["tokens"] + 1 for one in written)  # a chunk without a token has taken some time, too
    for one in written:
        share = (one["tokens"] + 1) / total
        one["seconds"] = {stage: seconds * share for stage, seconds in spent.items()} | one["seconds"]
    return pa.table({"result": [json.dumps(one) for one in written]})


def write_chunk(job: ScoreJob, chunk: Chunk, rows: pa.Table) -> dict[str, Any]:
    """Create a chunk's object, its dead letters first.

    Returns what its footer says, its size in bytes, and a few rows (counted in the shard) for each reason of an error.
    """
    every = np.arange(chunk.start, chunk.start + chunk.rows)
    numbers = pa.array(every if chunk.only is None else chunk.only, pa.int64())
    texts = [rows[BAD_TEXT].combine_chunks()] if BAD_TEXT in rows.column_names else []
    if texts:
        rows = rows.drop_columns([BAD_TEXT])
    if not job.schema.keys.names:
        shards = pa.repeat(pa.scalar(chunk.shard, pa.string()), chunk.num_scored)
        rows = pa.table([shards, numbers, *rows.columns], names=["shard", "row", *rows.column_names])
    error = rows[job.schema.prefix + "error"]
    bad = pc.is_valid(error)
    examples: dict[str, list[int]] = {}
    if pc.any(bad).as_py():
        shards = pa.repeat(pa.scalar(chunk.shard, pa.string()), chunk.num_scored)
        schema = DEAD_LETTER_SCHEMA.append(DEAD_LETTER_TEXT) if texts else DEAD_LETTER_SCHEMA
        letters = pa.table([shards, numbers, error.combine_chunks(), *texts], schema=schema)
        letters = letters.filter(bad)
        create(job, f"_dead_letter/{chunk.name}", letters)
        for reason in pc.unique(letters["error"]).to_pylist():
            of_it = letters.filter(pc.equal(letters["error"], reason))["row"]
            examples[reason] = of_it.slice(0, SHOWN_ERROR_ROWS).to_pylist()
    record = {
        "version": job.version,
        "shard": chunk.shard,
        "identity": chunk.identity,
        "chunk": chunk.index,
        "chunks": chunk.count,
        "start": chunk.start,
        "rows": chunk.num_scored,
        "selected": chunk.only is not None,
        **summarise(job.schema, rows),
    }
    footer = {FOOTER_KEY: json.dumps({**record, "label_order": label_order(job.schema)}).encode()}
    size = create(job, chunk.name, rows.cast(job.schema.columns.with_metadata(footer)))
    return {**record, "name": chunk.name, "bytes": size, "error_rows": examples}


def create(job: ScoreJob, name: str, table: pa.Table) -> int:
    """Write a table as one object, once; returns its size. One that is there already is as good: it holds the same rows."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    with explained(f"{job.output.url}/{name}", "write"):
        job.output.create(name, sink.getvalue())
    return len(sink.getvalue())


def summarise(schema: PredictionSchema, rows: pa.Table) -> dict[str, Any]:
    """Count what a chunk holds: errors by reason, labels, rows without one, tokens, truncated rows, histograms of scores and lengths."""
    prefix = schema.prefix
    errors = rows[f"{prefix}error"]
    labels: dict[str, int] = {}
    bins, abstained = np.zeros(SCORE_BINS, np.int64), 0
    for head in schema.heads:
        own = prefix + head.prefix
        scores = pc.list_flatten(rows[f"{own}scores"]) if head.task is Task.MULTI_LABEL else rows[f"{own}score"]
        bins += np.histogram(scores.drop_null().to_numpy(), bins=SCORE_BINS, range=(0, 1))[0]
        if head.task is not Task.REGRESSION:
            given = pc.list_flatten(rows[f"{own}labels"]) if head.task is Task.MULTI_LABEL else rows[f"{own}label"]
            labels |= {label_name(head, label): count for label, count in count_values(given).items()}
        if head.abstains:
            abstained += pc.sum(rows[f"{own}abstained"]).as_py() or 0
    return {
        "errors": count_values(errors),
        "labels": labels,
        "abstained": abstained,
        "tokens": int(pc.sum(rows[f"{prefix}num_tokens"]).as_py() or 0),
        "truncated": int(pc.sum(rows[f"{prefix}truncated"]).as_py() or 0),
        "score_bins": bins.tolist(),
        "length_bins": np.bincount(
            np.searchsorted(LENGTH_EDGES, rows[f"{prefix}num_tokens"].drop_null().to_numpy()),
            minlength=len(LENGTH_EDGES) + 1,
        ).tolist(),
    }


def label_order(schema: PredictionSchema) -> Any:
    """The labels in the order of probabilities; of several heads by their names."""
    if len(schema.heads) == 1:
        return schema.heads[0].labels
    return {head.name: head.labels for head in schema.heads}


def count_values(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each value stands in a column, nulls left out."""
    counted = column.drop_null().value_counts()
    return {
        entry["values"]: entry["counts"]
        for entry in sorted(counted.to_pylist(), key=lambda entry: str(entry["values"]))
    }


def read_footer(archive: Store, columns: Columns, shard: str) -> Footer:
    """Read one shard's footer."""
    try:
        with explained(f"{archive.url}/{shard}", "read"):
            return Footer(shard, tuple(read_row_groups(archive, shard, columns)), None)
    except BadShardError as error:
        return Footer(shard, (), str(error))
    except FileNotFoundError:
        return Footer(shard, (), "it was there when the archive was listed, and is gone")


def write_empty(job: ScoreJob, chunk: Chunk) -> dict[str, Any]:
    """Write the object of a chunk without rows: a block without rows would never reach the writer."""
    nothing = job.schema.columns.empty_table()
    return write_chunk(job, chunk, nothing if job.schema.keys.names else nothing.drop_columns(["shard", "row"]))


def read_result(job: ScoreJob, name: str) -> dict[str, Any]:
    """What an object that another attempt wrote says of itself, as `write_chunk` returns it."""
    return {**read_record(job.output, name), "name": name}
