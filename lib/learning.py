"""Learning: one optimizer step and one evaluation, exact for any number of workers and forward passes.

A step is decided by (seed, step) and its rows alone: the learning rate, and with the worker's rank the dropout.
Knows torch and its collectives, not Ray. Letters: B rows of a forward pass, L padded length, C classes, N rows of a set.
"""

import contextlib
import gc
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel

from lib.batching import IntArray, cut_by_tokens, share_of
from lib.loss import Objective, SeveralObjectives
from lib.mapped import LabelledSet, Selection, TokenSet
from lib.model import logits_of, mean_state, pool_windows
from lib.sharding import shard, whole
from lib.train_config import OptimSection
from lib.tuning import depth_of, learning_at, peak_rate
from lib.windows import split

Read = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""What is taken (B, ...) from a pass of a model over ids, mask and segment ids (B, L)."""

SeenAt = Callable[[LabelledSet, int], LabelledSet]
"""A set as its rows are seen at a step."""

UNSCALED = GradScaler("cpu", enabled=False)
"""Leaves losses as they are."""

EVALUATION_TOKENS = {"cpu": 4_096, "cuda": 65_536}
"""Tokens, padding included, of one forward pass without gradients."""


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
    sharded: bool = False
    """whether each worker holds a part of the model: then all of them make the same passes at the same time"""

    @property
    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        mixed = self.dtype is not torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype if mixed else None, enabled=mixed)

    def gather(self, mine: Any) -> list[Any] | None:
        """Every worker's object in rank order on rank 0, None on the others."""
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(mine, found, dst=0, group=self.control)
        return found

    def most(self, mine: int) -> int:
        """The largest of all workers' numbers."""
        found = torch.tensor(mine)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control)
        return int(found)

    def broadcast(self, mine: Any) -> Any:
        """Rank 0's object, on every worker."""
        box = [mine]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]


class Stepper(ABC):
    """A model in training: its weights, its optimizer, and one step of it. What is made small, a subclass says."""

    def __init__(self, model: PreTrainedModel, optim: OptimSection, team: Team, total_steps: int) -> None:
        """Of the model learns what requires a gradient."""
        self.optim = optim
        self.team = team
        self.total_steps = total_steps
        self.model = model
        self.learning = [name for name, one in model.named_parameters() if one.requires_grad]
        """names of the parameters that learn, sooner or later"""
        self.average: AveragedModel | None = None
        """of the weights after each step"""
        if optim.ema_decay is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(optim.ema_decay))
        if team.sharded:
            shard(model)
            if self.average is not None:
                shard(self.candidate)
        self.optimizer = new_optimizer(self.model, self.optim)
        self.epoch = -1
        self.encoder_learns = True
        self.wrapped: nn.Module = model
        self.begin_epoch(0)
        self.scaler = GradScaler(team.device.type, enabled=team.dtype is torch.float16)
        """of the loss in fp16, whose small gradients would vanish (Micikevicius et al. 2017, arXiv 1710.03740)"""
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=team.device)
        """this worker's share of the steps' losses since the last evaluation"""
        self.norm_sum = torch.zeros((), dtype=torch.float64, device=team.device)
        self.num_steps = 0
        """since the last evaluation"""
        self.skipped = torch.zeros((), dtype=torch.int64, device=team.device)
        """of those, in which the loss was scaled too far: the weights stay, the scale is halved"""
        self.bad_step = torch.full((), -1, device=team.device)
        """the first whose loss on this worker was no number; -1: none. Kept on the device: looking at it waits for a GPU"""

    def begin_epoch(self, epoch: int) -> None:
        """Set which parameters learn in an epoch (0 is the first)."""
        if self.epoch >= 0 and (self.epoch == epoch or self.optim.unfreeze_layers is None):
            return
        self.epoch = epoch
        learning_at(self.model, self.learning, epoch, self.optim.unfreeze_layers)
        self.model.zero_grad()
        self.encoder_learns = any(
            one.requires_grad for name, one in self.model.named_parameters() if depth_of(name, self.model)
        )
        # Which gradients workers exchange is fixed when a model is wrapped.
        if self.team.size > 1 and not self.team.sharded:
            self.wrapped = self.model
            gc.collect()  # the wrapping before listens to gradients as long as it is there
            # The name that torch 2.13 wants in its place does not yet say all of it, as its warning tells every user.
            warnings.filterwarnings("ignore", r"`broadcast_buffers` is deprecated", FutureWarning)
            self.wrapped = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)

    @property
    def candidate(self) -> PreTrainedModel:
        """The weights that are evaluated, and kept if they are the best: the average, if there is one."""
        return self.model if self.average is None else cast(PreTrainedModel, self.average.module)

    @abstractmethod
    def gradients(self, number: int, data: TokenSet, batch: IntArray) -> torch.Tensor:
        """Add the gradients of step `number` to the parameters; this worker's part of its mean loss."""

    @abstractmethod
    def evaluate(self, rows: Selection) -> npt.NDArray[np.float32] | None:
        """What evaluation needs of each row (N, any), in row order, on rank 0; None on the others. Every row is computed once."""

    def step(self, number: int, data: TokenSet, batch: IntArray) -> None:
        """Make optimizer step `number` with the rows `batch`, of which this worker computes its share."""
        self.wrapped.train()
        if not self.encoder_learns:  # then its answers are features: the same each time, without dropout
            self.model.base_model.eval()
        factor = rate_factor(number, self.total_steps, self.optim.warmup_fraction, self.optim.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        torch.manual_seed(dropout_seed(self.optim.seed, number, self.team.rank))
        self.optimizer.zero_grad()
        loss = self.gradients(number, data, batch)
        self.loss_sum += loss
        self.bad_step = torch.where((self.bad_step < 0) & ~loss.isfinite(), number, self.bad_step)
        self.scaler.unscale_(self.optimizer)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.max_grad_norm))
        if self.scaler.is_enabled():
            self.skipped += ~norm.isfinite()
            norm = norm.nan_to_num(0, 0)
        self.norm_sum += norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.num_steps += 1

    def means(self) -> tuple[dict[str, float], int | None]:
        """Mean loss and gradient norm of the steps since the last call, over all workers, and the first whose loss was no number.

        On rank 0.
        """
        found = self.team.gather((float(self.loss_sum), int(self.bad_step))) or []
        steps = max(1, self.num_steps)
        skipped = int(self.skipped)
        norm = float(self.norm_sum) / max(1, steps - skipped)
        bad = [step for _, step in found if step >= 0]
        self.loss_sum.zero_()
        self.norm_sum.zero_()
        self.skipped.zero_()
        self.num_steps = 0
        means = {"train_loss": sum(loss for loss, _ in found) / steps, "grad_norm": norm}
        if self.scaler.is_enabled():
            means |= {"skipped_steps": skipped, "loss_scale": self.scaler.get_scale()}
        return means, min(bad, default=None)


class Learner(Stepper):
    """A classifier in training."""

    def __init__(
        self,
        model: PreTrainedModel,
        optim: OptimSection,
        objective: Objective | SeveralObjectives,
        team: Team,
        total_steps: int,
        seen_at: SeenAt | None = None,
    ) -> None:
        """`seen_at`: how rows are changed at each step, if they are."""
        self.objective, self.seen_at = objective, seen_at
        super().__init__(model, optim, team, total_steps)

    def gradients(self, number: int, data: TokenSet, batch: IntArray) -> torch.Tensor:
        """Add the gradients of step `number` to the parameters; this worker's part of its mean loss."""
        assert isinstance(data, LabelledSet), "a classifier learns from labels"
        shares = share_of(batch, self.team.rank, self.team.size, self.optim.accumulation_steps)
        seen = data if self.seen_at is None else self.seen_at(data, number)
        return accumulate(self.wrapped, seen, shares, batch, self.objective, self.team, self.scaler)

    def evaluate(self, rows: Selection) -> npt.NDArray[np.float32] | None:
        """Logits (N, C) of all rows, in row order, on rank 0; None on the others. Every row is computed once."""
        mine = rows.chosen[self.team.rank :: self.team.size]
        return together(self.team.gather(logits_of_rows(self.candidate, rows.data, mine, self.team)))


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


def rate_factor(step: int, total_steps: int, warmup_fraction: float, schedule: str = "linear") -> float:
    """What part of its peak a rate is at step 0, 1, ...: linear up to the end of the warm-up, then as the schedule has it."""
    warmup = math.ceil(total_steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    left = (total_steps - step) / max(1, total_steps - warmup)
    if schedule == "cosine":
        return (1 - math.cos(math.pi * left)) / 2
    return 1.0 if schedule == "constant" else left


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A seed for one worker's step, so that what is dropped does not depend on what ran before."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def read_batch(model: nn.Module, read: Read, data: TokenSet, rows: IntArray, team: Team) -> torch.Tensor:
    """What `read` takes (B, ...) from one pass over some rows, that of a row's windows pooled."""
    ids, mask, type_ids = data.read(rows)
    ids_tensor, mask_tensor = (torch.from_numpy(one).to(team.device) for one in (ids, mask.astype(np.int64)))
    segments = None if type_ids is None else torch.from_numpy(type_ids).to(team.device)
    with team.autocast:
        found = read(model, ids_tensor, mask_tensor, segments)
    if data.windows is None:
        return found
    counts, _ = split(data.lengths[rows], data.max_length)
    return pool_windows(found.float(), torch.from_numpy(counts).to(team.device), data.windows.pooling)


def accumulate(
    model: nn.Module,
    data: LabelledSet,
    shares: Sequence[IntArray],
    batch: IntArray,
    objective: Objective | SeveralObjectives,
    team: Team,
    scaler: GradScaler = UNSCALED,
) -> torch.Tensor:
    """Add the gradient of a step's mean loss to the parameters, and return this worker's part of that mean.

    `shares` are this worker's forward passes, `batch` the rows of all workers, whose weights the mean is over: DDP averages
    gradients over workers, so each one's is taken times their number. All workers make as many passes: one without rows for
    a pass takes part with a row that weighs nothing.
    """
    weights = objective.row_weights(data.targets[batch], None if data.weights is None else data.weights[batch])
    weight_sum = float(weights.sum(dtype=np.float64)) or 1.0
    num_passes = min(len(shares), math.ceil(len(batch) / team.size))
    total = torch.zeros((), device=team.device)
    for index, share in enumerate(shares[:num_passes]):
        rows = share if len(share) else np.zeros(1, dtype=np.int64)
        with gradients_stay(model, index + 1 < num_passes):
            logits = read_batch(model, logits_of, data, np.tile(rows, 2) if objective.rdrop else rows, team)
            losses = objective.losses(logits, torch.from_numpy(data.targets[rows]).to(team.device))
            own = objective.row_weights(data.targets[rows], None if data.weights is None else data.weights[rows])
            scale = torch.from_numpy(own).to(team.device) * (team.size / weight_sum if len(share) else 0.0)
            loss = (losses * scale).sum()
            scaler.scale(loss).backward()
        total += loss.detach() / team.size
    return total


def gradients_stay(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[None]:
    """The context of a pass after which workers do not exchange gradients yet, since another one follows."""
    if isinstance(model, DistributedDataParallel) and wanted:
        found: contextlib.AbstractContextManager[None] = model.no_sync()
        return found
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not wanted)
    return contextlib.nullcontext()


def together(parts: list[npt.NDArray[np.float32]] | None) -> npt.NDArray[np.float32] | None:
    """What workers have computed for every row of theirs, in rank order, as one array in row order; None where there is none."""
    if parts is None:
        return None
    found = np.empty((sum(map(len, parts)), parts[0].shape[1]), np.float32)
    for rank, part in enumerate(parts):
        found[rank :: len(parts)] = part
    return found


def logits_of_rows(model: PreTrainedModel, data: TokenSet, rows: IntArray, team: Team) -> npt.NDArray[np.float32]:
    """Logits (N, C) of some rows, in their order."""
    return read_rows(model, logits_of, int(model.config.num_labels or 0), data, rows, team)


def features_of_rows(model: PreTrainedModel, rows: Selection, team: Team) -> npt.NDArray[np.float32] | None:
    """The mean of the encoder's last hidden states (N, H) of each row, in row order, on rank 0; None on the others."""
    mine = rows.chosen[team.rank :: team.size]
    return together(team.gather(read_rows(model, mean_state, int(model.config.hidden_size), rows.data, mine, team)))


def read_rows(
    model: PreTrainedModel, read: Read, width: int, data: TokenSet, rows: IntArray, team: Team
) -> npt.NDArray[np.float32]:
    """What `read` takes (N, width) from a model without gradients and dropout, of some rows, in their order."""
    model.eval()
    found = np.empty((len(rows), width), np.float32)
    with torch.no_grad():
        batches = cut_by_tokens(data.lengths[rows], EVALUATION_TOKENS[team.device.type])
        for _ in range(team.most(len(batches)) - len(batches) if team.sharded else 0):
            read_batch(model, read, data, np.zeros(1, dtype=np.int64), team)
        for places in batches:
            found[places] = read_batch(model, read, data, rows[places], team).float().cpu().numpy()
    return found
