"""Run a command as a Ray job, from Airflow 3.3 or newer: an operator that waits in the triggerer, and costs no worker meanwhile.

It speaks HTTP to Ray's Jobs API, so Airflow's environment needs neither Ray nor anything of the project. The connection (`conn_id`) is
of type HTTP: host and port of Ray's dashboard, the token as its password. It is looked up where it is used; the token is no part of
what Airflow stores for a task or a trigger, nor of what Ray shows of a job.

A job's submission id is made of DAG, task and logical date, and of a number that grows when a job of that name has ended. Whoever looks
for a job that is under way (a retry after a worker was killed, a task that was cleared) finds it and waits for it, and a retry
takes the success of a job that ended unseen; only a job that failed, or that was there before the task was cleared, is followed by
another one. So there is never a second job beside the first, and a reply that was lost costs nothing.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
from airflow.sdk import BaseHook, BaseOperator, Connection, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from airflow.triggers.base import BaseTrigger, TriggerEvent

FINAL = ("SUCCEEDED", "FAILED", "STOPPED")
NOT_AGAIN = {
    2: "the command or the configuration is wrong",
    3: "what it found is over its limits, nothing was published or accepted",
    6: "its budget is spent",
}
"""Exit codes of a job that another try would not change."""
TIMEOUT_SECONDS = 30
"""of one request"""
AWAY_SECONDS = 600
"""How long Ray may not answer before waiting ends; the task's next try looks for the job again."""
GONE_SECONDS = 60
"""How long a job may be RUNNING though the node of its driver is gone. Ray 2.60 says so of a driver that was lost with the head, if the head
came back with its state from Redis, until it is asked to start or stop a job."""
JOB_ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": "40"}
"""Seconds until a job that is told to stop is killed; it needs up to 30, Ray's default is 3. The job's supervisor reads it in the job's
own environment: it holds on clusters that do not set it, too."""
LOG_LINES = 50
TURN = "dag_run_turn"
"""In a job's metadata: which turn of its DAG run it belongs to, see `turn`."""


def settings(connection: Connection) -> dict[str, Any]:
    """What an HTTP client needs to reach Ray with its token."""
    headers = {"Authorization": f"Bearer {connection.password}"} if connection.password else {}
    address = f"{connection.schema or 'http'}://{connection.host}:{connection.port or 8265}"
    return {"base_url": f"{address}/api/jobs/", "headers": headers, "timeout": TIMEOUT_SECONDS}


def nodes_alive(response: httpx.Response) -> set[str]:
    """The ids of a cluster's nodes; none if that cannot be known, as behind an ingress for jobs alone."""
    try:
        nodes = response.json()["data"]["summary"]
        return {one["raylet"]["nodeId"] for one in nodes if one["raylet"]["state"] == "ALIVE"}
    except (ValueError, KeyError, TypeError):
        return set()


def found_in(response: httpx.Response) -> dict[str, Any] | None:
    """What Ray says of a job, None if it knows none of that id.

    Raises `AirflowFailException` if the token is refused, `httpx.HTTPStatusError` for any other trouble.
    """
    if response.status_code == httpx.codes.NOT_FOUND:
        return None
    if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise AirflowFailException(
            f"Ray at {response.url.host}:{response.url.port} refused the token (HTTP {response.status_code}): set the connection's password to the cluster's token"
        )
    response.raise_for_status()
    return dict(response.json())


class RayJobTrigger(BaseTrigger):
    """Wait for the end of a Ray job; stop it if somebody ends the task that waits.

    Yields one event: `submission_id`, `status` (one of `FINAL`, or LOST, ORPHANED, AWAY, TIMEOUT), `exit_code` of the command or None, `message`.
    """

    def __init__(
        self, conn_id: str, submission_id: str, poll_interval: float = 30, job_timeout_seconds: float | None = None
    ) -> None:
        super().__init__()
        self.conn_id = conn_id
        self.submission_id = submission_id
        self.poll_interval = poll_interval
        self.job_timeout_seconds = job_timeout_seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """What Airflow stores, and makes the trigger of again in any triggerer."""
        names = ("conn_id", "submission_id", "poll_interval", "job_timeout_seconds")
        return f"{type(self).__module__}.{type(self).__name__}", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Ask every `poll_interval` seconds. That Ray does not answer is no verdict on its job for `AWAY_SECONDS`."""
        answered, shown = time.monotonic(), ""
        gone_since = None
        async with await self.client() as client:
            while True:
                status, info, message = "", {}, ""
                try:
                    known = found_in(await client.get(self.submission_id))
                    answered = time.monotonic()
                    info, status = (known, known["status"]) if known else ({}, "LOST")
                    message = info.get("message") or ""
                    node = info.get("driver_node_id") if status == "RUNNING" else None
                    alive = (
                        nodes_alive(await client.get(client.base_url.join("/nodes?view=summary"))) if node else set()
                    )
                    if not alive or node in alive:
                        gone_since = None
                    elif gone_since is None:  # the first look after a head was away tells of no node yet
                        gone_since = time.monotonic()
                    elif time.monotonic() - gone_since > GONE_SECONDS:
                        status = "ORPHANED"
                except AirflowFailException as error:
                    status, message = "AWAY", str(error)
                except httpx.HTTPError as error:
                    message = f"{type(error).__name__}: {error}"
                    self.log.warning("Ray did not answer: %s", message)
                    status = "AWAY" if time.monotonic() - answered > AWAY_SECONDS else ""
                if status and status != shown:
                    self.log.info("%s is %s", self.submission_id, status)
                    shown = status
                started = (info.get("start_time") or 0) / 1000
                if status not in (*FINAL, "LOST", "ORPHANED", "AWAY") and self.job_timeout_seconds and started:
                    status = "TIMEOUT" if time.time() - started > self.job_timeout_seconds else status
                if status in (*FINAL, "LOST", "ORPHANED", "AWAY", "TIMEOUT"):
                    event = {"submission_id": self.submission_id, "status": status, "message": message}
                    yield TriggerEvent({**event, "exit_code": info.get("driver_exit_code")})
                    return
                await asyncio.sleep(self.poll_interval)

    async def client(self) -> httpx.AsyncClient:
        """An HTTP client for Ray's Jobs API."""
        return httpx.AsyncClient(**settings(await BaseHook.aget_connection(self.conn_id)))

    async def on_kill(self) -> None:
        """Stop the job: somebody marked the waiting task, or cleared it. Airflow does not call this when a triggerer goes."""
        async with await self.client() as client:
            await client.post(f"{self.submission_id}/stop")


class SubmitRayJobOperator(BaseOperator):
    """Run a command as a Ray job and wait for its end.

    Exit codes 2, 3 and 6 of the command fail without another try; everything else (4, a crash, a job that was stopped, a cluster that is
    gone) is tried again as the task's `retries` say. Marking the task as failed stops the job.

    :param conn_id: the connection of type HTTP: Ray's dashboard, its token as password
    :param entrypoint: the command, run by a shell on the cluster
    :param submission_id: what the job is called, without its number; default: of DAG, task and logical date
    :param runtime_env: Ray's, for code that is in no image; never with secrets, Ray shows it. `JOB_ENVIRONMENT` is added to its env_vars
    :param metadata: shown with the job; DAG, task and run are added
    :param entrypoint_num_cpus: CPUs for the command itself, which then runs on a worker; default: none, on the head
    :param entrypoint_num_gpus: the same for GPUs
    :param poll_interval: seconds between two looks at the job
    :param job_timeout_seconds: a job that takes longer is stopped, and the task's next try goes on; default: no limit
    :param deferrable: wait in the triggerer; otherwise in the worker
    """

    template_fields: Sequence[str] = ("conn_id", "entrypoint", "submission_id", "runtime_env", "metadata")

    def __init__(
        self,
        *,
        entrypoint: str,
        conn_id: str = "ray",
        submission_id: str | None = None,
        runtime_env: dict[str, Any] | None = None,
        metadata: dict[str, str] | None = None,
        entrypoint_num_cpus: float | None = None,
        entrypoint_num_gpus: float | None = None,
        poll_interval: float = 30,
        job_timeout_seconds: float | None = None,
        deferrable: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.conn_id = conn_id
        self.entrypoint = entrypoint
        self.submission_id = submission_id
        self.runtime_env = runtime_env
        self.metadata = metadata
        self.entrypoint_num_cpus = entrypoint_num_cpus
        self.entrypoint_num_gpus = entrypoint_num_gpus
        self.poll_interval = poll_interval
        self.job_timeout_seconds = job_timeout_seconds
        self.deferrable = deferrable
        self.job_at_work: str | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Find the job that is under way or submit one, and wait."""
        with self.client() as client:
            self.job_at_work = self.find_or_submit(client, self.submission_id or derived_id(context), context)
        trigger = RayJobTrigger(self.conn_id, self.job_at_work, self.poll_interval, self.job_timeout_seconds)
        if self.deferrable:
            self.defer(trigger=trigger, method_name="execute_complete")
        return self.execute_complete(context, asyncio.run(first_event(trigger)))

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 (Airflow's)
        """Show the end of the job's log, and judge it. Returns the event of `RayJobTrigger`."""
        name, status, code = event["submission_id"], event["status"], event["exit_code"]
        with self.client() as client:
            try:
                log = client.get(f"{name}/logs").json().get("logs", "")
                self.log.info("the last lines of %s:\n%s", name, "\n".join(log.splitlines()[-LOG_LINES:]))
            except (httpx.HTTPError, ValueError) as error:
                self.log.warning("the log of %s could not be read: %s", name, error)
            if status in ("ORPHANED", "TIMEOUT"):
                client.post(f"{name}/stop").raise_for_status()
        if status == "SUCCEEDED":
            return event
        if code in NOT_AGAIN:
            raise AirflowFailException(
                f"{name} ended with exit code {code}: {NOT_AGAIN[code]}; its log says what to do"
            )
        why = {
            "LOST": "Ray does not know the job any more: its head was lost",
            "ORPHANED": "its driver was lost with the node that it ran on",
            "AWAY": f"Ray cannot be asked: {event['message']}",
            "STOPPED": "by somebody who told Ray to; mark the task itself as failed to end it for good",
            "TIMEOUT": f"stopped after job_timeout_seconds = {self.job_timeout_seconds:g}"
            if self.job_timeout_seconds
            else "",
        }.get(status, f"exit code {code}: {event['message'][-500:]}")
        raise AirflowException(f"{name} {status}, {why}; the next try goes on where it stopped")

    def on_kill(self) -> None:
        """Stop the job when the task is ended while its worker waits; a trigger does it by itself."""
        if self.job_at_work:
            with self.client() as client:
                client.post(f"{self.job_at_work}/stop")

    def client(self) -> httpx.Client:
        """An HTTP client for Ray's Jobs API."""
        return httpx.Client(**settings(BaseHook.get_connection(self.conn_id)))

    def find_or_submit(self, client: httpx.Client, name: str, context: Context) -> str:
        """The submission id of a job that is under way or was started here."""
        number = 1
        while True:
            submission_id = f"{name}-{number}"
            known = found_in(client.get(submission_id))
            if known is None:
                response = client.post("", json=self.request(submission_id, context))
                if response.is_success:
                    self.log.info("submitted %s: %s", submission_id, self.entrypoint)
                    return submission_id
                # Another submission of the same id came between (HTTP 500): the job is there now. Or Ray is in trouble.
                known = found_in(client.get(submission_id))
                if known is None:
                    raise AirflowException(f"Ray did not take {submission_id}: HTTP {response.status_code} {response.text[-500:]}")  # fmt: skip
            if known["status"] not in FINAL or succeeded_in(known, turn(context)):
                self.log.info("%s is %s already: waiting for it", submission_id, known["status"])
                return submission_id
            number += 1

    def request(self, submission_id: str, context: Context) -> dict[str, Any]:
        """The body that submits the job."""
        task, run = context["ti"], context["dag_run"]
        about = {"dag_id": task.dag_id, "task_id": task.task_id, "dag_run_id": run.run_id, TURN: turn(context)}
        runtime_env = self.runtime_env or {}
        body = {
            "submission_id": submission_id,
            "entrypoint": self.entrypoint,
            "runtime_env": {**runtime_env, "env_vars": {**JOB_ENVIRONMENT, **(runtime_env.get("env_vars") or {})}},
            "metadata": {**about, **(self.metadata or {})},
            "entrypoint_num_cpus": self.entrypoint_num_cpus,
            "entrypoint_num_gpus": self.entrypoint_num_gpus,
        }
        return {key: value for key, value in body.items() if value is not None}


async def first_event(trigger: RayJobTrigger) -> dict[str, Any]:
    """Wait here for what the triggerer would wait for."""
    async for event in trigger.run():
        return dict(event.payload)
    raise AirflowException(f"{trigger} ended without an event")


def turn(context: Context) -> str:
    """The same for every try of a task, another one when the task or its DAG run is cleared."""
    run = context["dag_run"]
    return f"{run.clear_number or 0} {run.start_date}"


def succeeded_in(known: dict[str, Any], this_turn: str) -> bool:
    """Whether a job did this turn's work, and only its success was lost on the way.

    Airflow 3.3 retries a task whose worker dies at the wrong moment, and now and then one that was deferred for a few seconds only: it
    takes the worker's word that the task is deferred by now for its end.
    """
    return known["status"] == "SUCCEEDED" and (known.get("metadata") or {}).get(TURN) == this_turn


def derived_id(context: Context) -> str:
    """`<dag>.<task>.<logical date>`, the same for every try of a task. A manual run has no logical date, but a time it runs after."""
    task, run = context["ti"], context["dag_run"]
    when = run.logical_date or run.run_after
    stamp = f"{when:%Y%m%dT%H%M%S}" + (f"{when:.%f}" if when.microsecond else "")
    mapped = [str(task.map_index)] if task.map_index is not None and task.map_index >= 0 else []
    return re.sub(r"[^\w.-]", "-", ".".join([task.dag_id, task.task_id, stamp, *mapped]), flags=re.ASCII)
