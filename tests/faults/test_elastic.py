"""Training on a cluster that loses a node and gets another one: it goes on with one worker, then with two, and loses no row."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from safetensors.torch import load_file

from jobs.demo_store import LoopbackS3
from lib import checkpoint
from lib.storage import open_store
from tests import fakes
from tests.faults.harness import Bench, Job, running
from tests.labelled import difference, make_rows
from tests.waiting import wait_until

pytestmark = pytest.mark.trial


@contextmanager
def training(bench: Bench, url: str, name: str, **resources: int) -> Iterator[Job]:
    """Run `jobs.train` on the bench's cluster, with an evaluation after each step or two."""
    values = {
        "train.path": f"{url}/train.parquet",
        "valid.path": f"{url}/valid.parquet",
        "model.base": f"{url}/base",
        "model.dropout": 0.0,
        "model.precision": "fp32",
        "optim.batch_size": 8,
        "optim.epochs": 20,
        "optim.learning_rate": 1e-3,
        "stopping.keep": "last",
        "stopping.evaluations_per_epoch": 10,
        "output.path": f"{url}/{name}",
        **{f"resources.{key}": value for key, value in resources.items()},
    }
    settings = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    with running(bench, "jobs.train", [*settings, "--run-id", name], name) as job:
        yield job


def results(url: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics and the weights of a run."""
    metrics = json.loads(open_store(f"{url}/{name}").read("metrics.json") or b"")
    return metrics, load_file(Path(checkpoint.fetch(f"{url}/{name}")) / "model.safetensors")


def test_two_workers_become_one_and_two_again_and_no_row_is_lost(bench: Bench, s3: LoopbackS3, tmp_path: Path) -> None:
    url = s3.bucket()
    for name, count, seed in (("train", 83, 1), ("valid", 20, 2)):
        texts, labels = make_rows(count, seed)
        fakes.write_archive(url, {f"{name}.parquet": pa.table({"text": texts, "label": labels})})
    fakes.make_encoder(tmp_path / "base", "bert")
    store = open_store(f"{url}/base")
    for path in (tmp_path / "base").iterdir():
        store.replace(path.name, path.read_bytes())

    with training(bench, url, "whole", num_workers=1) as job:
        assert job.wait(300) == 0, job.text
    with training(bench, url, "elastic", num_workers=2, min_workers=1) as job:

        def reached(words: str) -> None:
            def there() -> bool:
                assert job.process.poll() is None, f"the job ended too early: {job.text[-3000:]}"
                return words in job.text

            wait_until(there, f"the line {words!r}", 240)

        reached("validation at step 9:")
        bench.lose_node()
        before = max(int(step) for step in re.findall(r"validation at step (\d+):", job.text))
        reached("1 worker resuming after step")
        bench.add_node()
        reached("2 workers resuming after step")
        assert job.wait(300) == 0, job.text

    (whole, expected), (elastic, found) = results(url, "whole"), results(url, "elastic")
    sizes = [entry["workers"] for entry in elastic["history"]]
    changes = [size for before, size in zip([0, *sizes], sizes, strict=False) if size != before]
    assert changes == [2, 1, 2]
    assert len(elastic["resumed_after"]) == 2
    evaluated = [entry["step"] for entry in elastic["history"]]
    assert evaluated == [entry["step"] for entry in whole["history"]]
    lost = evaluated.index(before) - evaluated.index(elastic["resumed_after"][0])
    # One that was not saved, and, as they come faster here than Ray's controller asks for them, one that still waits for it.
    assert lost <= 2, f"went on after step {elastic['resumed_after'][0]}, and had been at {before}"
    for left, right in zip(whole["history"], elastic["history"], strict=True):
        assert left["train_loss"] == pytest.approx(right["train_loss"], rel=1e-3), "each row once in each epoch"
    assert difference(expected, found) < 1e-3
