"""Search the hyperparameters of a fine-tuning: a few trials, hopeless ones ended early, the best one trained and committed.

Reads   what jobs.train reads, by the same keys: train.path, valid.path or a part of the training rows, test.path, model.base.
Writes  output.path: best.toml, the best configuration, which jobs.train takes as it is; search.json and search.html, all trials;
        best/, the checkpoint that was trained with it, as jobs.train writes it.

    python -m jobs.search --config jobs/configs/train_banking77.toml --set output.path=trials/search --run-id first
    python -m jobs.search --config ... --set 'search.space.optim.learning_rate=[1e-5, 5e-4]' --set search.trials=16

Without search.space learning rate, epochs and batch size are searched. Trials are compared on the validation rows; test rows are looked
at once, by the checkpoint at the end. Run it again with the same run id: trials that are over are not run again.
Exit codes: 0 done; 2 the command, the configuration or the data is wrong, or every trial failed; 4 incomplete, safe to run again;
5 stopped on request; 1 a bug.
"""

import sys
from collections.abc import Sequence
from typing import Any

import pandas as pd

from lib.config import parse_command
from lib.errors import run_job
from lib.metrics import shown
from lib.runtime import ray_session
from lib.search import search
from lib.search_report import ranked
from lib.space import SearchConfig
from lib.toml import announcement


def main(argv: Sequence[str]) -> None:
    """Search, then say what is best and how to use it."""
    command = parse_command(
        SearchConfig,
        argv,
        prog="jobs.search",
        description="Search the hyperparameters of a fine-tuning over a few trials, and train the best one.",
    )
    print(announcement(command.run_id, command.config), flush=True)
    with ray_session(command.config.resources) as cluster:
        print(f"cluster: {cluster}", flush=True)
        result = search(command.config, command.run_id, cluster)
    print(f"\n{table_of(result)}\n")
    path, trained = command.config.output.path, result["best"]["trained"]
    part = 100 * result["steps"] / max(1, result["steps_without_stopping"])
    print(
        f"best: trial {result['best']['trial']}, in {result['seconds']:.0f} s of training, with {part:.0f}% of all trials' steps"
    )
    if trained:
        print(f"trained once more: validation: {shown(trained['validation'])}")
        if trained["test"]:
            several = trained["test"] if command.config.tasks.named else {"test": trained["test"]}
            print("\n".join(f"{name}: {shown(found)}" for name, found in several.items()))
        print(f"checkpoint: {path}/best")
    print(
        f"report:     {path}/search.html\n"
        f"train it:   python -m jobs.train --config {path}/best.toml --set output.path=..."
    )


def table_of(result: dict[str, Any]) -> str:
    """The trials, best first."""
    rows = [
        {
            "trial": one["number"],
            result["metric"]: "" if one["value"] is None else f"{one['value']:.4f}",
            **{
                key: "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
                for key, value in one["point"].items()
            },
            "steps": f"{one['step']}/{one['steps']}",
            "": {"done": "", "stopped": "ended early", "failed": "failed"}[one["status"]],
        }
        for one in ranked(result)
    ]
    return pd.DataFrame(rows).to_string(index=False)


if __name__ == "__main__":
    sys.exit(run_job(main))
