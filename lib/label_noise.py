"""Labels that look wrong: rows whose label a model that has not seen them finds less likely than another one.

Confident learning (Northcutt et al. 2021, arXiv 1911.00068) on features of the encoder as it is before training, with a
logistic regression of five folds. Letters: N rows, H hidden size, C classes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lib.batching import IntArray

FOLDS = 5

MAX_ROWS = 50_000
"""Looked at, chosen at random from more: minutes of one processor."""

LISTED = 100
"""The most suspicious rows, for review."""


@dataclass(frozen=True)
class Suspect:
    """A row whose label looks wrong."""

    row: int
    label: str
    likelier: str
    confidence: float
    """of the likelier label, by a model that has not seen the row"""


def rows_to_look_at(count: int, seed: int) -> IntArray:
    """All of `count` rows, or as many as are looked at, sorted."""
    if count <= MAX_ROWS:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, count]).choice(count, MAX_ROWS, replace=False))


def find_suspects(
    features: npt.NDArray[np.floating],
    targets: npt.NDArray[np.integer],
    rows: IntArray,
    labels: Sequence[str],
    seed: int,
) -> list[Suspect]:
    """Rows that look wrong, the clearest first, given features (N, H) and classes (N,) of the rows numbered `rows` (N,).

    A row is one if another class is at least as likely as it is on average for that class's own rows. Classes with fewer
    rows than folds are left alone: a fold may have seen none of them.
    """
    counts = np.bincount(targets, minlength=len(labels))
    known = counts >= FOLDS
    usable = np.flatnonzero(known[targets])
    if known.sum() < 2:
        return []
    classes, renumbered = np.unique(targets[usable], return_inverse=True)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that has not come to its very end is as good here
        found = cross_val_predict(model, features[usable], renumbered, cv=folds, method="predict_proba")
    usual = np.array([found[renumbered == index, index].mean() for index in range(len(classes))])
    confident = np.where(found >= usual, found, 0.0)
    confident[np.arange(len(usable)), renumbered] = 0.0
    likelier = confident.argmax(axis=1)
    margin = confident.max(axis=1) - found[np.arange(len(usable)), renumbered]
    suspicious = np.flatnonzero((confident.max(axis=1) > 0) & (margin > 0))
    order = suspicious[np.argsort(-margin[suspicious], kind="stable")]
    return [
        Suspect(
            row=int(rows[usable[place]]),
            label=labels[int(classes[renumbered[place]])],
            likelier=labels[int(classes[likelier[place]])],
            confidence=float(confident[place, likelier[place]]),
        )
        for place in order
    ]
