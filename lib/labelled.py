"""Labelled rows: from Parquet to a memory-mapped set of token ids and labels that every training worker maps.

Text is tokenized once, by Ray Data tasks over blocks of chunks, with the code that scoring uses. Each block becomes
one uncompressed Arrow file beside the run's checkpoints. Rows without a usable text or label are left out and counted.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from lib import sources
from lib.archive import BadShardError, Columns, check_columns, find_type, key_type, open_parquet
from lib.batching import IntArray
from lib.checkpoint import fetch
from lib.errors import UsageError, nearest
from lib.planning import Chunk
from lib.reading import Rows
from lib.schema import RowError, Task
from lib.sources import (
    INDEX_NAME,
    Source,
    fingerprint_of,
    hash_texts,
    items_of,
    read_block,
    read_index,
    share,
    tokenize_all,
    unreadable,
    write_batches,
)
from lib.storage import Store
from lib.tokenization import Tokenizer, load_tokenizer
from lib.train_config import TrainConfig

SETS = ("train", "valid", "test")

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Tokens: of how many texts are longer, the report tells."""

SAMPLED_ROWS = 1000
"""Of each tokenizing task, whose lengths are counted: to know them, texts are tokenized to their end."""


@dataclass(frozen=True, kw_only=True)
class LabelledSource(Source):
    """The shards of one labelled set. Key columns are the label and perhaps a weight."""

    task: Task


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


def find_sources(config: TrainConfig) -> list[LabelledSource]:
    """List the labelled sets and check every shard's columns. Raises `UsageError`; reads footers only."""
    paths = {"train": config.train.path, "valid": config.valid.path, "test": config.test.path}
    found = [find_source(name, path, config) for name, path in paths.items() if path is not None]
    for source in found[1:]:
        if source.task is not found[0].task:
            raise UsageError(
                f"{source.name}.path {paths[source.name]}: column {config.train.label_column!r} is {source.task.value},"
                f" in train.path it is {found[0].task.value}; expected the same kind of labels in all sets"
            )
    return found


def find_source(name: str, path: str, config: TrainConfig) -> LabelledSource:
    """List one labelled set and cut it into blocks for tokenizing."""
    text = config.train.text_column
    label, regression = config.train.label_column, config.train.regression
    weight = config.train.weight_column if name == "train" else None

    def columns_of(store: Store, shard: str) -> Columns:
        return labelled_columns(store, shard, (text,) if isinstance(text, str) else text, label, regression, weight)

    found = sources.find_source(name, path, columns_of)
    return LabelledSource(**vars(found), task=task_of(found.columns.keys.field(label).type))


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


def prepare(
    config: TrainConfig, sets: Sequence[LabelledSource], base: str, max_length: int, folder: Store
) -> LabelledIndex:
    """Tokenize all sets into `folder`, or take what an earlier attempt of this run left there.

    Raises `UsageError` if labels do not fit together, or if the rows have changed since the earlier attempt.
    """
    fingerprint = fingerprint_of(sets)
    kept = read_index(folder, fingerprint)
    if kept is not None:
        return LabelledIndex.model_validate_json(kept)
    named, model = {source.name: source for source in sets}, config.model

    def load() -> tuple[Tokenizer, Tokenizer]:
        here, code = fetch(base, model.trust), model.trust.code
        return (
            load_tokenizer(here, max_length, code, model.truncation, model.windows),
            load_tokenizer(here, LENGTHS[-1] + 1, code),
        )

    tokenizers = share(load)
    reports = tokenize_all(items_of(sets), lambda item: tokenize_block(item, named[item["set"]], *tokenizers(), folder))
    index = build_index(fingerprint, sets, reports, config)
    folder.replace(INDEX_NAME, index.model_dump_json().encode())
    return index


def tokenize_block(
    item: dict[str, Any], source: LabelledSource, tokenizer: Tokenizer, to_the_end: Tokenizer, folder: Store
) -> dict[str, Any]:
    """Read and tokenize one block of chunks into one Arrow file; running it again writes the same file.

    `to_the_end` counts the tokens of some texts that the other one cuts.
    """
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
            counts.update(count_labels(labels))
    name = f"{source.name}-{item['number']:05d}.arrow"
    if batches:
        write_batches(folder, name, batches, shards)
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


def count_labels(labels: pa.Array) -> dict[str, int]:
    """In how many rows each label stands; twice in one is once."""
    if pa.types.is_large_list(labels.type) or pa.types.is_list(labels.type):
        pairs = pa.table([pc.list_parent_indices(labels), labels.flatten()], names=["row", "label"])
        labels = pairs.group_by(["row", "label"]).aggregate([])["label"]
    return {one["values"]: one["counts"] for one in pc.value_counts(labels).to_pylist()}


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
    dropped.update(unreadable(rows))
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


def build_index(
    fingerprint: str, sets: Sequence[LabelledSource], reports: list[dict[str, Any]], config: TrainConfig
) -> LabelledIndex:
    """Put the reports of all blocks together; the label map is what the training rows hold, sorted."""
    counts: dict[str, Counter[str]] = {source.name: Counter() for source in sets}
    dropped: dict[str, Counter[str]] = {source.name: Counter() for source in sets}
    for report in reports:
        assert report["rows"] + sum(report["dropped"].values()) == report["read"], f"rows lost in {report}"
        counts[report["set"]].update(report["labels"])
        dropped[report["set"]].update(report["dropped"])
    task, numeric = sets[0].task, pa.types.is_integer(value_kind(sets[0].columns.keys.types[0]))
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
