"""Learning of a masked-language model: one optimizer step and one evaluation, exact for any number of workers and forward passes.

Which tokens are asked for is decided by (seed, step) and the row, so every worker knows how many there are in the whole step.
Letters: B rows, L padded length, M tokens that are asked for, N rows of a set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional
from transformers import PreTrainedModel

from lib.batching import IntArray, cut_by_tokens, share_of
from lib.language_model import logits_at
from lib.learning import EVALUATION_TOKENS, UNSCALED, Stepper, Team, gradients_stay, together
from lib.mapped import Selection, TokenSet
from lib.masking import Masking
from lib.train_config import OptimSection

MAX_LOGITS = 2**27
"""Of one forward pass of an evaluation, about: 512 MB in fp32."""

EVALUATION_KEY = 2**32 - 1
"""In place of a step: validation always asks for the same tokens."""


@dataclass(frozen=True)
class Asked:
    """Rows as the model sees them, and what it is asked for."""

    ids: IntArray
    """(B, L), the right ones"""
    seen: IntArray
    """(B, L)"""
    mask: npt.NDArray[np.bool_]
    """(B, L)"""
    chosen: npt.NDArray[np.bool_]
    """(B, L), the tokens that are asked for"""

    def part(self, places: IntArray) -> "Asked":
        """Some of the rows, without the columns that are padding in all of them."""
        longest = int(self.mask[places].sum(axis=1).max())
        cut = (places, slice(longest))
        return Asked(self.ids[cut], self.seen[cut], self.mask[cut], self.chosen[cut])


def ask(data: TokenSet, rows: IntArray, masking: Masking, seed: int, step: int) -> Asked:
    """Hide tokens of some rows as a step does."""
    ids, mask, _ = data.read(rows)
    seen, chosen = masking.draw(ids, mask, [(seed, step, int(row)) for row in rows])
    return Asked(ids, seen, mask, chosen)


def logits_and_targets(
    wrapped: nn.Module, model: PreTrainedModel, asked: Asked, team: Team
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (M, V) in fp32 and right ids (M,) of the tokens that are asked for, row by row."""
    seen, mask, chosen = (
        torch.from_numpy(one).to(team.device) for one in (asked.seen, asked.mask.astype(np.int64), asked.chosen)
    )
    with team.autocast:
        logits = logits_at(wrapped, model, seen, mask, chosen)
    return logits.float(), torch.from_numpy(asked.ids[asked.chosen]).to(team.device)


def accumulate_masked(
    wrapped: nn.Module,
    model: PreTrainedModel,
    asked: Asked,
    shares: Sequence[IntArray],
    team: Team,
    scaler: GradScaler = UNSCALED,
) -> torch.Tensor:
    """Add the gradient of a step's mean loss to the parameters, and return this worker's part of that mean.

    The mean is over the tokens that are asked for in the rows of all workers, `asked`; `shares` are the places there of this
    worker's forward passes. As in `learning.accumulate` all workers make as many passes, and DDP's mean is undone.
    """
    count = max(1, int(asked.chosen.sum()))
    num_passes = min(len(shares), math.ceil(len(asked.ids) / team.size))
    total = torch.zeros((), device=team.device)
    for index, share in enumerate(shares[:num_passes]):
        part = asked.part(share if len(share) else np.zeros(1, dtype=np.int64))
        with gradients_stay(wrapped, index + 1 < num_passes):
            logits, targets = logits_and_targets(wrapped, model, part, team)
            loss = functional.cross_entropy(logits, targets, reduction="sum") * (
                team.size / count if len(share) else 0.0
            )
            scaler.scale(loss).backward()
        total += loss.detach() / team.size
    return total


class MaskedLearner(Stepper):
    """A masked-language model in training."""

    def __init__(
        self, model: PreTrainedModel, optim: OptimSection, masking: Masking, team: Team, total_steps: int
    ) -> None:
        self.masking = masking
        super().__init__(model, optim, team, total_steps)

    def gradients(self, number: int, data: TokenSet, batch: IntArray) -> torch.Tensor:
        """Add the gradients of step `number` to the parameters; this worker's part of its mean loss."""
        asked = ask(data, batch, self.masking, self.optim.seed, number)
        shares = share_of(np.arange(len(batch)), self.team.rank, self.team.size, self.optim.accumulation_steps)
        return accumulate_masked(self.wrapped, self.model, asked, shares, self.team, self.scaler)

    def evaluate(self, rows: Selection) -> npt.NDArray[np.float32] | None:
        """Of each row the sum of its losses, the number of tokens asked for, and how many were told rightly (N, 3), on rank 0."""
        mine = rows.chosen[self.team.rank :: self.team.size]
        return together(self.team.gather(self.evaluate_rows(rows.data, mine)))

    def evaluate_rows(self, data: TokenSet, rows: IntArray) -> npt.NDArray[np.float32]:
        """What `evaluate` says, of some rows in their order (N, 3)."""
        model, team = self.candidate.eval(), self.team
        found = np.zeros((len(rows), 3), np.float32)
        room = MAX_LOGITS / (int(model.config.vocab_size) * self.masking.probability)
        budget = max(1, min(EVALUATION_TOKENS[team.device.type], int(room)))
        batches = cut_by_tokens(data.lengths[rows], budget)
        idle = [np.zeros(0, np.int64)] * (team.most(len(batches)) - len(batches) if team.sharded else 0)
        with torch.no_grad():
            for places in [*idle, *batches]:
                some = rows[places] if len(places) else np.zeros(1, np.int64)
                asked = ask(data, some, self.masking, self.optim.seed, EVALUATION_KEY)
                logits, targets = logits_and_targets(model, model, asked, team)
                if len(places):
                    losses = functional.cross_entropy(logits, targets, reduction="none")
                    right = (logits.argmax(dim=1) == targets).float()
                    numbers = torch.stack([losses, torch.ones_like(losses), right], dim=1)
                    owner = places[asked.chosen.nonzero()[0]]
                    np.add.at(found, owner, numbers.cpu().numpy())
        return found


def summarize_masked(found: npt.NDArray[np.float32]) -> dict[str, float]:
    """Masked cross entropy, perplexity and accuracy over all tokens asked for, from what `MaskedLearner.evaluate` gives (N, 3)."""
    losses, count, right = found.sum(axis=0, dtype=np.float64)
    loss = float(losses / max(1.0, count))
    return {
        "accuracy": float(right / max(1.0, count)),
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
    }
