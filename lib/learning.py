"""Learning: one optimizer step and one evaluation, exact for any number of workers and forward passes.

A step is decided by (seed, step) and its rows alone: the learning rate, and with the worker's rank the dropout.
Knows torch and its collectives, not Ray. Letters: B rows of a forward pass, L padded length, C classes, N rows of a set.
"""

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel

from lib.batching import IntArray, cut_by_tokens, share_of
from lib.config import OptimSection
from lib.mapped import LabelledSet, Subset
from lib.metrics import decide
from lib.model import logits_of
from lib.schema import Task

EVALUATION_TOKENS = {"cpu": 4_096, "cuda": 65_536}
"""Tokens, padding included, of one forward pass without gradients."""

LAYER_NUMBER = re.compile(r"(?:layers?|layer_groups)\.([0-9]+)\.")
"""In a parameter's name inside the encoder, in all families."""


@dataclass(frozen=True, kw_only=True)
class Team:
    """This worker among the others."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    """of matrix products in forward and backward pass; weights, gradients and losses are fp32"""
    control: Any = None
    """a gloo group for small Python objects, whatever the gradients travel through"""

    @property
    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    def gather(self, mine: Any) -> list[Any] | None:
        """Every worker's object in rank order on rank 0, None on the others."""
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(mine, found, dst=0, group=self.control)
        return found

    def broadcast(self, mine: Any) -> Any:
        """Rank 0's object, on every worker."""
        box = [mine]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]


class Learner:
    """The model in training: its weights, its optimizer, and one step of it."""

    def __init__(self, model: PreTrainedModel, optim: OptimSection, task: Task, team: Team, total_steps: int) -> None:
        self.optim = optim
        self.task = task
        self.team = team
        self.total_steps = total_steps
        self.model = model
        self.wrapped: nn.Module = (
            DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)
            if team.size > 1
            else self.model
        )
        self.optimizer = new_optimizer(self.model, self.optim)
        self.average: AveragedModel | None = None
        """of the weights after each step"""
        if optim.ema_decay is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(optim.ema_decay))
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=team.device)
        """this worker's share of the steps' losses since the last evaluation"""
        self.norm_sum = torch.zeros((), dtype=torch.float64, device=team.device)
        self.num_steps = 0
        """since the last evaluation"""

    @property
    def candidate(self) -> PreTrainedModel:
        """The weights that are evaluated, and kept if they are the best: the average, if there is one."""
        return self.model if self.average is None else cast(PreTrainedModel, self.average.module)

    def step(self, number: int, data: LabelledSet, batch: IntArray) -> None:
        """Make optimizer step `number` with the rows `batch`, of which this worker computes its share."""
        self.wrapped.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(number, self.total_steps, self.optim.warmup_fraction)
        torch.manual_seed(dropout_seed(self.optim.seed, number, self.team.rank))
        self.optimizer.zero_grad()
        shares = share_of(batch, self.team.rank, self.team.size, self.optim.accumulation_steps)
        self.loss_sum += accumulate(self.wrapped, data, shares, len(batch), self.task, self.team, self.optim.rdrop)
        self.norm_sum += nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.max_grad_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.num_steps += 1

    def evaluate(self, rows: Subset) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None:
        """Answers and loss of every row, in row order, on rank 0; None on the others. Every row is computed once."""
        mine = rows.chosen[self.team.rank :: self.team.size]
        parts = self.team.gather(answer(self.candidate, rows.data, mine, self.task, self.team))
        if parts is None:
            return None
        answers = np.empty((len(rows), *parts[0][0].shape[1:]), dtype=np.int64)
        losses = np.empty(len(rows), dtype=np.float64)
        for rank, (part, part_losses) in enumerate(parts):
            answers[rank :: self.team.size], losses[rank :: self.team.size] = part, part_losses
        return answers, losses

    def means(self) -> tuple[float, float]:
        """Mean loss and gradient norm of the steps since the last call, over all workers (on rank 0)."""
        found = self.team.gather(float(self.loss_sum))
        steps = max(1, self.num_steps)
        norm = float(self.norm_sum) / steps
        self.loss_sum.zero_()
        self.norm_sum.zero_()
        self.num_steps = 0
        return sum(found or []) / steps, norm


def new_optimizer(model: PreTrainedModel, optim: OptimSection) -> torch.optim.AdamW:
    """AdamW; biases and norms, the parameters with one dimension, do not decay. `peak` of a group is its learning rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, one in model.named_parameters():
        if one.requires_grad:
            decay = optim.weight_decay if one.ndim >= 2 else 0.0
            groups.setdefault((peak_rate(depth_of(name, model), optim), decay), []).append(one)
    return torch.optim.AdamW(
        [{"params": ones, "peak": peak, "weight_decay": decay} for (peak, decay), ones in groups.items()],
        lr=optim.learning_rate,
        fused=True,
    )


def depth_of(name: str, model: PreTrainedModel) -> int:
    """How far below the head a parameter lies: 0 head and pooler, 1 the top layer, ..., N + 1 the embeddings."""
    inner = name.removeprefix(f"{model.base_model_prefix}.")
    if inner == name or inner.startswith("pooler."):
        return 0
    layers = max((one for one in model.base_model.modules() if isinstance(one, nn.ModuleList)), key=len)
    found = LAYER_NUMBER.search(inner)
    if found:
        return len(layers) - int(found[1])
    return len(layers) + 1 if "embed" in inner else 1


def peak_rate(depth: int, optim: OptimSection) -> float:
    """The learning rate of a depth at the end of the warm-up (Sun et al. 2019, arXiv 1905.05583, section 5.3.4)."""
    if depth == 0:
        return optim.head_learning_rate or optim.learning_rate
    return float(optim.learning_rate * optim.layer_decay ** (depth - 1))


def rate_factor(step: int, total_steps: int, warmup_fraction: float) -> float:
    """What part of its peak a rate is at step 0, 1, ...: linear up to the end of the warm-up, then linear down to zero."""
    warmup = math.ceil(total_steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    return (total_steps - step) / max(1, total_steps - warmup)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A seed for one worker's step, so that what is dropped does not depend on what ran before."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def row_losses(logits: torch.Tensor, targets: torch.Tensor, task: Task) -> torch.Tensor:
    """Loss of each row (B,), in fp32: cross entropy, or for multi-label the labels' mean binary cross entropy."""
    if task is Task.MULTI_LABEL:
        losses = functional.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
        return losses.mean(dim=1)
    return functional.cross_entropy(logits.float(), targets, reduction="none")


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


def forward(
    model: nn.Module, data: LabelledSet, rows: IntArray, task: Task, team: Team
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, C) and losses (B,) of some rows."""
    ids, mask, type_ids = data.gather(rows)
    ids_tensor, mask_tensor = (torch.from_numpy(one).to(team.device) for one in (ids, mask.astype(np.int64)))
    segments = None if type_ids is None else torch.from_numpy(type_ids).to(team.device)
    targets = torch.from_numpy(data.targets[rows]).to(team.device)
    with team.autocast:
        logits = logits_of(model, ids_tensor, mask_tensor, segments)
    return logits, row_losses(logits, targets, task)


def accumulate(
    model: nn.Module,
    data: LabelledSet,
    shares: Sequence[IntArray],
    num_rows: int,
    task: Task,
    team: Team,
    rdrop: float = 0.0,
) -> torch.Tensor:
    """Add the gradient of a step's mean loss to the parameters, and return this worker's part of that mean.

    `shares` are this worker's forward passes, `num_rows` the rows of all workers: DDP averages gradients over workers,
    so each one's is taken times their number. A worker without rows takes part with a row that weighs nothing.
    """
    passes = [share for share in shares if len(share)]
    weight = team.size / num_rows if passes else 0.0
    total = torch.zeros((), device=team.device)
    for index, rows in enumerate(passes or [np.zeros(1, dtype=np.int64)]):
        waits = index + 1 < len(passes) and isinstance(model, DistributedDataParallel)
        with model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            if rdrop:
                losses = rdrop_losses(*forward(model, data, np.tile(rows, 2), task, team), task, rdrop)
            else:
                _, losses = forward(model, data, rows, task, team)
            loss = losses.sum() * weight
            loss.backward()
        total += loss.detach() / team.size
    return total


def answer(
    model: nn.Module, data: LabelledSet, rows: IntArray, task: Task, team: Team
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Answers and losses of some rows, in their order."""
    model.eval()
    width = data.targets.shape[1:]
    answers = np.empty((len(rows), *width), dtype=np.int64)
    losses = np.empty(len(rows), dtype=np.float64)
    with torch.no_grad():
        for places in cut_by_tokens(data.lengths[rows], EVALUATION_TOKENS[team.device.type]):
            logits, found = forward(model, data, rows[places], task, team)
            logits = logits.float()
            probabilities = logits.sigmoid() if task is Task.MULTI_LABEL else logits.softmax(dim=-1)
            answers[places] = decide(probabilities.cpu().numpy(), task)
            losses[places] = found.cpu().numpy()
    return answers, losses
