"""Train every week, score every night, on a Ray cluster that is kept.

Nothing of the project is imported: the jobs are commands on the cluster. What they work on are Airflow variables, all without secrets:

    textsweep_archive    the archive, for example s3://bucket/archive
    textsweep_scores     where predictions go
    textsweep_model      the checkpoint that scores; set by the training below, by hand for the first night
    textsweep_labelled   a folder with train/ and test/ of labelled Parquet
    textsweep_base       the pretrained encoder's folder
    textsweep_models     checkpoints go to a folder of their run here
    textsweep_root       where the project is on the cluster's nodes; default /opt/textsweep, as in the images
    textsweep_score_options, textsweep_train_options, textsweep_compare_options
                         further arguments, for example --set resources.num_workers=4; default none. With --test-digest the
                         weekly comparison refuses a test set that has changed
"""

import json
from datetime import timedelta

import pendulum
from airflow.sdk import DAG, Asset, ObjectStoragePath, Variable, get_current_context, task
from airflow.sdk.exceptions import AirflowFailException
from ray_jobs import SubmitRayJobOperator

RUN_ID = "{{ (dag_run.logical_date or dag_run.run_after).strftime('%Y-%m-%dT%H%M%S') }}"
"""The same for every try and every clearing of one DAG run; a manual run has no logical date."""

RETRIES = {"retries": 3, "retry_delay": timedelta(minutes=2), "retry_exponential_backoff": 2.0}
"""A try that was cut short is finished by the next one, so trying again is cheap. Each pause is twice as long as the one before; True
would be a factor of 1."""

scores = Asset("textsweep_scores", uri="x-textsweep://scores")
"""Updated when there are predictions that readers may use, with the manifest in its extra."""


def read(path: str) -> dict:
    """A JSON document of a job, from wherever Airflow's object storage reaches."""
    return json.loads(ObjectStoragePath(path).read_text())


with DAG(
    "textsweep_nightly",
    description="Score what is new in the archive",
    schedule="0 1 * * *",
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    catchup=False,
    max_active_runs=1,  # the next night scores what this one left; both at once would pay for the same chunks
    default_args=RETRIES,
    tags=["textsweep"],
) as nightly:
    score = SubmitRayJobOperator(
        task_id="score",
        entrypoint="python -m jobs.score --config {{ var.value.get('textsweep_root', '/opt/textsweep') }}/jobs/configs/score.toml"
        " --set input.path='{{ var.value.textsweep_archive }}' --set model.path='{{ var.value.textsweep_model }}'"
        f" --set output.path='{{{{ var.value.textsweep_scores }}}}' --run-id {RUN_ID} {{{{ var.value.get('textsweep_score_options', '') }}}}",
        job_timeout_seconds=20 * 3600,
    )

    @task(outlets=[scores])
    def publish(run: str) -> dict:
        """Look at the reports of this night and of what readers see by now, and tell whoever waits for it.

        A night without anything new has no report, and shows the last one again.
        """
        root = Variable.get("textsweep_scores")
        pointer = read(f"{root}/_published.json")
        for name in dict.fromkeys([run, pointer["run"]]):
            path = f"{root}/{pointer['version']}/_runs/{name}/run.json"
            if name != pointer["run"] and not ObjectStoragePath(path).exists():
                continue
            report = read(path)
            if report["exit_code"] != 0:
                raise AirflowFailException(f"{root}: run {name} says of itself: {report['message']}")
        found = {"manifest": f"{root}/{pointer['manifest']}", "run": pointer["run"], **report["published_total"]}
        get_current_context()["outlet_events"][scores].extra = found
        return found

    score >> publish(RUN_ID)


with DAG(
    "textsweep_weekly",
    description="Fine-tune on the labelled rows, and score with the new model if it is no worse",
    schedule="0 12 * * 6",
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    catchup=False,
    max_active_runs=1,
    default_args=RETRIES,
    tags=["textsweep"],
) as weekly:
    checkpoint = f"{{{{ var.value.textsweep_models }}}}/{RUN_ID}"
    train = SubmitRayJobOperator(
        task_id="train",
        entrypoint="python -m jobs.train --set train.path='{{ var.value.textsweep_labelled }}/train'"
        " --set test.path='{{ var.value.textsweep_labelled }}/test' --set model.base='{{ var.value.textsweep_base }}'"
        f" --set output.path='{checkpoint}' --run-id {RUN_ID} {{{{ var.value.get('textsweep_train_options', '') }}}}",
        job_timeout_seconds=20 * 3600,
    )

    compare = SubmitRayJobOperator(
        task_id="compare",
        # Not accepted is exit code 3: the task fails without another try, and the nights go on with the model that they have.
        entrypoint="{% if var.value.get('textsweep_model', '') %}python -m jobs.compare --champion '{{ var.value.textsweep_model }}'"
        f" --challenger '{checkpoint}' --set test.path='{{{{ var.value.textsweep_labelled }}}}/test'"
        " {{ var.value.get('textsweep_compare_options', '') }}"
        "{% else %}echo 'no model is in use yet: nothing to compare with'{% endif %}",
        # Both models compute in the command itself, with so many threads: on a worker, away from the state of the cluster.
        entrypoint_num_cpus=2,
    )

    @task
    def promote(checkpoint: str) -> str:
        """Let the nights score with the new model: the next one scores the whole archive with it."""
        Variable.set("textsweep_model", checkpoint)
        return checkpoint

    train >> compare >> promote(checkpoint)
