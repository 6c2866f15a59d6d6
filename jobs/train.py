"""Fine-tune a pretrained encoder on labelled text, and evaluate it.

Reads   train.path, valid.path, test.path: Parquet with a text column and a label column, on any fsspec URL;
        model.base: a pretrained encoder in Hugging Face form with safetensors weights.
Writes  output.path: the checkpoint of the best validation metric, its tokenizer, textsweep.json, metrics.json and
        report.html. It loads with plain transformers, and jobs.score takes it as model.path.

    python -m jobs.train --config jobs/configs/train_sst2.toml --set output.path=s3://bucket/models/sst2 --run-id 2026-11-20
    python -m jobs.submit train --address https://head.example.com --config jobs/configs/train_sst2.toml --set output.path=...

Run it again with the same run id: a run that was killed goes on after its last evaluation, a finished one returns at once.
Exit codes: 0 done; 2 the command, the configuration or the data is wrong; 4 incomplete, safe to run again; 5 stopped on
request; 1 a bug.
"""

import sys
from collections.abc import Sequence
from typing import Any

import pandas as pd

from lib.config import parse_command
from lib.errors import run_job
from lib.metrics import shown, top_confusions
from lib.runtime import ray_session
from lib.toml import announcement
from lib.train_config import TrainConfig
from lib.training import train

MAX_TABLE_ROWS = 30
"""Classes of a per-class table; of more, those with the lowest F1 are shown."""


def main(argv: Sequence[str]) -> None:
    """Train, then say how good the checkpoint is and how to use it."""
    command = parse_command(
        TrainConfig, argv, prog="jobs.train", description="Fine-tune a classifier on labelled Parquet and evaluate it."
    )
    print(announcement(command.run_id, command.config), flush=True)
    with ray_session(command.config.resources) as cluster:
        print(f"cluster: {cluster}", flush=True)
        result = train(command.config, command.run_id, cluster)
    best, is_last = result["best"], command.config.stopping.keep == "last"
    which = "last step" if is_last else f"best of {len(result['history'])} evaluations: step"
    print(f"\n{which} {best['step']}, in {result['seconds']:.0f} s of training")
    print_metrics(f"validation ({result['rows']['valid']} rows)", result.get("valid", best))
    for name, found in result.get("tasks", {"": result}).items():
        if name:
            print_metrics(f"\n{name}: validation ({found['rows']['valid']} rows)", found["valid"])
        if found["test"]:
            print_metrics(f"{name}{': ' if name else ''}test ({found['test']['rows']} rows)", found["test"])
            if "per_class" in found["test"]:
                print_details(found["test"])
    path = command.config.output.path
    print(
        f"\ncheckpoint: {path}\nreport:     {path}/report.html\nuse it:     python -m jobs.score --set model.path={path} --set input.path=... --set output.path=..."
    )


def print_metrics(name: str, metrics: dict[str, Any]) -> None:
    """The numbers that everyone asks for, in one line."""
    print(f"{name}: {shown(metrics)}")


def print_details(metrics: dict[str, Any]) -> None:
    """Each class, and the pairs that are mixed up most."""
    table = pd.DataFrame(metrics["per_class"]).set_index("label")
    if len(table) > MAX_TABLE_ROWS:
        print(f"\nthe {MAX_TABLE_ROWS} of {len(table)} classes with the lowest F1:")
        table = table.nsmallest(MAX_TABLE_ROWS, "f1")
    print(f"\n{table.to_string(float_format='{:.3f}'.format)}")
    confusions = top_confusions(metrics)
    if confusions:
        print("\nmixed up most:")
        print(pd.DataFrame(confusions, columns=["true", "answered", "rows"]).to_string(index=False))


if __name__ == "__main__":
    sys.exit(run_job(main))
