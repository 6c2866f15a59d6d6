"""What training makes small, row by row. Letters: B rows of a forward pass, C classes, N rows of a set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from lib.errors import UsageError, nearest
from lib.schema import Targets, Task
from lib.train_config import LossSection

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The training loss of a run. A step's loss is the mean over its rows, each taken times its weight."""

    task: Task
    gamma: float = 0.0
    """of the focal loss; 0 is cross entropy"""
    smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    """(C,), of a row of each class"""
    positive_weights: tuple[float, ...] | None = None
    """(C,), for multi-label, of having a label"""
    rdrop: float = 0.0
    """weight of R-Drop: each row passes twice"""

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of each row (B,), in fp32, from logits (B, C) and targets (B,) or (B, C). With R-Drop two passes' (2B, C), one's (B,)."""
        if self.rdrop:
            both = torch.cat([targets, targets])
            return rdrop_losses(logits, self.plain_losses(logits, both), self.task, self.rdrop)
        return self.plain_losses(logits, targets)

    def plain_losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of each row (B,), in fp32, of one pass."""
        logits = logits.float()
        if self.task is Task.REGRESSION:
            return functional.mse_loss(logits.squeeze(1), targets, reduction="none")
        if self.task is Task.MULTI_LABEL:
            hot = targets.float()
            smooth = hot * (1 - self.smoothing) + self.smoothing / 2
            positive = None if self.positive_weights is None else logits.new_tensor(self.positive_weights)
            found = functional.binary_cross_entropy_with_logits(logits, smooth, reduction="none", pos_weight=positive)
            if self.gamma:
                found = found * (hot - logits.sigmoid()).abs() ** self.gamma
            return found.mean(dim=1)
        found = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=self.smoothing)
        if self.gamma:
            right = logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
            found = found * (1 - right.exp()) ** self.gamma
        return found

    def row_weights(self, targets: Targets, weights: FloatArray | None) -> FloatArray:
        """How much each row counts (N,): its own weight, if rows have one, times its class's."""
        found = np.ones(len(targets), np.float32) if weights is None else weights
        return found if self.class_weights is None else found * np.asarray(self.class_weights, np.float32)[targets]


@dataclass(frozen=True, kw_only=True)
class SeveralObjectives:
    """The training losses of several heads on one encoder: each row has that of its task."""

    parts: tuple[Objective, ...]
    places: tuple[slice, ...]
    """of each task's outputs among those of all"""

    @property
    def rdrop(self) -> float:
        """Weight of R-Drop, the same for all."""
        return self.parts[0].rdrop

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of each row (B,), in fp32, from logits (B, C) of all heads and targets (B, 1 + C) as `LabelledSet.mix` makes them."""
        found = logits.new_zeros(len(targets), dtype=torch.float32)
        passes = logits.view(-1, *targets.shape[:1], logits.shape[1])
        for number, (part, place) in enumerate(zip(self.parts, self.places, strict=True)):
            rows = torch.nonzero(targets[:, 0] == number).squeeze(1)
            own = passes[:, rows, place].flatten(0, 1)
            found = found.index_put((rows,), part.losses(own, taught(part.task, targets[rows, 1:], place)))
        return found

    def row_weights(self, targets: Targets, weights: FloatArray | None) -> FloatArray:
        """How much each row counts (N,)."""
        found = np.ones(len(targets), np.float32)
        for number, part in enumerate(self.parts):
            rows = np.flatnonzero(targets[:, 0] == number)
            classes = targets[rows, 1].astype(np.int64)
            found[rows] = part.row_weights(classes, None if weights is None else weights[rows])
        return found


def taught(task: Task, targets: torch.Tensor, place: slice) -> torch.Tensor:
    """Targets (B, C) of one task's rows as its loss wants them."""
    if task is Task.MULTI_LABEL:
        return targets[:, : place.stop - place.start]
    return targets[:, 0].long() if task is Task.MULTI_CLASS else targets[:, 0]


def rdrop_losses(logits: torch.Tensor, losses: torch.Tensor, task: Task, weight: float) -> torch.Tensor:
    """Loss of each row (B,) from two passes over it, given logits (2B, C) and losses (2B,): the first ones, then the second.

    Half of R-Drop's (Liang et al. 2021, arXiv 2106.14448, equation 4), so that it is the plain loss without dropout: the mean
    of both passes' losses and `weight` / 2 of the mean of both Kullback-Leibler divergences, for multi-label its labels' mean.
    """
    plain = losses.view(2, -1).mean(dim=0)
    logits = logits.float()
    if task is Task.MULTI_LABEL:
        # the log odds' difference stands for both classes
        (p, q), (log_p, log_q) = logits.sigmoid().chunk(2), logits.chunk(2)
        divergence = ((p - q) * (log_p - log_q)).mean(dim=1)
    else:
        (p, q), (log_p, log_q) = logits.softmax(dim=-1).chunk(2), logits.log_softmax(dim=-1).chunk(2)
        divergence = ((p - q) * (log_p - log_q)).sum(dim=1)
    return plain + weight / 2 * divergence / 2


def check_loss(section: LossSection, rdrop: float, task: Task) -> None:
    """Raise `UsageError` for what a task does not have, or what does not go together."""
    if task is Task.REGRESSION:
        set_here = sorted(section.model_fields_set) + (["rdrop"] if rdrop else [])
        if set_here:
            name = "optim.rdrop" if set_here[0] == "rdrop" else f"loss.{set_here[0]}"
            raise UsageError(
                f"{name}: it is for classes, and train.regression learns a number by its mean squared error"
            )
    if task is Task.MULTI_LABEL and section.class_weights is not None:
        raise UsageError("loss.class_weights: a row of this data can have several labels; use loss.positive_weights")
    if task is Task.MULTI_CLASS and section.positive_weights is not None:
        raise UsageError("loss.positive_weights: each row of this data has one label; use loss.class_weights")
    if section.kind != "focal" and "focal_gamma" in section.model_fields_set:
        raise UsageError(
            f'loss.focal_gamma with loss.kind = "{section.kind}": it is of the focal loss; set loss.kind = "focal", or leave it out'
        )
    if section.kind == "focal" and section.label_smoothing:
        raise UsageError("loss.label_smoothing with loss.kind = focal: each undoes the other; leave one of the two out")


def make_objective(
    section: LossSection, rdrop: float, task: Task, labels: Sequence[str], counts: Mapping[str, int], num_rows: int
) -> Objective:
    """Resolve a configuration for labels that occur `counts` times in the N training rows.

    Balanced: N / (C n) for a class of n rows, as scikit-learn has it, so that the mean over all rows is 1; for multi-label
    (N - n) / n. Raises `UsageError` for what does not fit the task or names no label.
    """
    check_loss(section, rdrop, task)
    given = {"class": section.class_weights, "positive": section.positive_weights}
    balanced = {
        "class": [num_rows / (len(labels) * max(1, counts.get(label, 0))) for label in labels],
        "positive": [(num_rows - counts.get(label, 0)) / max(1, counts.get(label, 0)) for label in labels],
    }
    found = {
        name: None if one is None else tuple(balanced[name] if one == "balanced" else named(name, one, labels))
        for name, one in given.items()
    }
    return Objective(
        task=task,
        gamma=section.focal_gamma if section.kind == "focal" else 0.0,
        smoothing=section.label_smoothing,
        class_weights=found["class"],
        positive_weights=found["positive"],
        rdrop=rdrop,
    )


def named(name: str, weights: Mapping[str, float], labels: Sequence[str]) -> list[float]:
    """Weights in label order, 1 for labels that are not named."""
    for label in weights:
        if label not in labels:
            raise UsageError(
                f"loss.{name}_weights: {label!r} is none of the {len(labels)} labels{nearest(label, labels)}; choose from"
                f" {', '.join(labels[:20])}"
            )
    return [weights.get(label, 1.0) for label in labels]
