"""How fast rows are learned from beside a loop that pads every row to the maximum, and that both reach the same.

    python -m tests.benchmarks.training --data DATA/sst2 [--epochs 2] [--seeds 0 1 2] [--rows N] [--json FILE]

`--data` holds train.parquet and test.parquet with the columns `text` and `label`. The other loop is what the classification
script of `transformers` does as it comes: rows in random order, each padded to 128 tokens. Both start from the same weights, with
the same optimizer, rates, batch size, precision and number of steps, and take turns of a few steps in one process, so that what
else the machine does meets both. A line is printed for each seed, and FILE is written again.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn import functional
from transformers import AutoTokenizer

from lib.batching import epoch_batches
from lib.checkpoint import fetch
from lib.learning import Learner, Team, logits_of_rows, new_optimizer, rate_factor
from lib.loss import Objective
from lib.mapped import LabelledSet
from lib.model import choose_dtype, new_classifier
from lib.schema import Task
from lib.train_config import OptimSection
from tests.benchmarks.material import ENCODER, hardware, versions

LENGTH = 128
TURN_STEPS = 10
"""Steps of one loop before the other one's turn."""
CPU = torch.device("cpu")


class Clock:
    """Seconds of wall clock and of processor time that a loop's turns have taken."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def run(self, step: Callable[[int], None], numbers: Iterable[int]) -> None:
        """Make some steps and add what they took."""
        wall, processor = time.perf_counter(), time.process_time()
        for number in numbers:
            step(number)
        self.wall += time.perf_counter() - wall
        self.processor += time.process_time() - processor


class Padded:
    """The usual loop: rows in random order, each padded to the maximum."""

    def __init__(self, texts: list[str], targets: torch.Tensor, optim: OptimSection, steps: int, labels: int) -> None:
        folder = fetch(ENCODER)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.rows = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        self.targets, self.optim, self.steps = targets, optim, steps
        self.model = new_model(labels, optim.seed)
        self.optimizer = new_optimizer(self.model, optim)
        self.dtype = choose_dtype("auto", CPU)
        self.per_epoch = -(-len(texts) // optim.batch_size)
        self.chance = torch.Generator().manual_seed(optim.seed)

    def step(self, number: int) -> None:
        """One optimizer step."""
        if number % self.per_epoch == 0:
            self.order = torch.randperm(len(self.targets), generator=self.chance)
        place = number % self.per_epoch * self.optim.batch_size
        rows = self.order[place : place + self.optim.batch_size]
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(number, self.steps, self.optim.warmup_fraction)
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not torch.float32):
            logits = self.model(**{name: one[rows] for name, one in self.rows.items()}).logits
        functional.cross_entropy(logits.float(), self.targets[rows]).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.max_grad_norm)
        self.optimizer.step()


class Grouped:
    """Ours: rows of a batch alike in length, padded to the longest of them."""

    def __init__(self, rows: LabelledSet, optim: OptimSection, steps: int, labels: int) -> None:
        self.rows, self.optim = rows, optim
        team = Team(rank=0, size=1, device=CPU, dtype=choose_dtype("auto", CPU))
        self.learner = Learner(new_model(labels, optim.seed), optim, Objective(task=Task.MULTI_CLASS), team, steps)
        self.per_epoch = -(-len(rows) // optim.batch_size)

    @property
    def model(self) -> Any:
        """What has been learned."""
        return self.learner.model

    def step(self, number: int) -> None:
        """One optimizer step."""
        epoch, place = divmod(number, self.per_epoch)
        if place == 0:
            self.batches = epoch_batches(self.rows.lengths, self.optim.batch_size, self.optim.seed, epoch)
        self.learner.step(number, self.rows, self.batches[place])


def new_model(labels: int, seed: int) -> Any:
    """The encoder with a fresh head, the same for the same seed."""
    names = tuple(map(str, range(labels)))
    return new_classifier(fetch(ENCODER), names, Task.MULTI_CLASS, None, seed)


def map_rows(path: Path, texts: list[str], targets: torch.Tensor, labels: int) -> LabelledSet:
    """Token ids of texts in a mapped file, as training reads them."""
    tokenizer: Any = AutoTokenizer.from_pretrained(fetch(ENCODER))
    ids = tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
    table = pa.table({"ids": pa.array(ids, pa.list_(pa.uint16())), "label": [str(one) for one in targets.tolist()]})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    return LabelledSet([str(path)], tuple(map(str, range(labels))), Task.MULTI_CLASS, tokenizer.pad_token_id, LENGTH)


def read_set(path: Path, most: int | None) -> tuple[list[str], list[Any]]:
    """Texts and labels, the first `most` of them in an order of chance that is the same each time."""
    rows = pq.read_table(path, columns=["text", "label"]).to_pandas().sample(frac=1, random_state=0)[:most]
    return rows["text"].tolist(), rows["label"].tolist()


def compare(data: Path, optim: OptimSection, most: int | None, folder: Path) -> dict[str, Any]:
    """Train both ways, turn by turn, and say what each took and reached."""
    texts, named = read_set(data / "train.parquet", most)
    test_texts, test_named = read_set(data / "test.parquet", None)
    names = sorted(set(named))
    targets, test_targets = (torch.tensor([names.index(one) for one in some]) for some in (named, test_named))
    steps = -(-len(texts) // optim.batch_size) * optim.epochs
    rows = map_rows(folder / "train.arrow", texts, targets, len(names))
    test = map_rows(folder / "test.arrow", test_texts, test_targets, len(names))
    loops: dict[str, Padded | Grouped] = {
        "padded": Padded(texts, targets, optim, steps, len(names)),
        "grouped": Grouped(rows, optim, steps, len(names)),
    }
    clocks = {name: Clock() for name in loops}
    for start in range(0, steps, TURN_STEPS):
        for name, loop in loops.items():
            clocks[name].run(loop.step, range(start, min(start + TURN_STEPS, steps)))
    team = Team(rank=0, size=1, device=CPU, dtype=torch.float32)
    found: dict[str, Any] = {"seed": optim.seed, "rows": len(texts), "steps": steps}
    for name, loop in loops.items():
        answers = logits_of_rows(loop.model, test, np.arange(len(test)), team).argmax(axis=1)
        found[name] = {
            "rows_per_second": round(len(texts) * optim.epochs / clocks[name].wall, 2),
            "rows_per_processor_second": round(len(texts) * optim.epochs / clocks[name].processor, 2),
            "test_accuracy": round(float((answers == test_targets.numpy()).mean()), 4),
        }
    found["ratio"] = round(clocks["padded"].wall / clocks["grouped"].wall, 2)
    found["ratio_processor"] = round(clocks["padded"].processor / clocks["grouped"].processor, 2)
    found["mean_tokens"] = round(float(rows.lengths.mean()), 1)
    return found


def main() -> None:
    """Compare seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--rows", type=int, help="training rows; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        optim = OptimSection(learning_rate=arguments.learning_rate, epochs=arguments.epochs, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            runs.append(compare(arguments.data, optim, arguments.rows, Path(folder)))
        print(json.dumps(runs[-1]), flush=True)
        if arguments.json:
            report = {"data": arguments.data.name, "hardware": hardware(), "versions": versions(), "runs": runs}
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
