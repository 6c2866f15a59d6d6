"""Labelled rows: from Parquet to a memory-mapped set of token ids and labels that every training worker maps.

Text is tokenized once, by Ray Data tasks over blocks of chunks, with the code that scoring uses. Each block becomes
one uncompressed Arrow file beside the run's checkpoints. Rows without a usable text or label are left out and counted.
"""

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from pandas.util import hash_array
from pydantic import BaseModel, ConfigDict

from lib.archive import (
    BadShardError,
    Columns,
    check_columns,
    find_type,
    key_type,
    list_shards,
    open_parquet,
    read_row_groups,
)
from lib.checkpoint import fetch
from lib.config import TrainConfig, TrainModelSection
from lib.errors import IncompleteError, TextsweepError, UsageError, nearest
from lib.mapped import SHARD_KEY
from lib.planning import Chunk, bundle, chunks_of, with_identities
from lib.reading import ChangedShardError, Rows, read_rows
from lib.schema import RowError, Task
from lib.storage import Store, explained
from lib.tokenization import load_tokenizer

IntArray = npt.NDArray[np.int64]

BLOCK_BYTES = 16 * 2**20
"""Text of one tokenizing task: seconds of work, and no more than a few hundred tasks for gigabytes."""

SETS = ("train", "valid", "test")

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Tokens: of how many texts are longer, the report tells."""

SAMPLED_ROWS = 1000
"""Of each tokenizing task, whose lengths are counted: to know them, texts are tokenized to their end."""

INDEX_NAME = "index.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The shards of one labelled set, and how to read them."""

    name: str
    """train, valid or test"""
    store: Store
    blocks: tuple[tuple[Chunk, ...], ...]
    columns: Columns
    """the text, and as key columns the label and perhaps a weight"""
    task: Task
    fingerprint: str
    """of the listing: path and identity of every shard"""


class LabelledIndex(BaseModel):
    """What the tokenized sets hold; small, kept as JSON beside the data."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    task: Task
    labels: tuple[str, ...]
    files: dict[str, list[str]]
    """Arrow files of each set, in row order, relative to the data's folder"""
    rows: dict[str, int]
    dropped: dict[str, dict[str, int]]
    """rows left out of each set, by reason"""
    label_counts: dict[str, dict[str, int]]
    sampled: dict[str, int]
    """rows of each set whose length was counted"""
    longer: dict[str, dict[int, int]]
    """how many of those are longer than so many tokens"""


def find_sources(config: TrainConfig) -> list[Source]:
    """List the labelled sets and check every shard's columns. Raises `UsageError`; reads footers only."""
    paths = {"train": config.train.path, "valid": config.valid.path, "test": config.test.path}
    sources = [find_source(name, path, config) for name, path in paths.items() if path is not None]
    for source in sources[1:]:
        if source.task is not sources[0].task:
            raise UsageError(
                f"{source.name}.path {paths[source.name]}: column {config.train.label_column!r} is {source.task.value},"
                f" in train.path it is {sources[0].task.value}; expected the same kind of labels in all sets"
            )
    return sources


def find_source(name: str, path: str, config: TrainConfig) -> Source:
    """List one labelled set and cut it into blocks for tokenizing."""
    store, shards = list_shards(path, key=f"{name}.path")
    text = config.train.text_column
    label, regression = config.train.label_column, config.train.regression
    weight = config.train.weight_column if name == "train" else None
    shards = with_identities(shards, BLOCK_BYTES)
    chunks: list[Chunk] = []
    columns: Columns | None = None
    for shard, shard_identity in zip(shards["path"].to_pylist(), shards["identity"].to_pylist(), strict=True):
        try:
            with explained(f"{store.url}/{shard}", "read"):
                columns = columns or labelled_columns(
                    store, shard, (text,) if isinstance(text, str) else text, label, regression, weight
                )
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
        task=task_of(columns.keys.field(label).type),
        fingerprint=hashlib.sha256(json.dumps([store.url, listing]).encode()).hexdigest()[:16],
    )


def task_of(label: pa.DataType) -> Task:
    """What a label of some type asks for."""
    if pa.types.is_floating(label):
        return Task.REGRESSION
    return Task.MULTI_LABEL if is_list(label) else Task.MULTI_CLASS


def labelled_columns(
    store: Store, shard: str, text: tuple[str, ...], label: str, regression: bool, weight: str | None
) -> Columns:
    """Look at a shard's columns: is there text, a label of a kind to learn, a weight? Raises `BadShardError`."""
    parquet, watched = open_parquet(store, shard)
    schema = parquet.schema_arrow
    watched.close()
    check_columns(schema, shard, Columns(text=text, keys=pa.schema([])))
    if label not in schema.names:
        raise BadShardError(
            f"label column {label!r} is missing{nearest(label, schema.names)} (there are: {', '.join(schema.names)})"
        )
    found = find_type(schema, label)
    kind = value_kind(found)
    if regression:
        if is_list(found) or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise BadShardError(f"label column {label!r} is {found}, train.regression expects numbers")
        target = pa.float64()
    else:
        if pa.types.is_null(found) or not (pa.types.is_integer(kind) or pa.types.is_string(kind)):
            advice = "; to predict the number itself: train.regression = true" if pa.types.is_floating(kind) else ""
            raise BadShardError(
                f"label column {label!r} is {found}, expected strings, whole numbers, or lists of them (multi-label){advice}"
            )
        target = found if is_list(found) else pa.int64() if pa.types.is_integer(kind) else kind
    keys = [(label, target)]
    if weight is not None:
        kind = find_type(schema, weight)
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise BadShardError(f"weight column {weight!r} is {kind}, expected numbers")
        keys.append((weight, pa.float64()))
    return Columns(text=text, keys=pa.schema(keys))


def is_list(found: pa.DataType) -> bool:
    """Whether a column's values are lists, of whatever kind."""
    return any(test(found) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def value_kind(found: pa.DataType) -> pa.DataType:
    """The plain type of one label."""
    return key_type(found.value_type if is_list(found) else found)


def prepare(config: TrainConfig, sources: Sequence[Source], base: str, max_length: int, folder: Store) -> LabelledIndex:
    """Tokenize all sets into `folder`, or take what an earlier attempt of this run left there.

    Raises `UsageError` if labels do not fit together, or if the rows have changed since the earlier attempt.
    """
    fingerprint = hashlib.sha256("|".join(source.fingerprint for source in sources).encode()).hexdigest()[:16]
    kept = folder.read(INDEX_NAME)
    if kept is not None:
        index = LabelledIndex.model_validate_json(kept)
        if index.fingerprint != fingerprint:
            raise UsageError(
                f"{folder.url}: this run was started with other labelled files than there are now (fingerprint"
                f" {index.fingerprint}, now {fingerprint}); give the run another --run-id"
            )
        return index
    items = [
        {"set": source.name, "number": number, "chunks": json.dumps([asdict(chunk) for chunk in block])}
        for source in sources
        for number, block in enumerate(source.blocks)
    ]
    reports = (
        tokenize_all(items, {source.name: source for source in sources}, base, config.model, max_length, folder)
        if items
        else []
    )
    index = build_index(fingerprint, sources, reports, config)
    folder.replace(INDEX_NAME, index.model_dump_json().encode())
    return index


def tokenize_all(
    items: list[dict[str, Any]],
    sources: dict[str, Source],
    base: str,
    model: TrainModelSection,
    max_length: int,
    folder: Store,
) -> list[dict[str, Any]]:
    """Run one Ray Data task for each item; the tasks write files, what comes back is a report for each."""

    def tokenize(batch: pa.Table) -> pa.Table:
        reports = []
        for item in batch.to_pylist():
            try:
                reports.append(tokenize_block(item, sources[item["set"]], base, model, max_length, folder))
            except TextsweepError as error:  # as a report: what a task raises comes back wrapped, its type lost
                reports.append({"failure": str(error), "is_usage": isinstance(error, UsageError)})
        return pa.table({"report": [json.dumps(report) for report in reports]})

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


def tokenize_block(
    item: dict[str, Any], source: Source, base: str, model: TrainModelSection, max_length: int, folder: Store
) -> dict[str, Any]:
    """Read and tokenize one block of chunks into one Arrow file; running it again writes the same file."""
    tokenizer = load_tokenizer(fetch(base, model.trust), max_length, model.trust.code, model.truncation, model.windows)
    to_the_end = load_tokenizer(fetch(base, model.trust), LENGTHS[-1] + 1, model.trust.code)
    sampled, longer = 0, np.zeros(len(LENGTHS), np.int64)
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    batches: list[pa.RecordBatch] = []
    chunks = [Chunk(**chunk) for chunk in json.loads(item["chunks"])]
    shards: list[str] = []
    for shard, first, rows in read_block(source, chunks):
        texts, labels, weights, places = usable_rows(rows, dropped)
        if not len(labels):
            continue
        tokens = tokenizer.encode(*texts)
        sample = to_the_end.encode(*(side.slice(0, SAMPLED_ROWS - sampled) for side in texts)).lengths
        sampled, longer = sampled + len(sample), longer + (sample[:, None] > np.array(LENGTHS)).sum(axis=0)
        arrays = {"ids": tokens.id_lists(), "label": labels, "weight": weights, "type_ids": tokens.type_id_lists()}
        arrays["hash"] = pa.array(hash_texts(texts))
        arrays["row"] = pa.array(first + places)
        shards.append(shard)
        batches.append(pa.RecordBatch.from_pydict({name: one for name, one in arrays.items() if one is not None}))
        if source.task is not Task.REGRESSION:
            flat = labels.flatten() if source.task is Task.MULTI_LABEL else labels
            counts.update({one["values"]: one["counts"] for one in pc.value_counts(flat).to_pylist()})
    name = f"{source.name}-{item['number']:05d}.arrow"
    if batches:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batches[0].schema) as writer:
            for shard, batch in zip(shards, batches, strict=True):
                writer.write_batch(batch, custom_metadata={SHARD_KEY: shard})
        folder.replace(name, sink.getvalue().to_pybytes())
    return {
        "set": source.name,
        "number": item["number"],
        "file": name if batches else None,
        "rows": sum(batch.num_rows for batch in batches),
        "read": sum(chunk.rows for chunk in chunks),
        "dropped": dropped,
        "labels": counts,
        "sampled": sampled,
        "longer": longer.tolist(),
    }


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
                for chunk, rows in read_rows(source.store, list(group), source.columns, BLOCK_BYTES):
                    read = read if chunk is before else 0
                    yield shard, chunk.start + read, rows
                    before, read = chunk, read + len(rows.errors)
        except (ChangedShardError, BadShardError) as error:
            raise IncompleteError(f"{source.name}.path: {where} changed while it was read: {error}") from error


def usable_rows(
    rows: Rows, dropped: Counter[str]
) -> tuple[list[pa.LargeStringArray], pa.Array, pa.FloatArray | None, IntArray]:
    """Leave out rows without a text, a label or a weight, and count them by reason.

    Labels as strings (or lists of them, or for regression fp32), weights as fp32 if there is a column for them, and the places of
    these rows among all.
    """
    labels = rows.keys.column(0).combine_chunks()
    if pa.types.is_floating(labels.type):
        labels = labels.cast(pa.float32(), safe=False)
    else:
        labels = labels.cast(pa.list_(pa.string()) if is_list(labels.type) else pa.string())
    for error in RowError:
        if error is not RowError.NONE and (count := int((rows.errors == error).sum())):
            dropped[f"{error.name.lower()} text"] += count
    readable = pa.array(rows.errors == RowError.NONE)
    labels = labels.filter(readable)
    valid = labels.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_list(labels.type):
        parents = pc.list_parent_indices(labels)
        valid[np.unique(parents.filter(labels.flatten().is_null()).to_numpy(zero_copy_only=False))] = False
    if count := int((~valid).sum()):
        dropped["null label"] += count
    if pa.types.is_floating(labels.type):
        finite = np.isfinite(labels.fill_null(0).to_numpy())
        if count := int((~finite).sum()):
            dropped["label that is no finite number"] += count
        valid &= finite
    weights = None
    if rows.keys.num_columns > 1:
        weights = rows.keys.column(1).combine_chunks().filter(readable).cast(pa.float32(), safe=False)
        numbers = weights.fill_null(-1).to_numpy()
        is_weight = (numbers >= 0) & np.isfinite(numbers)
        if count := int((valid & ~is_weight).sum()):
            dropped["no weight"] += count
        valid &= is_weight
    keep = pa.array(valid)
    return (
        [column.filter(keep) for column in rows.texts],
        labels.filter(keep),
        None if weights is None else weights.filter(keep),
        np.flatnonzero(rows.errors == RowError.NONE)[valid],
    )


def hash_texts(sides: Sequence[pa.Array]) -> npt.NDArray[np.uint64]:
    """A number for each text, or pair of texts, that tells equal ones."""
    found = np.zeros(len(sides[0]), np.uint64)
    for side in sides:
        found = found * np.uint64(0x9E3779B97F4A7C15) + hash_array(side.to_numpy(zero_copy_only=False))
    return found


def build_index(
    fingerprint: str, sources: Sequence[Source], reports: list[dict[str, Any]], config: TrainConfig
) -> LabelledIndex:
    """Put the reports of all blocks together; the label map is what the training rows hold, sorted."""
    counts: dict[str, Counter[str]] = {source.name: Counter() for source in sources}
    dropped: dict[str, Counter[str]] = {source.name: Counter() for source in sources}
    for report in reports:
        assert report["rows"] + sum(report["dropped"].values()) == report["read"], f"rows lost in {report}"
        counts[report["set"]].update(report["labels"])
        dropped[report["set"]].update(report["dropped"])
    task, numeric = sources[0].task, pa.types.is_integer(value_kind(sources[0].columns.keys.types[0]))
    labels = tuple(sorted(counts["train"], key=int if numeric else str))
    if task is Task.REGRESSION:
        labels = (config.train.label_column,)
    index = LabelledIndex(
        fingerprint=fingerprint,
        task=task,
        labels=labels,
        files={name: [one["file"] for one in reports if one["set"] == name and one["file"]] for name in counts},
        rows={name: sum(one["rows"] for one in reports if one["set"] == name) for name in counts},
        dropped={name: dict(found) for name, found in dropped.items()},
        label_counts={name: dict(sorted(found.items())) for name, found in counts.items()},
        sampled={name: sum(one["sampled"] for one in reports if one["set"] == name) for name in counts},
        longer={
            name: {
                limit: sum(one["longer"][place] for one in reports if one["set"] == name)
                for place, limit in enumerate(LENGTHS)
            }
            for name in counts
        },
    )
    check_labels(index, config)
    return index


def check_labels(index: LabelledIndex, config: TrainConfig) -> None:
    """Raise `UsageError` unless there are rows in all sets and every label was seen in training."""
    for name, rows in index.rows.items():
        if not rows:
            raise UsageError(f"{name}.path: no row with a text and a label is left (dropped: {index.dropped[name]})")
    least = 2 if index.task is Task.MULTI_CLASS else 1
    if len(index.labels) < least:
        raise UsageError(
            f"train.path: column {config.train.label_column!r} holds {len(index.labels)} different labels"
            f" ({', '.join(map(repr, index.labels))}), expected at least {least}"
        )
    for name in index.rows:
        unseen = {label: count for label, count in index.label_counts[name].items() if label not in index.labels}
        if unseen:
            shown = ", ".join(f"{label!r} ({count} rows)" for label, count in list(unseen.items())[:10])
            raise UsageError(
                f"{name}.path: {len(unseen)} labels do not occur in the training rows: {shown}"
                f"{nearest(next(iter(unseen)), index.labels)}; add rows with them to train.path or remove them"
            )
