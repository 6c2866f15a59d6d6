"""The ladder: how many real tokens a second each step from matrix products to a finished job leaves, on the same texts.

    python -m tests.benchmarks.ladder [--models NAME ...] [--regimes NAME ...] [--repeats 3] [--seconds 3] [--peers] [--json FILE]

For every model and length regime, in one process and in turn:

* `limit`: the machine's fastest matrix product, as tokens of this model (arithmetic, no forward pass)
* `forward`: micro-batches that lie ready (on a GPU: in its memory)
* `+ device`: on a GPU, copied there on the way
* `+ batches`: cut and padded from token ids, scores in their rows' order
* `+ tokens`: from texts
* `+ Parquet`: read from a file, predictions written to one

then, for MiniLM-L6, `jobs.score` in processes of its own: `+ Ray` on local files and `+ S3` on a server on loopback; their rate is
that of a long archive less a short one, so start-up is in neither. `--peers` adds what a user would otherwise run (see peers.py).

Before anything is timed, the engine's scores of 64 texts are compared with plain fp32 transformers, one row at a time. Medians
and ranges of the repeats are printed, and written as JSON. `engines` gives the forward pass in each engine and precision,
`variants` on a GPU what could make it faster: see variants.py.
"""

import argparse
import copy
import datetime
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lib import checkpoint
from lib.batching import cut_by_tokens, gather
from lib.config import EngineChoice, PrecisionChoice
from lib.engine import EngineError, PackedEngine
from lib.model import leave_out_the_unread, load_classifier, logits_of
from lib.predictor import Predictor
from lib.reading import check_texts
from lib.schema import PredictionSchema, RowError, to_results
from lib.tokenization import Tokens
from tests.benchmarks.material import (
    MAX_LENGTH,
    REGIMES,
    SHAPES,
    hardware,
    make_model,
    make_texts,
    versions,
)
from tests.benchmarks.variants import variants

CHECKED_TEXTS = 64
PROBE_TEXTS, PROBE_TOKENS = 8, 4_000

Run = Callable[[], object]


def seconds_of(run: Run) -> float:
    """Seconds by the wall clock."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def in_turn(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Time everything once untimed, then in turn, again and again, so that what else the machine does meets all alike."""
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(seconds_of(run))
    return found


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of the best of three sizes of matrix product."""
    best = 0.0
    for size in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192, 16384):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

        def multiply(left: torch.Tensor = left, right: torch.Tensor = right) -> None:
            torch.matmul(left, right)
            synchronize(device)

        multiply()
        best = max(best, *(2 * size**3 / seconds_of(multiply) for _ in range(3)))
    return best


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Rungs:
    """One model and one regime: the texts in every form that a rung starts from."""

    def __init__(self, predictor: Predictor, texts: list[str], folder: Path) -> None:
        self.predictor, self.folder = predictor, folder
        self.tokenizer = checkpoint.tokenizer_of(predictor.checkpoint)
        self.texts = pa.array(texts, pa.large_string())
        self.tokens: Tokens = self.tokenizer.encode(self.texts)
        self.num_tokens = int(self.tokens.lengths.sum())
        rows = cut_by_tokens(self.tokens.lengths, predictor.token_budget)
        engine = predictor.engine
        batches = [gather(self.tokens.ids, self.tokens.offsets, one) for one in rows]
        computed = sum(len(lengths) * int(lengths.max()) for _, lengths in batches)
        self.padding = 1 - self.num_tokens / computed if engine.pads else 0.0
        self.batches = [functools.partial(engine.stage, *one, None) for one in batches]
        """ways to bring each micro-batch to where it is computed"""
        self.staged = [bring() for bring in self.batches]
        pq.write_table(pa.table({"text": self.texts}), folder / "texts.parquet")
        card = predictor.checkpoint.card
        self.schema = PredictionSchema(heads=card.heads, prefix="", probabilities=False, keys=pa.schema([]))

    def runs(self) -> dict[str, Run]:
        """What is timed, by name."""
        is_gpu = self.predictor.device.type == "cuda"
        found: dict[str, Run] = {"forward": self.forward}
        if is_gpu:
            found["+ device"] = self.launch
        return {**found, "+ batches": self.batch, "+ tokens": self.encode, "+ Parquet": self.score_file}

    def forward(self) -> None:
        """Micro-batches that lie where they are computed."""
        self._compute(self.staged)

    def launch(self) -> None:
        """Micro-batches from the host's memory."""
        self._compute(bring() for bring in self.batches)

    def _compute(self, staged: Iterable[Any]) -> None:
        engine = self.predictor.engine
        for one in staged:
            engine.forward(one)
        engine.wait()
        synchronize(self.predictor.device)

    def batch(self) -> None:
        """Token ids to probabilities."""
        self.predictor.probabilities(self.tokens.ids, self.tokens.offsets)

    def encode(self) -> None:
        """Texts to probabilities."""
        tokens = self.tokenizer.encode(self.texts)
        self.predictor.probabilities(tokens.ids, tokens.offsets)

    def score_file(self) -> None:
        """A file of texts to a file of predictions, in this process."""
        texts, errors = check_texts(pq.read_table(self.folder / "texts.parquet")["text"].combine_chunks())
        tokens = self.tokenizer.encode(texts.filter(pa.array(errors == RowError.NONE)))
        scores = self.predictor.probabilities(tokens.ids, tokens.offsets)
        results = to_results(self.schema, scores, tokens.lengths, tokens.truncated, errors)
        pq.write_table(results, self.folder / "predictions.parquet", compression="zstd", write_page_checksum=True)


def distance(predictor: Predictor, tokens: Tokens) -> dict[str, float]:
    """How far the engine's scores are from plain fp32 transformers, one row at a time."""
    model = load_classifier(predictor.checkpoint.folder, predictor.checkpoint.trust)
    rows = [tokens.ids[start:stop] for start, stop in zip(tokens.offsets, tokens.offsets[1:], strict=False)]
    with torch.inference_mode():
        inputs = [torch.from_numpy(row.astype(np.int64))[None] for row in rows]
        expected = torch.cat([logits_of(model, one, torch.ones_like(one), None) for one in inputs]).softmax(-1).numpy()
    found = predictor.probabilities(tokens.ids, tokens.offsets)
    return {
        "labels_equal": round(float((found.argmax(1) == expected.argmax(1)).mean()), 4),
        "largest_difference": float(f"{np.abs(found - expected).max():.1e}"),
    }


def summary(tokens: int, seconds: list[float]) -> dict[str, Any]:
    """Tokens a second: the median of the repeats, and their range."""
    rates = sorted(tokens / one for one in seconds)
    return {"tokens_per_second": round(statistics.median(rates)), "range": [round(rates[0]), round(rates[-1])]}


def enough(predictor: Predictor, name: str, seconds: float) -> int:
    """How many texts of a regime keep the predictor busy for so long."""
    tokenizer = checkpoint.tokenizer_of(predictor.checkpoint)
    tokens = tokenizer.encode(make_texts(PROBE_TEXTS, REGIMES[name]))

    def run() -> None:
        predictor.probabilities(tokens.ids, tokens.offsets)

    run()
    least = PROBE_TOKENS // REGIMES[name].mean_tokens  # few texts are padded more than an archive's
    return max(PROBE_TEXTS, least, int(PROBE_TEXTS * seconds / seconds_of(run)))


def climb(predictor: Predictor, shape: str, regime: str, repeats: int, seconds: float, folder: Path) -> dict[str, Any]:
    """The rungs of one process for one model and regime."""
    texts = make_texts(enough(predictor, regime, seconds), REGIMES[regime])
    rungs = Rungs(predictor, texts, folder)
    check = distance(predictor, rungs.tokenizer.encode(rungs.texts.slice(0, CHECKED_TEXTS)))
    timed = in_turn(rungs.runs(), repeats)
    peak = matrix_peak(predictor.engine.dtype, predictor.device)
    limit = peak / SHAPES[shape].flops(rungs.tokens.lengths)
    return {
        "model": shape,
        "regime": regime,
        "engine": predictor.engine.name,
        "precision": str(predictor.engine.dtype).removeprefix("torch."),
        "texts": len(texts),
        "mean_tokens": round(rungs.num_tokens / len(texts), 1),
        "padding": round(rungs.padding, 4),
        **check,
        "matrix_products_per_second": round(peak),
        "rungs": {
            "limit": {"tokens_per_second": round(limit)},
            **{name: summary(rungs.num_tokens, found) for name, found in timed.items()},
        },
    }


def compare_engines(model: Path, regime: str, repeats: int, seconds: float, folder: Path) -> dict[str, Any]:
    """The forward pass with batching, in every engine and precision that this machine has."""
    loaded = checkpoint.load(str(model), MAX_LENGTH)
    engines: tuple[EngineChoice, ...] = ("torch", "auto" if torch.cuda.is_available() else "openvino")
    precisions: tuple[PrecisionChoice, ...] = ("fp32", "bf16")
    choices = [(engine, precision) for engine in engines for precision in precisions]
    if "openvino" in engines:
        choices.append(("openvino", "int8"))
    built = [(precision, Predictor(loaded, precision, engine)) for engine, precision in choices]
    predictors = {f"{predictor.engine.name} {precision}": predictor for precision, predictor in built}
    texts = make_texts(enough(predictors["torch fp32"], regime, seconds), REGIMES[regime])
    rungs = {name: Rungs(predictor, texts, folder) for name, predictor in predictors.items()}
    timed = in_turn({name: one.batch for name, one in rungs.items()}, repeats)
    checked = next(iter(rungs.values())).texts.slice(0, CHECKED_TEXTS)
    return {
        name: {
            **summary(one.num_tokens, timed[name]),
            "padding": round(one.padding, 4),
            **distance(one.predictor, one.tokenizer.encode(checked)),
        }
        for name, one in rungs.items()
    }


def compare_variants(
    model: Path, regime: str, repeats: int, seconds: float, folder: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """The forward pass of rows without padding that lie ready, as it is and in each variant; and why others do not run.

    Without a GPU a few short texts, and no FP8, whose matrix products have no fast code there.
    """
    loaded = checkpoint.load(str(model), MAX_LENGTH)
    is_gpu = torch.cuda.is_available()
    plain = Predictor(loaded, "bf16" if is_gpu else "fp32", "auto" if is_gpu else "torch", None if is_gpu else 512)
    classifier = load_classifier(loaded.folder, loaded.trust)
    leave_out_the_unread(classifier)
    packed = PackedEngine(classifier, plain.device, plain.engine.dtype)
    built = {"packed": packed, **variants(classifier, plain.device, plain.engine.dtype, plain.token_budget)}
    if not is_gpu:
        del built["fp8"]
    texts = make_texts(enough(plain, regime, seconds) if is_gpu else PROBE_TEXTS, REGIMES[regime])
    rungs, failed = {}, {}
    for name, engine in built.items():
        predictor = copy.copy(plain)
        predictor.engine, predictor.budget_key = engine, None  # what fits here is not remembered for jobs
        try:
            rungs[name] = Rungs(predictor, texts, folder)
            rungs[name].batch()
        except (
            RuntimeError,
            NotImplementedError,
            EngineError,
        ) as error:  # torch's own, of what this GPU or version cannot do
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            rungs.pop(name, None)
    timed = in_turn({name: one.forward for name, one in rungs.items()}, repeats)
    checked = next(iter(rungs.values())).texts.slice(0, CHECKED_TEXTS)
    found = {
        name: {
            **summary(one.num_tokens, timed[name]),
            **distance(one.predictor, one.tokenizer.encode(checked)),
        }
        for name, one in rungs.items()
    }
    return found, failed


def show(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


def show_rungs(found: dict[str, Any]) -> None:
    """One line a rung."""
    show(
        f"{found['model']}, {found['regime']} (mean {found['mean_tokens']} tokens), {found['engine']} {found['precision']}:"
        f" padding {found['padding']:.1%}, scores within {found['largest_difference']:g} of fp32"
    )
    forward = found["rungs"]["forward"]["tokens_per_second"]
    for name, one in found["rungs"].items():
        around = f" ({one['range'][0]:,} to {one['range'][1]:,})" if "range" in one else ""
        show(f"  {name:12} {one['tokens_per_second']:>12,} tokens/s {one['tokens_per_second'] / forward:6.2f}{around}")


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--regimes", nargs="*", choices=REGIMES, default=["web", "reviews", "messages"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one forward pass over the texts")
    parser.add_argument(
        "--rows", type=int, default=6_000, help="texts of the long archive for jobs.score and the peers"
    )
    parser.add_argument("--job-repeats", type=int, default=1)
    parser.add_argument("--no-jobs", action="store_true", help="leave out jobs.score, and Ray with it")
    parser.add_argument("--peers", action="store_true", help="add the peers")
    parser.add_argument(
        "--variants",
        action="store_true",
        help="without a GPU, too, compare what could make it faster (see variants.py)",
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "hardware": hardware(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(sys.argv[1:]),
        "versions": versions(),
        "ladder": [],
    }
    show(f"{found['hardware']}; {', '.join(f'{name} {one}' for name, one in found['versions'].items())}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for shape in arguments.models:
            make_model(folder / shape, shape)
            predictor = Predictor(checkpoint.load(str(folder / shape), MAX_LENGTH))
            for regime in arguments.regimes:
                rungs = climb(predictor, shape, regime, arguments.repeats, arguments.seconds, folder)
                found["ladder"].append(rungs)
                show_rungs(rungs)
        found["engines"], found["variants"], found["failed_variants"] = {}, {}, {}
        for shape in arguments.models[: len(arguments.models) if torch.cuda.is_available() else 1]:
            how = (folder / shape, "mixed", arguments.repeats, arguments.seconds, folder)
            found["engines"][shape] = compare_engines(*how)
            for name, one in found["engines"][shape].items():
                show(
                    f"{shape}, mixed, {name:14} {one['tokens_per_second']:>10,} tokens/s, within {one['largest_difference']:g}"
                )
            if not torch.cuda.is_available() and not arguments.variants:
                continue
            found["variants"][shape], found["failed_variants"][shape] = compare_variants(*how)
            for name, one in found["variants"][shape].items():
                show(
                    f"{shape}, mixed, {name:16} {one['tokens_per_second']:>10,} tokens/s, labels equal {one['labels_equal']:.1%},"
                    f" within {one['largest_difference']:g}"
                )
            for name, why in found["failed_variants"][shape].items():
                show(f"{shape}, mixed, {name:16} does not run: {why}")
        if not arguments.no_jobs:
            from tests.benchmarks import peers

            found["jobs"] = peers.measure(
                [name for name in peers.parts_here() if arguments.peers or peers.is_ours(name)],
                make_texts(arguments.rows, REGIMES["mixed"]),
                arguments.job_repeats,
                folder / shape,
                folder,
            )
            peers.show(found["jobs"])
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
