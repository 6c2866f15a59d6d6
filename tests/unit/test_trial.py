"""One trial in this process: what ends it, what it leaves, and what is trouble of the node or the storage and not its own."""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from lib.config import validate
from lib.errors import DeniedError, IncompleteError, UsageError
from lib.halving import percents_of, record_text
from lib.search import check_trials, prepare_jobs
from lib.space import SearchConfig, point_text
from lib.storage import open_store
from lib.trial import Record, TrialFit, TrialPlan, alone, run_trial
from tests import fakes
from tests.labelled import make_rows

GOOD, DIVERGING = 5e-3, 1e30
EPOCHS, STEPS = 4, 16
"""With looks at 25% and 50%: each falls on an evaluation."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trial")
    fakes.make_encoder(folder / "base", "bert")
    for name, count, seed in (("train", 64, 1), ("valid", 30, 2)):
        texts, labels = make_rows(count, seed)
        fakes.write_archive(str(folder), {f"{name}.parquet": pa.table({"text": texts, "label": labels})})
    return folder


@dataclass
class Trials:
    """Trials, and what they told Ray Tune: after which percent of their steps, and the record then."""

    plan: TrialPlan
    told: list[tuple[float, Record]]

    def run(self, number: int = 1) -> Record:
        """Run one to its end, and return what it told last."""
        try:
            run_trial({"number": number}, self.plan)
        finally:
            dist.destroy_process_group()
        return self.told[-1][1]


@pytest.fixture
def make_trials(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Checked and tokenized as `search` does it, without Ray."""
    told: list[tuple[float, Record]] = []
    monkeypatch.setattr("lib.labelled.tokenize_all", lambda items, tokenize_block: [*map(tokenize_block, items)])
    monkeypatch.setattr(
        "lib.trial.tune.report",
        lambda one: told.append((one["percent"], Record.model_validate_json(one["record"]))),
    )

    def make(rate: float = GOOD, **sections: dict[str, Any]) -> Trials:
        values: dict[str, dict[str, Any]] = {
            "train": {"path": f"{folder}/train.parquet"},
            "valid": {"path": f"{folder}/valid.parquet"},
            "model": {"base": f"{folder}/base", "precision": "fp32", "dropout": 0.0},
            "optim": {"learning_rate": rate, "batch_size": 16, "epochs": EPOCHS},
            "stopping": {"metric": "loss"},
            "output": {"path": f"{tmp_path}/search"},
            "search": {"space": {"optim": {"seed": [0, 1]}}},
        }
        for name, section in sections.items():
            values.setdefault(name, {}).update(section)
        config = validate(SearchConfig, values)
        output = open_store(f"{tmp_path}/search/best")
        sources, trials = check_trials(config, output)
        plan = TrialPlan(
            jobs=prepare_jobs("night-1", sources, trials, output, open_store(f"{tmp_path}/run"), 1, None),
            points={one.number: one.point for one in trials},
            percents=percents_of(config.search),
            known={},
            use_gpu=False,
        )
        return Trials(plan, told)

    return make


def test_a_look_that_falls_on_an_evaluation_takes_what_that_says(
    make_trials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = []

    class Watched(TrialFit):
        def summary(self, logits: Any) -> dict[str, float]:
            evaluated.append(self.progress.step)
            return super().summary(logits)

    monkeypatch.setattr("lib.trial.TrialFit", Watched)
    trials = make_trials()
    record = trials.run()
    assert record.status == "done" and record.step == STEPS
    assert evaluated == [entry["step"] for entry in record.history] == [4, 8, 12, 16]
    assert [percent for percent, _ in trials.told] == [25, 50, 100]
    by_step = {entry["step"]: entry["loss"] for entry in record.history}
    assert [(look.step, look.value) for look in record.looks] == [(4, by_step[4]), (8, by_step[8])]


def test_a_trial_that_diverges_fails_once_and_for_good(make_trials: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is looked at after the step of an evaluation that found no number."""
    trials = make_trials(DIVERGING)
    record = trials.run()
    steps = [entry["step"] for entry in record.history]
    assert steps == [4] and record.step == 4
    assert record.history[0]["train_loss"] is None
    assert record.status == "failed" and "no finite number from step" in (record.reason or "")
    assert [percent for percent, _ in trials.told] == [100]


def test_only_weights_that_are_averaged_are_kept(make_trials: Any) -> None:
    for average, kept in ((1, 0), (2, 2)):
        plan = make_trials(stopping={"average": average}).plan
        fit = TrialFit(1, plan, alone(plan.jobs[1], use_gpu=False))
        try:
            fit.run()
            assert len(fit.kept) == kept
            record = fit.result()
        finally:
            dist.destroy_process_group()
        best = min(entry["loss"] or math.inf for entry in record.history)
        assert (record.value == best) == (average == 1)


def test_what_is_wrong_with_a_trial_itself_is_its_record(make_trials: Any, folder: Path) -> None:
    path = f"{folder}/train.parquet"  # every validation row is known
    record = make_trials(valid={"path": path}, data={"duplicates": "refuse"}).run()
    assert (record.status, record.value, record.step) == ("failed", None, 0)
    assert "64 of 64 valid rows have the text of a training row" in (record.reason or "")


def test_a_trial_that_runs_out_of_gpu_memory_says_what_to_raise(
    make_trials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lib.trial.TrialFit.batches_of", raising(torch.cuda.OutOfMemoryError("no room for 2 GiB\nmore"))
    )
    record = make_trials().run()
    assert record.status == "failed"
    assert record.reason == "out of GPU memory (no room for 2 GiB); raise optim.accumulation_steps"


def raising(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("where", ["lib.trial.local_paths", "lib.trial.fetch", "lib.classifying.map_set"])
def test_storage_that_lets_nobody_in_is_no_trial_that_failed(
    where: str, make_trials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Tune tries it again, and the same command after that."""
    trials = make_trials()
    monkeypatch.setattr(where, raising(DeniedError("s3://bucket/x: not allowed to read it (ExpiredToken)")))
    with pytest.raises(IncompleteError, match=r"not allowed to read it \(ExpiredToken\); .*run the same command again"):
        run_alone(trials)
    assert not trials.told


def run_alone(trials: Trials) -> None:
    try:
        run_trial({"number": 1}, trials.plan)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_base_that_one_node_lacks_is_no_trial_that_failed(make_trials: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "moved")
    trials = make_trials(model={"base": f"{tmp_path}/moved"})
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(IncompleteError, match=r"moved: there is no such model folder; .*every node must see it"):
        run_alone(trials)
    assert not trials.told


def test_what_is_kept_of_a_trial_holds_no_password(
    make_trials: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [f"s3://me:secret@host/{name}" for name in "ab"]
    monkeypatch.setattr("lib.search.find_replacing", lambda *_: f"{folder}/base")
    monkeypatch.setattr("lib.classifying.new_augmenter", raising(UsageError(f"augment.model {models[0]}: no")))
    record = make_trials(
        search={"space": {"augment": {"model": models}}}, augment={"replace": 0.1, "model": models[0]}
    ).run()
    assert record.point == {"augment.model": "s3://***@host/a"}
    assert record.reason == "augment.model s3://***@host/a: no"
    assert "secret" not in record_text(record, "loss") and "secret" not in point_text({"augment.model": models[0]})


def test_a_trial_that_is_over_is_only_told_again(make_trials: Any) -> None:
    trials = make_trials()
    record = trials.run()
    trials.told.clear()
    told_again = replace(trials.plan, known={1: record})
    run_trial({"number": 1}, told_again)
    assert [(percent, one.value) for percent, one in trials.told] == [
        *((look.percent, look.value) for look in record.looks),
        (100, record.value),
    ]


def test_each_trial_learns_by_its_own_loss(make_trials: Any) -> None:
    """Though all take the same tokenized rows."""
    plan = make_trials(search={"space": {"loss": {"kind": ["cross_entropy", "focal"]}}}).plan
    assert {job.config.loss.kind: job.tasks[0].objective.gamma for job in plan.jobs.values()} == {
        "cross_entropy": 0.0,
        "focal": 2.0,
    }
