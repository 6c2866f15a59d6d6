"""What a prediction looks like: tasks, row errors, the one Arrow schema that every object of a version has, and its columns."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

MULTI_LABEL_THRESHOLD = 0.5
"""A label is given from this probability on, if nothing else is chosen."""


class Task(enum.StrEnum):
    """What the classifier's head means."""

    MULTI_CLASS = "multi_class"
    """one of the labels; softmax"""
    MULTI_LABEL = "multi_label"
    """any of the labels; a sigmoid each"""
    REGRESSION = "regression"
    """one number, as the model gives it"""
    SEVERAL = "several"
    """several heads on one encoder, each with a task of its own"""
    EMBEDDING = "embedding"
    """nothing but a vector: the model is a plain encoder"""


Targets = npt.NDArray[Any]
"""What labelled rows teach: class numbers (N,), for multi-label zeros and ones (N, C), for regression numbers (N,)."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a model's outputs answer, or some of them if it has several heads on one encoder."""

    name: str = ""
    """before its columns; empty if the model has one head"""
    task: Task
    labels: tuple[str, ...]
    """in the order of its C outputs"""
    temperature: float = 1.0
    """logits are divided by it"""
    thresholds: tuple[float, ...] | None = None
    """(C,), from which probability on each label is given; without, for multi-label 0.5, for one label a row 0"""

    @property
    def prefix(self) -> str:
        """What its columns begin with."""
        return f"{self.name}_" if self.name else ""

    @property
    def abstains(self) -> bool:
        """Whether the least sure rows get no label."""
        return self.task is Task.MULTI_CLASS and self.thresholds is not None

    @property
    def fields(self) -> list[pa.Field]:
        """The columns of its answers."""
        found = {
            Task.MULTI_CLASS: [pa.field("label", pa.string()), pa.field("score", pa.float32())],
            Task.MULTI_LABEL: [pa.field("labels", pa.list_(pa.string())), pa.field("scores", pa.list_(pa.float32()))],
            Task.REGRESSION: [pa.field("score", pa.float32())],
        }[self.task]
        if self.abstains:
            found.append(pa.field("abstained", pa.bool_()))
        return [field.with_name(self.prefix + field.name) for field in found]


def task_of(heads: Sequence[Head]) -> Task:
    """The task of a model with these heads."""
    return heads[0].task if len(heads) == 1 else Task.SEVERAL


def label_name(head: Head, label: str) -> str:
    """A label as it is told from those of other heads."""
    return f"{head.name}/{label}" if head.name else label


def slices_of(heads: Sequence[Head]) -> list[tuple[Head, slice]]:
    """Each head with its place among the outputs of all."""
    ends = np.cumsum([len(one.labels) for one in heads]).tolist()
    return [(one, slice(end - len(one.labels), end)) for one, end in zip(heads, ends, strict=True)]


class RowError(enum.IntEnum):
    """Why a row keeps its place without a score. The number travels, the name is written."""

    NONE = 0
    NULL = 1
    EMPTY = 2
    """no character, or white space only"""
    UNDECODABLE = 3
    """not valid UTF-8"""
    UNREADABLE = 4
    """its Parquet pages cannot be read"""
    CRASH = 5
    """it kills the process that scores it, every time"""
    NOT_FINITE = 6
    """the model answers with NaN or infinity"""


ROW_ERROR_NAMES = pa.array([None if error is RowError.NONE else error.name.lower() for error in RowError], pa.string())
"""The `error` column's text, by number."""

DEAD_LETTER_SCHEMA = pa.schema([("shard", pa.string()), ("row", pa.int64()), ("error", pa.string())])
"""Rows with an error: where they stand in the archive, and why."""

DEAD_LETTER_TEXT = pa.field("text", pa.string())
"""Their texts, if asked for: bytes that are not UTF-8 as `\\xff`, a pair's texts on a line each, null where there is none."""


@dataclass(frozen=True, kw_only=True)
class PredictionSchema:
    """The columns of every object of a version."""

    heads: tuple[Head, ...]
    """none: the model is a plain encoder"""
    prefix: str
    probabilities: bool
    keys: pa.Schema
    """key columns in the types that the first run fixed; empty: `shard` and `row` are added"""
    embedding: pa.DataType | None = None
    """of the column with each text's vector, if there is one"""

    @property
    def key_fields(self) -> list[pa.Field]:
        """The columns that say which row it is."""
        return list(self.keys) or [pa.field("shard", pa.string()), pa.field("row", pa.int64())]

    @property
    def result_fields(self) -> list[pa.Field]:
        """The columns that scoring adds, without the prefix."""
        answers = []
        for head in self.heads:
            answers += head.fields
            if self.probabilities and head.task is not Task.REGRESSION:
                kind = pa.list_(pa.float32(), len(head.labels))
                answers.append(pa.field(f"{head.prefix}probabilities", kind))
        if self.embedding is not None:
            answers.append(pa.field("embedding", self.embedding))
        return [
            *answers,
            pa.field("num_tokens", pa.int32()),
            pa.field("truncated", pa.bool_()),
            pa.field("error", pa.string()),
        ]

    @property
    def results(self) -> pa.Schema:
        """The columns that scoring adds, as they are written."""
        return pa.schema([field.with_name(self.prefix + field.name) for field in self.result_fields])

    @property
    def columns(self) -> pa.Schema:
        """All columns of an object, as they are written."""
        return pa.schema([*self.key_fields, *self.results])

    def clashes(self) -> list[str]:
        """Names that are both a key column and a column that scoring adds."""
        return sorted({field.name for field in self.key_fields} & set(self.results.names))


def to_results(
    schema: PredictionSchema,
    probabilities: npt.NDArray[np.float32],
    lengths: npt.NDArray[np.integer],
    truncated: npt.NDArray[np.bool_],
    errors: npt.NDArray[np.uint8],
    vectors: npt.NDArray[np.float32] | None = None,
) -> pa.Table:
    """Turn the heads' probabilities side by side (N, C) and vectors (N, H) into the columns that scoring adds.

    Rows with an error get nulls and the error's name.
    """
    num_classes = sum(len(head.labels) for head in schema.heads)
    assert probabilities.shape[1] == num_classes, (
        f"{probabilities.shape[1]} outputs, the heads have {num_classes} labels"
    )
    finite = np.isfinite(probabilities).all(axis=1)
    stored = None
    if schema.embedding is not None:
        assert vectors is not None
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and an error of its row
            stored = vectors.astype(schema.embedding.value_type.to_pandas_dtype())
        finite &= np.isfinite(stored).all(axis=1)
    errors = np.where((errors == RowError.NONE) & ~finite, RowError.NOT_FINITE, errors)
    bad = errors != RowError.NONE
    columns: list[pa.Array] = []
    for head, place in slices_of(schema.heads):
        columns += answer_columns(head, probabilities[:, place], bad)
        if schema.probabilities and head.task is not Task.REGRESSION:
            values = pa.array(probabilities[:, place].reshape(-1), pa.float32())
            columns.append(pa.FixedSizeListArray.from_arrays(values, len(head.labels), mask=pa.array(bad)))
    if stored is not None:
        values = pa.array(stored.reshape(-1))
        columns.append(pa.FixedSizeListArray.from_arrays(values, stored.shape[1], mask=pa.array(bad)))
    columns.append(pa.array(lengths, pa.int32(), mask=bad))
    columns.append(pa.array(truncated, pa.bool_(), mask=bad))
    columns.append(ROW_ERROR_NAMES.take(pa.array(errors)))
    return pa.table(columns, schema=schema.results)


def answer_columns(head: Head, probabilities: npt.NDArray[np.float32], bad: npt.NDArray[np.bool_]) -> list[pa.Array]:
    """The columns of one head's answers, null for bad rows (N,).

    A row whose likeliest class is below its threshold gets that class's score and no label.
    """
    if head.task is Task.REGRESSION:
        return [pa.array(probabilities[:, 0], pa.float32(), mask=bad)]
    if head.task is Task.MULTI_LABEL:
        return multi_label_columns(head, probabilities, bad)
    best = np.where(bad, 0, np.argmax(np.nan_to_num(probabilities), axis=1))
    sure = probabilities[np.arange(len(best)), best]
    without = bad | (sure < np.array(head.thresholds or [0] * len(head.labels), np.float32)[best])
    return [
        pa.array(head.labels, pa.string()).take(pa.array(best, mask=without)),
        pa.array(sure, pa.float32(), mask=bad),
        *([pa.array(without, pa.bool_(), mask=bad)] if head.abstains else []),
    ]


def multi_label_columns(
    head: Head, probabilities: npt.NDArray[np.float32], bad: npt.NDArray[np.bool_]
) -> list[pa.Array]:
    """The labels at or over their thresholds (0.5 without), in label order, and their probabilities, as two list columns."""
    limits = np.array(head.thresholds or [MULTI_LABEL_THRESHOLD] * len(head.labels), np.float32)
    chosen = (np.nan_to_num(probabilities) >= limits) & ~bad[:, None]
    offsets = np.concatenate([[0], np.cumsum(chosen.sum(axis=1))]).astype(np.int32)
    names = pa.array(head.labels, pa.string()).take(pa.array(np.nonzero(chosen)[1]))
    values = pa.array(probabilities[chosen], pa.float32())
    return [pa.ListArray.from_arrays(pa.array(offsets), flat, mask=pa.array(bad)) for flat in (names, values)]
