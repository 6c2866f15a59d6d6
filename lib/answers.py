"""What checkpoints answer to labelled rows, in one process without a cluster: for a test set, not for an archive."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lib.checkpoint import Checkpoint, tokenizer_of
from lib.config import validate
from lib.errors import UsageError, nearest, say
from lib.labelled import LabelledSource, find_source, usable_rows
from lib.predictor import Predictor
from lib.schema import Task
from lib.sources import hash_texts, read_block
from lib.train_config import TrainConfig


@dataclass(frozen=True)
class Answers:
    """The usable rows of a labelled set, and what each model says of them. Letters: N rows, C classes."""

    labels: tuple[str, ...]
    truth: npt.NDArray[np.int64]
    """(N,), places in `labels`"""
    probabilities: tuple[npt.NDArray[np.float32], ...]
    """(N, C) of each model, in the order of `labels`"""
    digest: str
    """of the rows, in whatever order and files they stand: the same for the same texts with the same labels"""


def find_test_set(path: str, text_column: str | tuple[str, str], label_column: str) -> LabelledSource:
    """The labelled rows at test.path. Raises `UsageError` unless they have one label each."""
    train = {"path": path, "text_column": text_column, "label_column": label_column}
    source = find_source(
        "test", path, validate(TrainConfig, {"train": train, "model": {"base": "-"}, "output": {"path": "-"}})
    )
    if source.task is not Task.MULTI_CLASS:
        raise UsageError(f"test.path {path}: column {label_column!r} is {source.task.value}, expected one label a row")
    return source


def answers_of(models: Sequence[Checkpoint], source: LabelledSource, path: str, known_from: str) -> Answers:
    """Score a labelled set with each model, all of which have the same labels; `known_from`: where these stand, for a message.

    Raises `UsageError` if a row has another label, or if there is no usable row.
    """
    labels = models[0].card.labels
    places = [[model.card.labels.index(label) for label in labels] for model in models]
    predictors = [(Predictor(model), tokenizer_of(model)) for model in models]
    dropped: Counter[str] = Counter()
    truth: list[str] = []
    hashes = [np.zeros(0, np.uint64)]
    found: list[list[npt.NDArray[np.float32]]] = [[np.zeros((0, len(labels)), np.float32)] for _ in models]
    for block in source.blocks:
        for _, _, rows in read_block(source, list(block)):
            texts, names, *_ = usable_rows(rows, dropped)
            truth += names.to_pylist()
            hashes.append(hash_texts([*texts, names]))
            for (predictor, tokenizer), parts, order in zip(predictors, found, places, strict=True):
                tokens = tokenizer.encode(*texts)
                parts.append(predictor.probabilities(tokens.ids, tokens.offsets, tokens.type_ids)[:, order])
    unknown = sorted(set(truth) - set(labels))
    if unknown or not truth:
        what = (
            f"label {unknown[0]!r} is not in {known_from}{nearest(unknown[0], labels)}" if unknown else "no usable row"
        )
        raise UsageError(f"test.path {path}: {what}")
    if dropped:
        reasons = ", ".join(f"{number} {why}" for why, number in sorted(dropped.items()))
        say(f"test: left out {sum(dropped.values())} rows ({reasons})")
    numbers = {label: place for place, label in enumerate(labels)}
    digest = hashlib.sha256(np.sort(np.concatenate(hashes)).tobytes()).hexdigest()
    return Answers(labels, np.array([numbers[one] for one in truth]), tuple(map(np.concatenate, found)), digest)
