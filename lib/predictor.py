"""The predictor: token ids of a block in, predictions in the same order out.

Rows are put in length order, cut into micro-batches by a token budget, scored, and put back. It knows nothing of Ray, files or shards.
Letters: N rows of a block, B rows of a micro-batch, L its padded length, C classes.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lib import budget
from lib.batching import cut_by_tokens, gather
from lib.checkpoint import Checkpoint, tokenizer_of
from lib.config import EngineChoice, PrecisionChoice, TokenPooling
from lib.engine import Engine, EngineError, PackedEngine, TorchEngine, openvino_engines
from lib.errors import UsageError, say
from lib.model import choose_dtype, leave_out_the_unread, load_classifier, load_with_vector, logits_of, pool_windows
from lib.quantization import has_fast_int8
from lib.schema import Task, slices_of
from lib.throughput import Device, processor_name
from lib.tokenization import Tokens
from lib.windows import split

FloatArray = npt.NDArray[np.float32]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.int8: 0.15}
"""Largest difference of a probability from plain fp32 transformers, one row at a time, that the self-check lets pass."""

CHECK_TEXTS = (
    "a",
    "The parcel arrived two days late, but the support team answered within minutes and sent a new one.",
    "FREE entry!!! Text WIN to 80086 now & claim your prize…",
    "naïve café, 東京, привет, 😀",
    "Nothing works. " * 40,
    "In the second quarter revenue rose by 4.2% while costs, adjusted for exchange rates, stayed where they had been a year before.",
)
"""Scored once by plain fp32 transformers and once by the engine whenever a model is loaded."""

CALIBRATION_TOKENS = 128
"""Of each row of a forward pass that is timed to find the token budget."""


@dataclass(frozen=True)
class Vector:
    """That each text's vector is wanted beside its scores."""

    pooling: TokenPooling | None
    """None: what the checkpoint's own head reads, mean without one"""


OnBatch = Callable[[int, int], None]
"""Called after each micro-batch with its rows and tokens."""


class Predictor:
    """A loaded classifier. Building one scores a few fixed texts both ways, so that a wrong engine never scores an archive."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        precision: PrecisionChoice = "auto",
        engine: EngineChoice = "auto",
        token_budget: int | None = None,
        threads: int | None = None,
        vector: Vector | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.heads = slices_of(checkpoint.card.heads)
        self.vector = vector
        self.num_classes = sum(len(head.labels) for head, _ in self.heads)
        """C, of all heads together"""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if engine == "openvino" and self.device.type == "cuda":
            raise UsageError(
                "model.engine = openvino computes on processors, and there is a GPU here, which would stand idle; set it to auto or torch"
            )
        if precision == "int8" and (self.device.type == "cuda" or engine == "torch"):
            raise UsageError(
                "model.precision = int8 is computed by OpenVINO on processors alone; set it to auto"
                + (", or model.engine to auto" if self.device.type == "cpu" else "")
            )
        if precision == "int8" and not has_fast_int8():
            say(
                "WARNING: model.precision = int8, but this processor has no fast instructions for it (VNNI): auto is faster"
            )
        if threads is not None and self.device.type == "cpu":
            torch.set_num_threads(threads)
        self.padding = 0
        """tokens that were computed for nothing so far"""
        self.budget_key: str | None = None
        """under which the token budget is remembered on this node, if it was found there"""
        self.engine = self._choose(engine, choose_dtypes(precision, self.device), token_budget)
        if token_budget is None and self.device.type == "cuda":
            self.calibrate()

    def describe(self) -> Device:
        """What computes here."""
        is_gpu = self.device.type == "cuda"
        return Device(
            name=torch.cuda.get_device_name(self.device) if is_gpu else processor_name(),
            is_gpu=is_gpu,
            engine=self.engine.name,
            precision={torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}[self.engine.dtype],
            threads=1 if is_gpu else torch.get_num_threads(),
        )

    def _choose(self, wanted: EngineChoice, dtypes: tuple[torch.dtype, ...], token_budget: int | None) -> Engine:
        """The first engine and precision that score the fixed texts as plain fp32 transformers does.

        Says why each one before it does not; raises `UsageError` if none does.
        """
        folder, trust = self.checkpoint.folder, self.checkpoint.trust
        model = (
            load_classifier(folder, trust)
            if self.vector is None
            else load_with_vector(folder, trust, self.vector.pooling)
        )
        checks = [(tokens, self._score_singly(model, tokens)) for tokens in self._check_tokens()]
        if self.vector is None:
            leave_out_the_unread(model)
        problem = ""
        for engine in self._engines(wanted, dtypes, model, checks[0][0]):
            if problem:
                say(f"{problem}: going on with {engine.name} in {engine.dtype}")
            self.engine, self.token_budget = engine, token_budget or engine.token_budget
            problem = self._problem(checks)
            if not problem:
                return engine
        raise UsageError(f"{problem}; try --set model.engine=torch --set model.precision=fp32")

    def _problem(self, checks: list[tuple[Tokens, FloatArray]]) -> str:
        """What is wrong with the engine, by the fixed texts and their expected scores; empty if nothing is."""
        shown = f"model.path {self.checkpoint.url}: on {len(CHECK_TEXTS)} fixed texts the engine ({self.engine.name}, {self.engine.dtype}, {self.device})"
        try:
            worst = max(self._distance(tokens, expected) for tokens, expected in checks)
        except EngineError as error:
            return f"{shown} fails: {error}"
        most = TOLERANCE[self.engine.dtype]
        if worst <= most:
            return ""
        return f"{shown} is {worst:.2g} away from plain fp32 transformers, expected at most {most:g}"

    def _engines(
        self, wanted: EngineChoice, dtypes: tuple[torch.dtype, ...], model: nn.Module, tokens: Tokens
    ) -> Iterator[Engine]:
        """Build the engines that may be used, best first, each when it is asked for."""
        fill = self.checkpoint.facts.pad_token_id
        if wanted != "torch" and self.device.type == "cpu":
            example = gather(tokens.ids, tokens.offsets, np.arange(2))
            try:
                yield from openvino_engines(model, example, dtypes, torch.get_num_threads(), fill)
            except EngineError as error:
                if dtypes == (torch.int8,):
                    raise UsageError(f"model.precision = int8: {error}; or set it to auto") from error
                if wanted == "openvino":
                    raise UsageError(f"model.engine = openvino: {error}; or set it to auto or torch") from error
                say(f"model.path {self.checkpoint.url}: {error}; going on with torch")
        if wanted == "auto" and self.device.type == "cuda" and dtypes[0] != torch.float32 and self.vector is None:
            try:
                packed = PackedEngine(model, self.device, dtypes[0])
            except EngineError as error:
                say(f"model.path {self.checkpoint.url}: {error}; going on with torch")
            else:
                yield packed
        if wanted != "openvino" and dtypes != (torch.int8,):
            for dtype in dtypes:
                yield TorchEngine(model, self.device, dtype, fill)

    def probabilities(
        self,
        ids: npt.NDArray[np.integer],
        offsets: npt.NDArray[np.integer],
        type_ids: npt.NDArray[np.integer] | None = None,
        on_batch: OnBatch | None = None,
    ) -> FloatArray:
        """Score N rows given as a flat token array; returns `(N, C)` probabilities (regression: the values), NaN for rows without tokens."""
        return self.predict(ids, offsets, type_ids, on_batch)[:, : self.num_classes]

    def predict(
        self,
        ids: npt.NDArray[np.integer],
        offsets: npt.NDArray[np.integer],
        type_ids: npt.NDArray[np.integer] | None = None,
        on_batch: OnBatch | None = None,
    ) -> FloatArray:
        """Probabilities of N rows and, if vectors are asked for, those behind them: `(N, C + H)`.

        Launches run ahead of the GPU: nothing is copied back before the last micro-batch is on its way. A micro-batch that
        does not fit the GPU's memory halves the token budget, for this call and all that follow; raises `UsageError` if a
        single text does not fit.
        """
        card = self.checkpoint.card
        lengths = np.diff(offsets)
        counts, sizes = (np.ones_like(lengths), lengths) if card.windows is None else split(lengths, card.max_length)
        offsets = int(offsets[0]) + np.concatenate([[0], np.cumsum(sizes)])
        is_first = np.zeros(len(sizes), np.bool_)
        is_first[np.cumsum(counts) - counts] = True
        left = sizes.copy()
        width = self.num_classes + (0 if self.vector is None else self.checkpoint.facts.hidden_size)
        found = np.full((len(left), width), np.nan, np.float32)
        while left.any():
            pending: list[tuple[npt.NDArray[np.int64], torch.Tensor]] = []
            try:
                for rows in cut_by_tokens(left, self.token_budget):
                    pending.append((rows, self._launch(ids, offsets, type_ids, rows)))
                    if on_batch:
                        on_batch(int(is_first[rows].sum()), int(left[rows].sum()))
            except torch.OutOfMemoryError as error:
                self._shrink(rows, int(left.max()), error)
            self.engine.wait()
            for rows, logits in pending:
                found[rows] = logits.float().cpu().numpy()
                left[rows] = 0
        logits = torch.from_numpy(found)
        if card.windows is not None:
            logits = pool_windows(logits, torch.from_numpy(counts), card.windows.pooling)
        return self._activate(logits).numpy()

    def calibrate(self) -> None:
        """Find the token budget by timing forward passes, or take the one that was found on this node before."""
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "this processor"
        self.budget_key = f"{where}|{self.engine.name}|{self.engine.dtype}|{self.checkpoint.digest}"
        found = budget.recall(self.budget_key)
        if found is None:
            found = budget.best_budget(self._seconds_of)
            budget.remember(self.budget_key, found)
            say(f"{found:,} tokens in one forward pass are best on {where}")
        self.token_budget = found

    def _seconds_of(self, tokens: int) -> float:
        """Seconds of a forward pass over so many tokens, rows of one length: the better of two, after one untimed."""
        length = min(CALIBRATION_TOKENS, self.checkpoint.card.max_length)
        lengths = np.full(max(1, tokens // length), length)
        ids = np.full(lengths.sum(), self._check_tokens()[0].ids[0])
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            logits = self.engine.forward(self.engine.stage(ids, lengths, None))
            self.engine.wait()
            logits.cpu()
            seconds.append(time.perf_counter() - begun)
        return min(seconds[1:])

    def _shrink(self, rows: npt.NDArray[np.int64], longest: int, error: torch.OutOfMemoryError) -> None:
        """Halve the token budget after a micro-batch that did not fit."""
        if len(rows) == 1:
            raise UsageError(
                f"model.path {self.checkpoint.url}: a single text of {longest} tokens does not fit the memory of {self.device};"
                " lower model.max_length, or give each actor a larger GPU"
            ) from error
        before, self.token_budget = self.token_budget, max(1, min(self.token_budget, len(rows) * longest) // 2)
        torch.cuda.empty_cache()
        if self.budget_key is not None:
            budget.remember(self.budget_key, self.token_budget)
        say(
            f"WARNING: {before:,} tokens in one forward pass do not fit the memory of {self.device}; going on with {self.token_budget:,}"
            " (resources.token_budget)"
        )

    def _launch(
        self,
        ids: npt.NDArray[np.integer],
        offsets: npt.NDArray[np.integer],
        type_ids: npt.NDArray[np.integer] | None,
        rows: npt.NDArray[np.int64],
    ) -> torch.Tensor:
        together, lengths = gather(ids, offsets, rows)
        if self.engine.pads:
            self.padding += len(lengths) * int(lengths.max()) - len(together)
        segments = None if type_ids is None else gather(type_ids, offsets, rows)[0]
        return self.engine.forward(self.engine.stage(together, lengths, segments))

    def _activate(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (N, C) to probabilities; vectors behind them (N, C + H) stay as they are."""
        found = logits.clone()
        for head, place in self.heads:
            scaled = logits[:, place] / head.temperature
            if head.task is Task.MULTI_LABEL:
                found[:, place] = torch.sigmoid(scaled)
            elif head.task is Task.MULTI_CLASS:
                found[:, place] = torch.softmax(scaled, dim=-1)
        return found

    def _check_tokens(self) -> list[Tokens]:
        """The fixed texts, and pairs of them where the model tells the two texts of a pair apart."""
        tokenizer = tokenizer_of(self.checkpoint)
        if self.checkpoint.card.windows is not None or self.checkpoint.facts.prompt is not None:
            return [tokenizer.encode(CHECK_TEXTS)]
        pairs = tokenizer.encode(CHECK_TEXTS, CHECK_TEXTS[::-1])
        return [tokenizer.encode(CHECK_TEXTS), *([] if pairs.type_ids is None else [pairs])]

    def _score_singly(self, model: nn.Module, tokens: Tokens) -> FloatArray:
        """Score each row alone, and each window of a row, in fp32 on the CPU: what plain transformers gives."""
        card = self.checkpoint.card

        def part(values: npt.NDArray[np.integer], start: int, stop: int) -> torch.Tensor:
            return torch.from_numpy(values[start:stop].astype(np.int64))[None]

        logits = []
        with torch.inference_mode():
            for first, end in pairwise(tokens.offsets.tolist()):
                answers = []
                for start in range(first, end, card.max_length if card.windows else end - first):
                    stop = min(end, start + card.max_length)
                    ids = part(tokens.ids, start, stop)
                    segments = None if tokens.type_ids is None else part(tokens.type_ids, start, stop)
                    answers.append(logits_of(model, ids, torch.ones_like(ids), segments))
                together = torch.cat(answers)
                is_mean = card.windows is None or card.windows.pooling == "mean"
                logits.append(together.mean(0, keepdim=True) if is_mean else together.amax(0, keepdim=True))
        return self._activate(torch.cat(logits)).numpy()

    def _distance(self, tokens: Tokens, expected: FloatArray) -> float:
        """The largest difference of a score from the expected one, or of a vector as a part of its length, with neighbours and alone."""
        together = self.predict(tokens.ids, tokens.offsets, tokens.type_ids)
        alone = [
            self.predict(tokens.ids, tokens.offsets[index : index + 2], tokens.type_ids)
            for index in range(len(expected))
        ]
        return max(self._difference(expected, found) for found in (together, np.concatenate(alone)))

    def _difference(self, expected: FloatArray, found: FloatArray) -> float:
        """The largest difference between answers (N, C + H)."""
        scores, vectors = np.split(expected, [self.num_classes], axis=1)
        scale = np.maximum(1.0, np.abs(scores))  # only numbers are over 1
        worst = float(np.max(np.abs(scores - found[:, : self.num_classes]) / scale, initial=0))
        if not np.isfinite(found).all():
            return np.inf
        if self.vector is None:
            return worst
        apart = np.linalg.norm(vectors - found[:, self.num_classes :], axis=1) / np.linalg.norm(vectors, axis=1)
        return max(worst, float(apart.max()))


def choose_dtypes(wanted: PrecisionChoice, device: torch.device) -> tuple[torch.dtype, ...]:
    """Which precisions to try, best first: with auto, fp32 is there for a model that bf16 would spoil."""
    if wanted == "int8":
        return (torch.int8,)
    chosen = choose_dtype(wanted, device)
    return (chosen, torch.float32) if wanted == "auto" and chosen != torch.float32 else (chosen,)
