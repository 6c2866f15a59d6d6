"""Tracking: refusals, what is told of a run, and trackers that fail or go on, read back with the libraries' own readers."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lib.config import validate
from lib.errors import UsageError
from lib.storage import Store, open_store
from lib.tracking import About, Places, Tracker, find_places, params_of
from lib.train_config import TrainConfig
from tests.tracked import Numbers, metrics_of, mlflow_runs, scalars, vanishing_server

REPOSITORY = Path(__file__).parents[2]
ENTRIES = [{"step": step, "train_loss": 1 / step, "loss": 2 / step, "rows_per_second": 7.0} for step in (2, 4, 6, 8)]


def configure(output: str = "/o", **tracking: Any) -> TrainConfig:
    values = {
        "train": {"path": "s3://user:secret@bucket/train"},
        "model": {"base": "b"},
        "output": {"path": output},
        "tracking": tracking,
    }
    return validate(TrainConfig, values)


def begin(folder: Path, last_step: int = 0, output: str = "/m/topics", params: dict[str, str] | None = None) -> Tracker:
    places = Places(mlflow=str(folder / "mlruns"), experiment="textsweep", tensorboard=Store(f"{folder}/tensorboard"))
    return Tracker(places, About(run_id="night", output=output, params=params or {"optim.seed": "0"}), last_step)


def read(folder: Path) -> tuple[Numbers, Numbers, Any]:
    """What both hold, and MLflow's only run."""
    client, (run,) = mlflow_runs(folder / "mlruns")
    return metrics_of(client, run), scalars(folder / "tensorboard" / "topics" / "night"), run


def test_params_are_the_keys_with_a_value_without_credentials() -> None:
    params = params_of(configure(to="mlflow"))
    assert params["train.path"] == "s3://***@bucket/train"
    assert params["optim.epochs"] == "4"
    assert params["head.hidden_sizes"] == "[]"
    assert not [name for name in params if name.startswith("tracking.") or name == "valid.path"]
    assert "secret" not in str(params)


def test_places_are_beside_the_output_if_nothing_else_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output = open_store(f"{tmp_path}/models/topics")
    assert find_places(configure(), output, is_fresh=True) is None
    both = find_places(configure(to=["mlflow", "tensorboard"]), output, is_fresh=True)
    assert both == Places(
        mlflow=f"{tmp_path}/models/mlruns", experiment="textsweep", tensorboard=Store(f"{tmp_path}/models/tensorboard")
    )
    one = find_places(configure(to="tensorboard"), Store("s3://bucket/models/topics"), is_fresh=False)
    assert one is not None and one.tensorboard == Store("s3://bucket/models/tensorboard")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@server:5000")
    named = find_places(configure(to="mlflow"), output, is_fresh=False)
    assert named is not None and named.mlflow == "http://user:secret@server:5000"
    assert str(named) == "MLflow at http://***@server:5000, experiment 'textsweep'"


def test_what_cannot_be_tracked_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output = open_store(f"{tmp_path}/topics")
    for tracking, said in (
        ({"uri": "http://host"}, r"tracking.uri is set, but nothing is tracked; set tracking.to"),
        ({"to": "mlflow", "path": "runs"}, r"tracking.path is where tensorboard writes, .* does not name tensorboard"),
        ({"to": "tensorboard", "uri": "runs"}, r"tracking.uri is where mlflow writes, .* does not name mlflow"),
        ({"to": "tensorboard", "experiment": "a"}, r"tracking.experiment is where mlflow writes"),
        ({"to": "mlflow", "uri": "s3://bucket/runs"}, r"MLflow keeps no runs in S3; give a server"),
        (
            {"to": "mlflow", "uri": "http://127.0.0.1:9"},
            r"http://127.0.0.1:9: MLflow does not answer: .*start the server",
        ),
        ({"to": "tensorboard", "path": "/proc/none"}, r"/proc/none"),
    ):
        with pytest.raises(UsageError, match=said):
            find_places(configure(**tracking), output, is_fresh=True)
    assert find_places(configure(to="mlflow", uri="http://127.0.0.1:9"), output, is_fresh=False), (
        "in mid-run it goes on"
    )
    with pytest.raises(UsageError, match=r"tracking.uri = \"http://\*\*\*@host\": credentials do not belong") as caught:
        configure(to="mlflow", uri="http://user:secret@host")
    assert "secret" not in str(caught.value)
    for name, missing in (("mlflow", "mlflow-skinny"), ("tensorboard", "tensorboard")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
            with pytest.raises(
                UsageError, match=rf"tracking.to = {name} needs .* pip install {missing}, on every node"
            ):
                find_places(configure(to=name), output, is_fresh=False)


def test_a_run_that_goes_on_has_each_step_once(tmp_path: Path) -> None:
    """Killed after its third evaluation, of whose checkpoint nothing is left; and another output's run of the same id."""
    begin(tmp_path / "other", output="/m/other").log(ENTRIES[:1])
    begin(tmp_path, params={"optim.seed": "0", "resources.num_workers": "1"}).log(ENTRIES[:3])
    again = begin(tmp_path, last_step=4, params={"optim.seed": "0", "resources.num_workers": "2"})
    again.log(ENTRIES[:3])
    again.log(ENTRIES)
    again.end({"best": {"loss": 0.25}, "test": None}, 8)
    for numbers in read(tmp_path)[:2]:
        for name, key in (("train/loss", "train_loss"), ("valid/loss", "loss")):
            assert [step for step, _ in numbers[name]] == [one["step"] for one in ENTRIES]
            assert [value for _, value in numbers[name]] == pytest.approx([one[key] for one in ENTRIES])
        assert numbers["best/loss"] == [(8, 0.25)]
    run = read(tmp_path)[2]
    assert run.data.params == {"optim.seed": "0", "resources.num_workers": "1"}, "MLflow takes a parameter once"
    assert run.info.status == "FINISHED"


def test_a_run_of_the_same_id_with_another_output_is_another_run(tmp_path: Path) -> None:
    for output in ("/m/topics", "/n/topics"):
        begin(tmp_path, output=output).log(ENTRIES[:1])
    assert len(mlflow_runs(tmp_path / "mlruns")[1]) == 2


def test_a_tracker_that_fails_is_said_once_and_caught_up_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = begin(tmp_path)
    tracker.log(ENTRIES[:1])
    for folder in ("mlruns", "tensorboard"):
        (tmp_path / folder).rename(tmp_path / f"{folder}-away")
        (tmp_path / folder).write_text("a disk that is gone")
    tracker.opened.clear()  # a file that is open can be written to wherever it is
    tracker.log(ENTRIES[:2])
    tracker.log(ENTRIES[:3])
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert [line.split()[1] for line in warnings] == ["MLflow", "TensorBoard"]
    assert all("training goes on" in line for line in warnings)
    for folder in ("mlruns", "tensorboard"):
        (tmp_path / folder).unlink()
        (tmp_path / f"{folder}-away").rename(tmp_path / folder)
    tracker.log(ENTRIES)
    for numbers in read(tmp_path)[:2]:
        assert [step for step, _ in numbers["train/loss"]] == [2, 4, 6, 8]


def test_a_server_that_is_gone_costs_seconds_not_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with vanishing_server() as uri:
        config = configure(to="mlflow", uri=uri)
        places = find_places(config, Store("/o"), is_fresh=True)
    assert places is not None
    tracker = Tracker(places, About(run_id="night", output="/o", params={}), 0)
    tracker.log(ENTRIES)
    tracker.end({}, 8)
    assert capsys.readouterr().err.count("WARNING: MLflow") == 1


def test_mlflow_sends_nothing_and_writes_nowhere_else(tmp_path: Path) -> None:
    """In a process that is no test, in a home and a working folder of its own."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    code = f"""
from lib.storage import Store
from lib.tracking import About, Places, Tracker
places = Places(mlflow="{tmp_path}/mlruns", experiment="textsweep", tensorboard=Store("{tmp_path}/tensorboard"))
tracker = Tracker(places, About(run_id="night", output="/m/topics", params={{}}), 0)
tracker.log({ENTRIES!r})
tracker.end({{}}, 8)
from mlflow.telemetry import get_telemetry_client
from mlflow.telemetry.utils import is_telemetry_disabled
assert is_telemetry_disabled() and get_telemetry_client() is None
"""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG")}
    environment = kept | {"HOME": f"{tmp_path}/home", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "here",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [list((tmp_path / name).rglob("*")) for name in ("home", "here")] == [[], []]
    assert [step for step, _ in read(tmp_path)[0]["valid/loss"]] == [2, 4, 6, 8]
