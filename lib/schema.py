"""What a prediction looks like: tasks, row errors, the one Arrow schema that every object of a version has, and its columns."""

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


class Task(enum.StrEnum):
    """What the classifier's head means."""

    MULTI_CLASS = "multi_class"
    """one of the labels; softmax"""
    MULTI_LABEL = "multi_label"
    """any of the labels; a sigmoid each"""
    REGRESSION = "regression"
    """one number, as the model gives it"""
    EMBEDDING = "embedding"
    """nothing but a vector: the model is a plain encoder"""


Targets = npt.NDArray[Any]
"""What labelled rows teach: class numbers (N,), for multi-label zeros and ones (N, C), for regression numbers (N,)."""


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

    task: Task
    labels: tuple[str, ...]
    prefix: str
    probabilities: bool
    keys: pa.Schema
    """key columns in the types that the first run fixed; empty: `shard` and `row` are added"""
    embedding: pa.DataType | None = None
    """of the column with each text's vector, if there is one"""
    abstains: bool = False
    """whether the least sure rows get no label"""

    @property
    def key_fields(self) -> list[pa.Field]:
        """The columns that say which row it is."""
        return list(self.keys) or [pa.field("shard", pa.string()), pa.field("row", pa.int64())]

    @property
    def result_fields(self) -> list[pa.Field]:
        """The columns that scoring adds, without the prefix."""
        answers = {
            Task.MULTI_CLASS: [pa.field("label", pa.string()), pa.field("score", pa.float32())],
            Task.MULTI_LABEL: [pa.field("labels", pa.list_(pa.string())), pa.field("scores", pa.list_(pa.float32()))],
            Task.REGRESSION: [pa.field("score", pa.float32())],
            Task.EMBEDDING: [],
        }[self.task]
        if self.abstains:
            answers.append(pa.field("abstained", pa.bool_()))
        if self.probabilities and self.task in (Task.MULTI_CLASS, Task.MULTI_LABEL):
            answers.append(pa.field("probabilities", pa.list_(pa.float32(), len(self.labels))))
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
    thresholds: tuple[float, ...] | None,
    probabilities: npt.NDArray[np.float32],
    lengths: npt.NDArray[np.integer],
    truncated: npt.NDArray[np.bool_],
    errors: npt.NDArray[np.uint8],
    vectors: npt.NDArray[np.float32] | None = None,
) -> pa.Table:
    """Turn probabilities (N, C) and vectors (N, H) into the columns that scoring adds; rows with an error get nulls and its name.

    A row whose likeliest class is below its threshold gets that class's score and no label.
    """
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
    if schema.task is Task.REGRESSION:
        columns.append(pa.array(probabilities[:, 0], pa.float32(), mask=bad))
    elif schema.task is Task.MULTI_CLASS:
        best = np.where(bad, 0, np.argmax(np.nan_to_num(probabilities), axis=1))
        sure = probabilities[np.arange(len(best)), best]
        without = bad | (sure < np.array(thresholds or [0] * len(schema.labels), np.float32)[best])
        columns.append(pa.array(schema.labels, pa.string()).take(pa.array(best, mask=without)))
        columns.append(pa.array(sure, pa.float32(), mask=bad))
        if schema.abstains:
            columns.append(pa.array(without, pa.bool_(), mask=bad))
    elif schema.task is Task.MULTI_LABEL:
        columns.extend(multi_label_columns(schema.labels, thresholds, probabilities, bad))
    if schema.probabilities and schema.task in (Task.MULTI_CLASS, Task.MULTI_LABEL):
        values = pa.array(probabilities.reshape(-1), pa.float32())
        columns.append(pa.FixedSizeListArray.from_arrays(values, len(schema.labels), mask=pa.array(bad)))
    if stored is not None:
        values = pa.array(stored.reshape(-1))
        columns.append(pa.FixedSizeListArray.from_arrays(values, stored.shape[1], mask=pa.array(bad)))
    columns.append(pa.array(lengths, pa.int32(), mask=bad))
    columns.append(pa.array(truncated, pa.bool_(), mask=bad))
    columns.append(ROW_ERROR_NAMES.take(pa.array(errors)))
    return pa.table(columns, schema=schema.results)


def multi_label_columns(
    labels: tuple[str, ...],
    thresholds: tuple[float, ...] | None,
    probabilities: npt.NDArray[np.float32],
    bad: npt.NDArray[np.bool_],
) -> list[pa.Array]:
    """The labels at or over their thresholds (0.5 without), in label order, and their probabilities, as two list columns."""
    limits = np.array(thresholds or [0.5] * len(labels), np.float32)
    chosen = (np.nan_to_num(probabilities) >= limits) & ~bad[:, None]
    offsets = np.concatenate([[0], np.cumsum(chosen.sum(axis=1))]).astype(np.int32)
    names = pa.array(labels, pa.string()).take(pa.array(np.nonzero(chosen)[1]))
    values = pa.array(probabilities[chosen], pa.float32())
    return [pa.ListArray.from_arrays(pa.array(offsets), flat, mask=pa.array(bad)) for flat in (names, values)]
