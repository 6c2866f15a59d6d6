"""What the operator makes of each answer of Ray's Jobs API. Run by Airflow's own interpreter, prints one JSON object.

    .venv-airflow/bin/python tests/operator_cases.py      with cluster/airflow/plugins as PYTHONPATH

Ray's answers are those seen with 2.60: 404 for an unknown job, 500 for a submission id that is taken, 401 without the token.
"""

import json
import os
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

TOKEN = "the-token"


class JobsApi(BaseHTTPRequestHandler):
    """Jobs by their submission id: what each look at them finds, the last one for good; a number is the code of an error."""

    jobs: dict[str, list[dict[str, Any] | int]]
    becomes: list[dict[str, Any] | int]
    """what a job that is submitted does"""
    nodes: list[tuple[str, ...]]
    """those that are alive at each look, the last ones for good"""
    slow_seconds: float
    """that the first look at a job takes"""
    taken: bool
    """another one submits the same id first"""
    asked: list[str]
    sent: dict[str, Any]
    """the body that submitted the last job"""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on standard error."""

    def answer(self, code: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/jobs/").removesuffix("/logs")
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, {})
        if self.path == "/nodes?view=summary":
            dead = {"raylet": {"nodeId": "n0", "state": "DEAD"}}
            seen = self.nodes.pop(0) if len(self.nodes) > 1 else self.nodes[0]
            alive = [{"raylet": {"nodeId": one, "state": "ALIVE"}} for one in seen]
            return self.answer(200 if alive else 404, {"data": {"summary": [dead, *alive]}} if alive else {})
        if self.path.endswith("/logs"):
            return self.answer(200, {"logs": "a line"})
        if name not in self.jobs:
            return self.answer(404, {})
        time.sleep(type(self).slow_seconds)
        type(self).slow_seconds = 0
        looks = self.jobs[name]
        found = looks.pop(0) if len(looks) > 1 else looks[0]
        return self.answer(found, {}) if isinstance(found, int) else self.answer(200, found)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        self.asked.append(body.get("submission_id") or self.path)
        name = body.get("submission_id", "")
        if self.path.endswith("/stop"):
            return self.answer(200, {"stopped": True})
        self.sent.update(body)
        self.jobs[name] = self.becomes
        return self.answer(500 if self.taken else 200, {})


def case(
    becomes: list[dict[str, Any] | int],
    there: dict[str, list[dict[str, Any] | int]] | None = None,
    taken: bool = False,
    away_seconds: float = 600,
    nodes: tuple[tuple[str, ...], ...] = ((),),
    slow_seconds: float = 0,
    gone_seconds: float = 0,
    token: str = TOKEN,
    logical_date: datetime | None = datetime(2026, 11, 26, 1, tzinfo=UTC),
    **options: Any,
) -> dict[str, Any]:
    """Run the operator once, against a server of its own."""
    import ray_jobs

    ray_jobs.AWAY_SECONDS, ray_jobs.GONE_SECONDS = away_seconds, gone_seconds

    class Case(JobsApi):
        pass

    Case.jobs, Case.becomes, Case.taken, Case.asked, Case.sent = there or {}, becomes, taken, [], {}
    Case.nodes, Case.slow_seconds = list(nodes), slow_seconds
    server = ThreadingHTTPServer(("127.0.0.1", 0), Case)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection = {"conn_type": "http", "host": "127.0.0.1", "port": server.server_port, "password": token}
    os.environ["AIRFLOW_CONN_RAY"] = json.dumps(connection)
    context = {
        "ti": SimpleNamespace(dag_id="nightly", task_id="score", map_index=-1),
        "dag_run": SimpleNamespace(
            clear_number=1,
            start_date="2026-11-26",
            logical_date=logical_date,
            run_after=datetime(2026, 11, 27, 2, 3, 4, 5, tzinfo=UTC),
            run_id="r",
        ),
    }
    operator = ray_jobs.SubmitRayJobOperator(
        task_id="score", entrypoint="true", deferrable=False, poll_interval=0, **options
    )
    raised, said = "", ""
    try:
        operator.execute(context)
    except Exception as error:  # noqa: BLE001 (its name is what is looked at)
        raised, said = type(error).__name__, str(error)
    server.shutdown()
    server.server_close()
    return {
        "raised": raised,
        "said": said,
        "asked": Case.asked,
        "sent": Case.sent,
        "waited_for": operator.job_at_work,
    }


def ended(status: str, code: int | None = None) -> dict[str, Any]:
    return {"status": status, "driver_exit_code": code, "message": "", "start_time": 1}


def main() -> None:
    """All cases, by name."""
    running, good = ended("RUNNING"), ended("SUCCEEDED", 0)
    on_n0 = {**running, "driver_node_id": "n0"}
    name = "nightly.score.20261126T010000"
    cases = {
        "new": case([running, good]),
        "under way": case([good], {f"{name}-1": [running, running, good]}),
        "ended before": case([good], {f"{name}-1": [ended("FAILED", 4)], f"{name}-2": [good]}),
        "succeeded unseen": case([good], {f"{name}-1": [{**good, "metadata": {"dag_run_turn": "1 2026-11-26"}}]}),
        "cleared": case([good], {f"{name}-1": [{**good, "metadata": {"dag_run_turn": "0 2026-11-26"}}]}),
        "cleared at work": case(
            [good], {f"{name}-1": [{**running, "metadata": {"dag_run_turn": "0 2026-11-26"}}, good]}
        ),
        "another was first": case([running, good], taken=True),
        "usage": case([ended("FAILED", 2)]),
        "over limit": case([ended("FAILED", 3)]),
        "over budget": case([ended("FAILED", 6)]),
        "incomplete": case([ended("FAILED", 4)]),
        "a bug": case([ended("FAILED", 1)]),
        "died": case([ended("FAILED")]),
        "stopped": case([ended("STOPPED")]),
        "too long": case([running], job_timeout_seconds=1),
        "lost": case([running, 404]),
        "orphaned": case([on_n0], nodes=(("n1",),)),
        "orphaned for a moment": case([on_n0, on_n0, good], nodes=(("n1",),), gone_seconds=600),
        "head is just back": case(
            [on_n0, on_n0, good], nodes=(("n1",), ("n0", "n1")), gone_seconds=0.05, slow_seconds=0.2
        ),
        "node is there": case([on_n0, on_n0, good], nodes=(("n0", "n1"),)),
        "nodes unknown": case([on_n0, on_n0, good]),
        "away": case([running, 503, good], away_seconds=0),
        "away for a moment": case([running, 503, good]),
        "no token": case([good], token=""),
        "manual": case([good], logical_date=None),
        "processors": case([good], entrypoint_num_cpus=2, entrypoint_num_gpus=1),
        "named": case([good], submission_id="mine"),
        "environment": case([good], runtime_env={"working_dir": "s3://b/code.zip", "env_vars": {"A": "1"}}),
    }
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
