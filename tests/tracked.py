"""What MLflow and TensorBoard hold of a run, read with their own readers, and a tracking server that goes away."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lib.train_config import TrainConfig

Numbers = dict[str, list[tuple[int, float]]]
"""By name: step and value, as they were written."""


def scalars(folder: Path) -> Numbers:
    """What TensorBoard shows of a run's folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


def mlflow_runs(folder: Path, experiment: str = "textsweep") -> tuple[MlflowClient, list[Any]]:
    """The runs of an experiment in a folder of MLflow's."""
    client = MlflowClient(tracking_uri=str(folder))
    found = client.get_experiment_by_name(experiment)
    return client, list(client.search_runs([found.experiment_id])) if found else []


def metrics_of(client: MlflowClient, run: Any) -> Numbers:
    return {
        name: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def assert_same_numbers(numbers: Numbers, metrics: dict[str, Any]) -> None:
    """Every evaluation of the history once, in order, and the results at its end."""
    history, last = metrics["history"], metrics["history"][-1]["step"]
    for shown, name in (
        ("train/loss", "train_loss"),
        ("train/grad_norm", "grad_norm"),
        ("train/rows_per_second", "rows_per_second"),
        ("valid/loss", "loss"),
        ("valid/accuracy", "accuracy"),
        ("valid/macro_f1", "macro_f1"),
    ):
        assert [step for step, _ in numbers[shown]] == [entry["step"] for entry in history], shown
        if (
            name != "rows_per_second" or not metrics["resumed_after"]
        ):  # an evaluation that is repeated has another speed
            assert [value for _, value in numbers[shown]] == pytest.approx([entry[name] for entry in history]), shown
    for name in ("accuracy", "macro_f1", "loss"):
        for shown, expected in ((f"test/{name}", metrics["test"][name]), (f"best/{name}", metrics["best"][name])):
            assert [step for step, _ in numbers[shown]] == [last], shown
            assert numbers[shown][0][1] == pytest.approx(expected), shown


def assert_tracked(config: TrainConfig, run_id: str, metrics: dict[str, Any]) -> Any:
    """That both have the numbers of metrics.json, where they are looked for by default; gives MLflow's run."""
    output = Path(config.output.path)
    client, runs = mlflow_runs(output.parent / "mlruns")
    assert [(run.info.run_name, run.info.status) for run in runs] == [(run_id, "FINISHED")]
    assert_same_numbers(metrics_of(client, runs[0]), metrics)
    assert_same_numbers(scalars(output.parent / "tensorboard" / output.name / run_id), metrics)
    return runs[0]


@contextlib.contextmanager
def vanishing_server() -> Iterator[str]:
    """The URL of a tracking server that says once that it knows nothing, and is gone."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}'
            self.send_response(404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    port = server.server_port

    def serve() -> None:
        server.handle_request()
        server.server_close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{port}"
    thread.join()
