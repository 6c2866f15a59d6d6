"""A search on a real Ray: one rate of several learns, the others are hopeless or diverge."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pyarrow as pa
import pytest

from jobs import search as search_job
from jobs import train as train_job
from jobs.demo_store import LoopbackS3
from lib.config import validate
from lib.errors import StoppedError, UsageError
from lib.halving import run_trials
from lib.mapped import local_copy
from lib.runtime import cluster_facts
from lib.search import as_trial, search
from lib.space import SearchConfig, SearchSection
from lib.storage import open_store
from lib.train_config import TrainConfig
from lib.trial import TrialPlan
from tests import fakes
from tests.labelled import make_rows
from tests.waiting import wait_until

HOPELESS, GOOD, DIVERGING = 1e-7, 5e-3, 1e30
RATES = [HOPELESS, 2e-7, 3e-7, GOOD, DIVERGING]
"""Trial 1 is the first one, as given; seed 0 draws GOOD, 2e-7, DIVERGING, 3e-7."""
STEPS = 24


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("search")
    fakes.make_encoder(folder / "base", "bert")
    for name, count, seed in (("train", 128, 1), ("valid", 60, 2), ("test", 60, 3)):
        texts, labels = make_rows(count, seed)
        fakes.write_archive(str(folder), {f"{name}.parquet": pa.table({"text": texts, "label": labels})})
    return {name: f"{folder}/{name}.parquet" for name in ("train", "valid", "test")} | {"base": f"{folder}/base"}


def configure(paths: dict[str, str], output: str, **search_keys: Any) -> SearchConfig:
    space = {"optim": {"learning_rate": RATES}}
    return validate(
        SearchConfig,
        {
            "train": {"path": paths["train"]},
            "valid": {"path": paths["valid"]},
            "test": {"path": paths["test"]},
            "model": {"base": paths["base"], "precision": "fp32", "dropout": 0.0},
            "optim": {"learning_rate": HOPELESS, "batch_size": 16, "epochs": 3},
            "stopping": {"metric": "loss"},
            "output": {"path": output},
            "search": {"space": space, "trials": 5, "concurrent": 1} | search_keys,
        },
    )


Found = tuple[SearchConfig, dict[str, Any], str]


@pytest.fixture(scope="module")
def found(paths: dict[str, str], ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Found:
    config = configure(paths, str(tmp_path_factory.mktemp("found") / "search"))
    return config, search(config, "night-1", cluster_facts()), config.output.path


def test_the_rate_that_learns_is_found_and_the_hopeless_ones_are_ended(found: Found) -> None:
    _, result, _ = found
    trials = {one["point"]["optim.learning_rate"]: one for one in result["trials"]}
    assert list(trials) == [HOPELESS, GOOD, 2e-7, DIVERGING, 3e-7]
    assert result["best"]["trial"] == 2 and result["best"]["point"] == {"optim.learning_rate": GOOD}
    assert {rate: one["status"] for rate, one in trials.items()} == {
        HOPELESS: "done",  # the first one has nobody to be compared with
        GOOD: "done",
        2e-7: "stopped",
        DIVERGING: "failed",
        3e-7: "stopped",
    }
    assert [trials[rate]["step"] for rate in (HOPELESS, GOOD)] == [STEPS, STEPS]
    # Of the three before it at a quarter 3e-7 is better than the middle one, of the two at the half it is not.
    assert [trials[rate]["step"] for rate in (2e-7, 3e-7)] == [STEPS // 4, STEPS // 2]
    assert all(one["steps"] == STEPS for one in trials.values())
    assert re.search(r"no finite number from step \d", trials[DIVERGING]["reason"])
    assert result["steps"] < 0.75 * result["steps_without_stopping"]


def test_the_best_is_trained_once_more_to_the_same_numbers(found: Found, capsys: pytest.CaptureFixture[str]) -> None:
    """By jobs.train as it is, from best.toml, which as it stands is the run that committed the checkpoint."""
    _, result, output = found
    history = result["trials"][result["best"]["trial"] - 1]["history"]
    trained = json.loads((Path(output) / "best" / "metrics.json").read_text())
    for left, right in zip(trained["history"], history, strict=True):
        for name in ("step", "train_loss", "grad_norm", "loss", "macro_f1"):
            assert left[name] == right[name], name
    assert result["best"]["value"] == trained["best"]["loss"] == result["best"]["trained"]["validation"]["loss"]
    assert result["best"]["trained"]["test"]["accuracy"] == trained["test"]["accuracy"]
    train_job.main(["--config", f"{output}/best.toml", "--run-id", "night-1"])
    assert "committed this checkpoint already" in capsys.readouterr().out


def test_the_recipe_holds_what_differs_from_the_defaults(found: Found, paths: dict[str, str]) -> None:
    _, _, output = found
    text = (Path(output) / "best.toml").read_text()
    assert tomllib.loads(text) == {
        **{name: {"path": paths[name]} for name in ("train", "valid", "test")},
        "model": {"base": paths["base"], "precision": "fp32", "dropout": 0.0},
        "optim": {"learning_rate": GOOD, "batch_size": 16, "epochs": 3},
        "stopping": {"metric": "loss"},
        "output": {"path": f"{output}/best"},
    }


def test_the_report_shows_every_trial_and_asks_nobody(found: Found) -> None:
    _, result, output = found
    page = (Path(output) / "search.html").read_text()
    table = pd.read_html(Path(output) / "search.html")[0].set_index("trial")
    assert set(table.index) == {1, 2, 3, 4, 5} and table.index[0] == 2
    assert table["loss"][2] == pytest.approx(result["best"]["value"], abs=5e-5)
    assert page.count("<svg") == 2
    assert not re.search(r"<script|<link|src=|https?://(?!www\.w3\.org)(?!purl\.org)(?!creativecommons\.org)", page)


def test_a_finished_search_answers_at_once_and_another_is_refused(
    found: Found, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, result, output = found
    monkeypatch.setattr("lib.search.run_trials", None)  # nothing is run again
    assert search(config, "night-1", cluster_facts()) == result
    for other, run_id in ((config, "night-2"), (configure_like(config, trials=6), "night-1")):
        with pytest.raises(UsageError, match="holds the search of run 'night-1'"):
            search(other, run_id, cluster_facts())
    assert search(configure_like(config, concurrent=2), "night-1", cluster_facts()) == result
    with pytest.raises(UsageError, match=r"holds a checkpoint; give the search an output.path of its own"):
        search(config.model_copy(update={"output": config.output.model_copy(update={"path": f"{output}/best"})}),
               "night-1", cluster_facts())  # fmt: skip
    assert not (Path(output) / "_search").exists()


def configure_like(config: SearchConfig, **search_keys: Any) -> SearchConfig:
    return config.model_copy(update={"search": config.search.model_copy(update=search_keys)})


def test_a_search_that_was_stopped_goes_on_and_needs_no_test_rows(
    paths: dict[str, str],
    s3: LoopbackS3,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The tokenized test rows are gone when it goes on: no trial may open them."""
    config = configure(paths, f"{s3.bucket()}/search", train_best=False, trials=3)
    folder = open_store(f"{config.output.path}/_search/night-1")
    with monkeypatch.context() as patch:
        patch.setattr("lib.search.run_trials", stopped_after_two)
        with pytest.raises(StoppedError):
            search(config, "night-1", cluster_facts())
    over = {name: folder.read(f"trials/{name}.json") for name in ("00001", "00002")}
    assert all(over.values()) and folder.read("trials/00003.json") is None
    with pytest.raises(UsageError, match="was started with another configuration"):
        search(configure_like(config, seed=1), "night-1", cluster_facts())
    tests = [name for name in folder.list("data")["path"].to_pylist() if "/test-" in name]
    assert len(tests) == 1
    folder.delete_all(tests)
    copy = local_copy(folder.at("data").at(tests[0].split("/")[-2]))
    assert list(copy.iterdir()), "what trials have read lies on their node"
    capsys.readouterr()

    result = search(config, "night-1", cluster_facts())
    said = capsys.readouterr().out
    assert "3 trials, 1 at a time; 2 are over" in said
    assert re.findall(r"^\[(\d)/3\] trial (\d)", said, re.M) == [("3", "3")]
    for number, kept in enumerate(over.values()):
        assert result["trials"][number] == json.loads(kept or b"")  # with the seconds that it took then
    assert [one["status"] for one in result["trials"]] == ["done", "done", "stopped"], "known ones are compared with"
    assert result["best"]["trained"] is None and "best/config.json" not in names(config)
    assert "_search" not in " ".join(names(config)) and not copy.exists()


def names(config: SearchConfig) -> list[str]:
    found: list[str] = open_store(config.output.path).list()["path"].to_pylist()
    return found


def stopped_after_two(section: SearchSection, plan: TrialPlan, *arguments: Any) -> None:
    """Runs trials 1 and 2, and is stopped."""
    run_trials(section, replace(plan, jobs={number: plan.jobs[number] for number in (1, 2)}), *arguments)
    raise StoppedError("stopped by the test")


def test_a_wrong_trial_is_named_before_anything_is_done(
    paths: dict[str, str], ray_session: None, tmp_path: Path
) -> None:
    argv = [f"--set={name}.path={paths[name]}" for name in ("train", "valid")]
    argv += [f"--set=model.base={paths['base']}", f"--set=output.path={tmp_path / 'none'}"]
    for given, message in (
        (
            "search.space.optim.learning_rat=[1e-5, 1e-3]",
            "unknown key 'optim.learning_rat', did you mean 'learning_rate'",
        ),
        ("resources.strategy=fsdp", "a trial is one worker"),
        ("search.concurrent=9", "search.concurrent = 9 with a CPU for each trial, the cluster has 1 nodes, 4 CPUs"),
        ("search.space.loss.positive_weights=['balanced', {a = 1.0}]", "trial 2 .*positive_weights"),
        ("stopping.metric=pearson", "this data is multi-class"),
    ):
        with pytest.raises(UsageError, match=message):
            search_job.main([*argv, f"--set={given}"])
    assert not (tmp_path / "none").exists()


def test_several_workers_of_training_are_one_in_a_trial() -> None:
    values = {"train": {"path": "t"}, "model": {"base": "b"}, "output": {"path": "o"}, "data": {"label_noise": True}}
    config = validate(TrainConfig, values | {"resources": {"num_workers": 4}, "optim": {"accumulation_steps": 2}})
    found = as_trial(config)
    assert (found.resources.num_workers, found.optim.accumulation_steps, found.data.label_noise) == (1, 8, False)


# on a Ray of their own


def start(paths: dict[str, str], output: Path, log: Path) -> subprocess.Popen[bytes]:
    """A search whose trials take seconds, as a process of its own."""
    given = {f"{name}.path": paths[name] for name in ("train", "valid", "test")} | {
        "model.base": paths["base"],
        "output.path": str(output),
        "optim.epochs": 200,
        "stopping.patience": 1000,
        "search.space.optim.learning_rate": "[1e-4, 1e-3, 5e-3, 1e-2]",
        "search.trials": 4,
        "search.stopping": "none",
    }
    argv = [sys.executable, "-m", "jobs.search", "--run-id", "night-1"]
    with log.open("ab") as sink:
        return subprocess.Popen(
            [*argv, *(f"--set={key}={value}" for key, value in given.items())], stdout=sink, stderr=subprocess.STDOUT
        )


def trial_processes(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    for one in psutil.Process(job.pid).children(recursive=True):
        try:
            title = " ".join(one.cmdline())
        except psutil.Error:
            continue
        if title.startswith(("ray::run_trial", "ray::ImplicitFunc")):
            found.append(one)
    return found


@pytest.mark.trial
def test_a_search_that_is_stopped_and_loses_a_process_is_finished_by_the_same_command(
    paths: dict[str, str], tmp_path: Path
) -> None:
    output, log = tmp_path / "search", tmp_path / "log.txt"
    trials = output / "_search" / "night-1" / "trials"
    first = start(paths, output, log)
    wait_until(lambda: (trials / "00001.json").exists(), "the first trial", 240)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=30) == 5, log.read_text()
    assert "stopped by SIGTERM" in log.read_text()
    over = {path.name: path.read_bytes() for path in trials.iterdir()}
    assert 0 < len(over) < 4

    second = start(paths, output, log)
    wait_until(lambda: bool(trial_processes(second)) and "are over" in log.read_text(), "a trial at work", 240)
    os.kill(trial_processes(second)[0].pid, signal.SIGKILL)
    assert second.wait(timeout=500) == 0, log.read_text()
    said = log.read_text()
    assert said.count("it is run once more") == 1
    result = json.loads((output / "search.json").read_text())
    assert [one["status"] for one in result["trials"]] == ["done"] * 4
    for name, kept in over.items():
        assert result["trials"][int(name.removesuffix(".json")) - 1] == json.loads(kept)
    assert result["best"]["trained"]["validation"]["macro_f1"] == result["best"]["value"]
