"""Jobs that wait for a file, end with the codes of ours, and are looked at while everything around them is killed."""

from datetime import timedelta

import pendulum
from airflow.sdk import DAG
from ray_jobs import SubmitRayJobOperator

FOLDER = "{{ var.value.trial_folder }}"


def waits(name: str) -> str:
    """A command that notes that it was started, and ends when it may."""
    return f"echo started >> {FOLDER}/{name}.started; until test -e {FOLDER}/{name}.go; do sleep 0.5; done"


with DAG(
    "trial",
    schedule=None,
    default_args={"retries": 2, "retry_delay": timedelta(seconds=1)},
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
):
    every = {"poll_interval": 1}
    SubmitRayJobOperator(task_id="triggerer_killed", entrypoint=waits("triggerer_killed"), **every)
    SubmitRayJobOperator(task_id="worker_killed", entrypoint=waits("worker_killed"), deferrable=False, **every)
    SubmitRayJobOperator(task_id="ended_by_a_person", entrypoint=waits("ended_by_a_person"), **every)
    SubmitRayJobOperator(task_id="over_limit", entrypoint="exit 3", **every)
    SubmitRayJobOperator(task_id="incomplete", entrypoint=f"test -e {FOLDER}/tried || {{ touch {FOLDER}/tried; exit 4; }}", **every)  # fmt: skip
