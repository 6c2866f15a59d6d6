"""From Parquet to Parquet on this machine: Textsweep beside what a user would otherwise run, on the same texts.

    python -m tests.benchmarks.peers [--rows 12000] [--repeats 3] [--shape MiniLM-L6] [--only NAME ...] [--json FILE]

Every system runs in processes of its own, in turn with the others, on all cores or on the GPU, at its default and at its better
settings:

* the `transformers` pipeline over the texts in their order;
* the pattern of Ray Data's documentation, a pipeline inside `map_batches`;
* a flow as NVIDIA's Curator has it: a tokenizer stage that pads to the maximum, a sort inside each task, a fixed number of rows
  (256 is its default), its stages as actors of Ray, and the same without Ray in one process;
* ONNX Runtime and OpenVINO over rows sorted by length, where `onnxruntime` and `onnxscript` are installed; they are no part of the project;
* on a GPU more rows at a time, too, and not the two runtimes for processors;
* Textsweep's own forward passes, to which nothing is done but that: what `jobs.score` could reach at most.

Tokens are counted once, by the reference tokenizer and without padding. A system's rate is the tokens of a long archive less
those of a short one, over the difference of their seconds: start-up, which is given beside it, is in neither. Before any
timing counts, its answers are compared with plain fp32 transformers, one row at a time.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lib.storage import open_store
from tests.benchmarks.material import (
    MAX_LENGTH,
    REGIMES,
    SHAPES,
    count_tokens,
    hardware,
    make_archive,
    make_model,
    make_texts,
    texts_of,
    versions,
)

SHARDS, SHORT_ROWS = 12, 48
BUCKET = "bench"
OWN_SECONDS = "_seconds"
"""Of a system that is timed by itself, in its output folder."""


@dataclass(frozen=True)
class System:
    """One way to score the archive."""

    run: Callable[[str, Path, Path], None]
    """archive (a folder or a URL), model and output folder"""
    part: float | None = 1
    """of the texts in the long archive: the rate of a slow system is known from a part; None: not on processors"""
    gpu_part: float | None = None
    """the same on a GPU, over 1: all texts so many times; None: not on a GPU"""
    on_s3: bool = False
    """whether it reads from object storage"""


# peers


def device() -> str:
    """Where all systems compute."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def beside_a_model() -> dict[str, Any]:
    """What an actor of Ray that computes is given: the GPU, or all cores but one and as many threads as there are cores."""
    if device() == "cuda":
        return {"num_gpus": 1}
    cores = os.cpu_count() or 2
    return {"num_cpus": max(1, cores - 1), "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(cores)}}}


def save(shard: Path, output: Path, answers: list[Any]) -> None:
    """Write a shard's predictions."""
    pq.write_table(pa.Table.from_pylist(answers), output / shard.name)


def load_pipeline(model: Path, dtype: str) -> Any:
    """The text-classification pipeline, cutting texts as all others do here."""
    import torch
    from transformers import pipeline

    found: Any = pipeline("text-classification", str(model), dtype=getattr(torch, dtype), device=device())
    found.tokenizer.model_max_length = MAX_LENGTH
    return found


def transformers_pipeline(dtype: str, batch: int) -> Callable[[str, Path, Path], None]:
    """The pipeline over one shard after the other."""

    def run(archive: str, model: Path, output: Path) -> None:
        classify = load_pipeline(model, dtype)
        for shard in sorted(Path(archive).iterdir()):
            save(shard, output, classify(texts_of(shard), batch_size=batch, truncation=True))

    return run


def start_quiet_ray(ray: Any) -> None:
    """A local Ray that keeps the rows' order."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True


class PipelineActor:
    """The class of Ray Data's documentation: a pipeline loaded once, called with each batch."""

    def __init__(self, model: Path, dtype: str, batch: int) -> None:
        self.classify, self.batch = load_pipeline(model, dtype), batch

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        answers = self.classify(list(batch["text"]), batch_size=self.batch, truncation=True)
        return {"label": [one["label"] for one in answers], "score": [one["score"] for one in answers]}


def ray_documentation(dtype: str, batch: int) -> Callable[[str, Path, Path], None]:
    """Read, `map_batches` with the class above, write."""

    def run(archive: str, model: Path, output: Path) -> None:
        import ray

        start_quiet_ray(ray)
        found = ray.data.read_parquet(archive).map_batches(
            PipelineActor,
            fn_constructor_args=(model, dtype, batch),
            batch_size=256,
            compute=ray.data.ActorPoolStrategy(size=1),
            **beside_a_model(),
        )
        found.write_parquet(str(output))

    return run


def tokenize_to_the_maximum(tokenizer: Any, texts: list[str]) -> pd.DataFrame:
    """A frame of lists, all as long as the longest text may be."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_LENGTH)
    return pd.DataFrame({"ids": tokens["input_ids"], "mask": tokens["attention_mask"]})


def score_sorted(classifier: Any, frame: pd.DataFrame, batch: int) -> pd.DataFrame:
    """Sort a frame's rows by length, score a fixed number at a time, cut to the longest of them, and sort back."""
    import torch

    frame["length"] = [sum(mask) for mask in frame["mask"]]
    frame = frame.sort_values("length")
    scores = []
    for start in range(0, len(frame), batch):
        rows = frame.iloc[start : start + batch]
        longest = int(rows["length"].max())
        ids = torch.tensor(np.stack(rows["ids"].to_list()))[:, :longest]
        mask = torch.tensor(np.stack(rows["mask"].to_list()))[:, :longest]
        ids, mask = ids.to(classifier.device), mask.to(classifier.device)
        with torch.inference_mode(), torch.autocast(device(), torch.bfloat16):
            scores.append(classifier(input_ids=ids, attention_mask=mask).logits.float().softmax(-1).cpu().numpy())
    found = np.concatenate(scores)
    frame["label"] = [classifier.config.id2label[index] for index in found.argmax(1)]
    frame["score"] = found.max(1)
    return frame.sort_index()[["label", "score"]]


def load_sequence_classifier(model: Path) -> Any:
    """In fp32; autocast makes bf16 of it."""
    import torch
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval().to(device())


def curator(batch: int) -> Callable[[str, Path, Path], None]:
    """The flow without what it runs on: one shard after the other, in one process."""

    def run(archive: str, model: Path, output: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer, classifier = AutoTokenizer.from_pretrained(model), load_sequence_classifier(model)
        for shard in sorted(Path(archive).iterdir()):
            found = score_sorted(classifier, tokenize_to_the_maximum(tokenizer, texts_of(shard)), batch)
            save(shard, output, found.to_dict("records"))

    return run


class TokenizerActor:
    """The tokenizer stage."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        return tokenize_to_the_maximum(self.tokenizer, frame["text"].to_list())


class SortedActor:
    """The model stage."""

    def __init__(self, model: Path, batch: int) -> None:
        self.classifier, self.batch = load_sequence_classifier(model), batch

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        return score_sorted(self.classifier, frame.reset_index(drop=True), self.batch)


def curator_on_ray(batch: int) -> Callable[[str, Path, Path], None]:
    """Its two stages as actors, a shard at a time between them, as Curator's executors run them."""

    def run(archive: str, model: Path, output: Path) -> None:
        import ray

        start_quiet_ray(ray)
        options: dict[str, Any] = {"batch_size": None, "batch_format": "pandas"}
        pool = ray.data.ActorPoolStrategy(size=1)
        found = (  # the actors leave a whole CPU: without one Ray Data would not list the files, and wait for ever
            ray.data.read_parquet(archive, override_num_blocks=len(list(Path(archive).iterdir())))
            .map_batches(TokenizerActor, fn_constructor_args=(model,), num_cpus=0.25, compute=pool, **options)
            .map_batches_internal(  # `map_batches` wants a number of rows where there is a GPU
                SortedActor,
                fn_constructor_args=(model, batch),
                compute=pool,
                **options,
                **{**beside_a_model(), "num_cpus": 0.25},
            )
        )
        found.write_parquet(str(output), ray_remote_args={"num_cpus": 0.25})

    return run


Session = Callable[[dict[str, np.ndarray]], np.ndarray]
"""Inputs (B, L) by name to logits (B, C)."""


def onnx_session(path: Path) -> Session:
    """ONNX Runtime, in fp32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    session = onnxruntime.InferenceSession(path, options)
    names = [one.name for one in session.get_inputs()]
    return lambda inputs: session.run(None, {name: inputs[name] for name in names})[0]


def openvino_session(precision: str) -> Callable[[Path], Session]:
    """OpenVINO on the same file, all threads on one forward pass, as it comes."""

    def load(path: Path) -> Session:
        import openvino

        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        names = [one.get_any_name() for one in compiled.inputs]
        return lambda inputs: compiled({name: inputs[name] for name in names})[0]

    return load


def exported(load: Callable[[Path], Session], batch: int) -> Callable[[str, Path, Path], None]:
    """Export to ONNX once, then each shard tokenized, sorted by length and scored a few rows at a time."""

    def run(archive: str, model: Path, output: Path) -> None:
        import torch
        from transformers import AutoTokenizer

        tokenizer, classifier = AutoTokenizer.from_pretrained(model), load_sequence_classifier(model)
        names = classifier.config.id2label
        example = dict(tokenizer(["one text", "another text"], return_tensors="pt"))
        sizes = {0: torch.export.Dim("rows", min=1, max=4096), 1: torch.export.Dim("tokens", min=2, max=MAX_LENGTH)}
        with contextlib.redirect_stdout(sys.stderr):
            torch.onnx.export(
                classifier,
                (),
                output.with_suffix(".onnx"),
                kwargs=example,
                dynamic_shapes=dict.fromkeys(example, sizes),
                dynamo=True,
            )
        session = load(output.with_suffix(".onnx"))
        for shard in sorted(Path(archive).iterdir()):
            texts = texts_of(shard)
            encoded = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)
            order = np.argsort([len(ids) for ids in encoded["input_ids"]], kind="stable")
            logits = np.empty((len(texts), len(names)), np.float32)
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                picked = {name: [column[row] for row in rows] for name, column in encoded.items()}
                logits[rows] = session(dict(tokenizer.pad(picked, return_tensors="np")))
            scores = torch.from_numpy(logits).softmax(-1).numpy()
            found = [{"label": names[row.argmax()], "score": float(row.max())} for row in scores]
            save(shard, output, found)

    return run


# ours


def textsweep(*settings: str) -> Callable[[str, Path, Path], None]:
    """`jobs.score`, with what it wrote brought into the others' form."""

    def run(archive: str, model: Path, output: Path) -> None:
        from jobs import score
        from lib.errors import run_job

        values = [
            f"input.path={archive}",
            f"model.path={model}",
            f"output.path={output / 'scores'}",
            f"model.max_length={MAX_LENGTH}",
            *settings,
        ]
        sys.argv = ["jobs.score", *(word for value in values for word in ("--set", value)), "--run-id", "bench"]
        code = run_job(score.main)
        if code:
            sys.exit(int(code))

    return run


def forward_alone(archive: str, model: Path, output: Path) -> None:
    """What `jobs.score` is measured against: the forward passes of its engine, in one process, over micro-batches that lie ready.

    All texts are tokenized and padded before the clock starts; each micro-batch is computed once, as in a job.
    """
    from lib import checkpoint
    from lib.predictor import Predictor
    from tests.benchmarks.ladder import Rungs, seconds_of

    predictor = Predictor(checkpoint.load(str(model), MAX_LENGTH), "bf16")
    texts = [texts_of(shard) for shard in sorted(Path(archive).iterdir())]
    with tempfile.TemporaryDirectory() as folder:
        rungs = Rungs(predictor, [text for one in texts for text in one], Path(folder))
    (output / OWN_SECONDS).write_text(str(seconds_of(rungs.forward)))
    scores = predictor.probabilities(rungs.tokens.ids, rungs.tokens.offsets)
    labels = predictor.checkpoint.card.heads[0].labels
    found = [{"label": labels[row.argmax()], "score": float(row.max())} for row in scores]
    pq.write_table(pa.Table.from_pylist(found), output / "all.parquet")


SYSTEMS = {
    "pipeline, default": System(transformers_pipeline("float32", 1), 0.125, 0.25),
    "pipeline, batch 32": System(transformers_pipeline("float32", 32), 0.05, 1),
    "pipeline, bf16": System(transformers_pipeline("bfloat16", 1), 0.125),
    "pipeline, bf16, batch 256": System(transformers_pipeline("bfloat16", 256), None, 6),
    "Ray documentation, default": System(ray_documentation("float32", 1), 0.125, 0.25),
    "Ray documentation, bf16": System(ray_documentation("bfloat16", 1), 0.125),
    "Ray documentation, bf16, batch 256": System(ray_documentation("bfloat16", 256), None, 6),
    "Curator-style, 256 rows": System(curator_on_ray(256), 0.25, 6),
    "Curator-style, 32 rows": System(curator_on_ray(32), 0.25),
    "Curator-style, 32 rows, no Ray": System(curator(32), 0.25),
    "Curator-style, 256 rows, no Ray": System(curator(256), None, 6),
    "ONNX Runtime, 16 rows": System(exported(onnx_session, 16), 0.25),
    "OpenVINO, fp32, 8 rows": System(exported(openvino_session("f32"), 8), 0.5),
    "OpenVINO, bf16, 8 rows": System(exported(openvino_session("bf16"), 8), 0.5),
    "Textsweep, fp32": System(textsweep("model.precision=fp32")),
    "Textsweep, bf16": System(textsweep("model.precision=bf16")),
    "Textsweep, bf16, chunks of 16 MB": System(textsweep("model.precision=bf16", "planning.chunk_mb=16"), None, 300),
    "Textsweep, int8": System(textsweep("model.precision=int8")),
    "Textsweep, forward alone": System(forward_alone, 1, 16),
    "Textsweep, bf16, S3": System(textsweep("model.precision=bf16"), on_s3=True),
}


def parts_here() -> dict[str, float]:
    """Of the systems that run on this machine, what each one is timed on."""
    is_gpu = device() == "cuda"
    parts = {name: one.gpu_part if is_gpu else one.part for name, one in SYSTEMS.items()}
    return {name: part for name, part in parts.items() if part is not None}


def is_ours(name: str) -> bool:
    """Whether a system is Textsweep."""
    return name.startswith("Textsweep")


# timing


class PeerError(Exception):
    """Another system does not run here."""


def timed(name: str, archive: str, model: Path, output: Path) -> float:
    """Seconds of a process that scores an archive."""
    output.mkdir()
    begun = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.benchmarks.peers",
            "--child",
            name,
            archive,
            *map(str, (model, output)),
        ],
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - begun
    if done.returncode:
        if is_ours(name):
            raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
        raise PeerError(done.stderr.strip().splitlines()[-1][:300])
    own = output / OWN_SECONDS
    return float(own.read_text()) if own.exists() else seconds


def answers_of(output: Path) -> pd.DataFrame:
    """Labels and scores that a system wrote, in the archive's order."""
    pointer = output / "scores" / "_published.json"
    if not pointer.exists():
        return pq.read_table(output).to_pandas()[["label", "score"]]
    manifest = pq.read_table(output / "scores" / json.loads(pointer.read_text())["manifest"])
    rows = pd.concat(pq.read_table(output / "scores" / path).to_pandas() for path in manifest["path"].to_pylist())
    return rows.sort_values(["shard", "row"])[["label", "score"]].reset_index(drop=True)


def compare(found: pd.DataFrame, expected: pd.DataFrame) -> dict[str, float]:
    """How far answers are from the reference's; scores of rows with equal labels."""
    assert len(found) == len(expected), f"{len(found)} rows, expected {len(expected)}"
    same = found["label"].to_numpy() == expected["label"].to_numpy()
    difference = np.abs(found["score"].to_numpy() - expected["score"].to_numpy())[same]
    return {"labels_equal": round(float(same.mean()), 4), "largest_difference": float(difference.max())}


def measure(names: list[str], texts: list[str], repeats: int, model: Path, folder: Path) -> dict[str, Any]:
    """Time every system, in turn; returns its rate, start-up and answers."""
    short = folder / "short"
    make_archive(short, texts[:SHORT_ROWS], 2)
    parts = parts_here()
    archives = {part: folder / f"long-{part}" for part in {parts[name] for name in names}}
    tokens = {short: count_tokens(model, texts[:SHORT_ROWS])}
    for part, archive in archives.items():
        some, copies = texts[: int(len(texts) * part)], max(1, int(part))
        make_archive(archive, some, max(2, int(SHARDS * min(1, part))), copies)
        tokens[archive] = copies * count_tokens(model, some)
    transformers_pipeline("float32", 1)(str(short), model, make(folder / "expected"))
    expected = answers_of(folder / "expected")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    checks: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    with served(list(tokens)) if any(SYSTEMS[name].on_s3 for name in names) else contextlib.nullcontext():
        for repeat in range(repeats):
            for name in names:
                outputs = [folder / f"{names.index(name)}-{repeat}-{which}" for which in ("short", "long")]
                both = (short, archives[parts[name]])
                urls = [f"s3://{BUCKET}/{one.name}" if SYSTEMS[name].on_s3 else str(one) for one in both]
                try:
                    first, second = (timed(name, url, model, output) for url, output in zip(urls, outputs, strict=True))
                except PeerError as error:
                    failed[name] = str(error)
                    print(f"{name} failed: {error}", file=sys.stderr, flush=True)
                    continue
                seconds[name].append((first, second))
                checks.setdefault(name, compare(answers_of(outputs[0]), expected))
                print(f"{name}: {first:.1f} s, {second:.1f} s", file=sys.stderr, flush=True)
    found: dict[str, Any] = {}
    for name in (one for one in names if one not in failed):
        extra = tokens[archives[parts[name]]] - tokens[short]
        if any(whole <= start for start, whole in seconds[name]):
            failed[name] = f"the longer archive took no longer ({seconds[name]} s): more --rows"
            print(f"{name} was not measured: {failed[name]}", file=sys.stderr, flush=True)
            continue
        rates = [extra / (whole - start) for start, whole in seconds[name]]
        found[name] = {
            "tokens_per_second": round(statistics.median(rates)),
            "range": [round(min(rates)), round(max(rates))],
            "start_seconds": round(statistics.median(start for start, _ in seconds[name]), 1),
            **checks[name],
        }
    mean = tokens[archives[max(archives)]] / (len(texts) * max(archives))
    return {
        "rows": len(texts),
        "mean_tokens": round(mean, 1),
        "repeats": repeats,
        "systems": found,
        "failed": failed,
    }


@contextlib.contextmanager
def served(archives: list[Path]) -> Iterator[None]:
    """Archives in a bucket of an S3 server on loopback, which the processes started meanwhile know of."""
    from jobs.demo_store import LoopbackS3  # whose packages a machine with a GPU may be without

    with tempfile.TemporaryDirectory() as folder, LoopbackS3(Path(folder) / "server.log") as server:
        os.environ.update(server.environment)
        server.bucket(BUCKET)
        for archive in archives:
            store = open_store(f"s3://{BUCKET}/{archive.name}")
            for shard in archive.iterdir():
                store.create(shard.name, shard.read_bytes())
        yield


def make(folder: Path) -> Path:
    """A new folder."""
    folder.mkdir()
    return folder


def show(found: dict[str, Any]) -> None:
    """One line a system; ratios to the first one."""
    systems = found["systems"]
    first = next(iter(systems), None)
    print(f"{found['rows']:,} texts, mean {found['mean_tokens']} tokens, {found['repeats']} repeats")
    for name, one in systems.items():
        print(
            f"  {name:28} {one['tokens_per_second']:>8,} tokens/s ({one['range'][0]:,} to {one['range'][1]:,}),"
            f" {one['tokens_per_second'] / systems[first]['tokens_per_second']:5.2f} x {first}, start {one['start_seconds']:.1f} s,"
            f" labels equal {one['labels_equal']:.1%}, scores within {one['largest_difference']:.1g}",
            flush=True,
        )


def main() -> None:
    """Measure and print, or be one of the processes that are timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, default="MiniLM-L6", help="of the model: MiniLM-L6 is a real one")
    parser.add_argument("--only", nargs="*", choices=parts_here(), metavar="NAME", help=", ".join(parts_here()))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, archive, *paths = arguments.child
        SYSTEMS[name].run(archive, *map(Path, paths))
        return
    names = arguments.only or list(parts_here())
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(model, arguments.shape)
        texts = make_texts(arguments.rows, REGIMES["mixed"])
        found = measure(names, texts, arguments.repeats, model, Path(folder))
    show(found)
    if arguments.json:
        whole = {"hardware": hardware(), "versions": versions(), "model": arguments.shape, **found}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
