"""What `jobs.plan` says of what was found out: no credentials, and of what is not known the reason."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from jobs import plan
from lib.estimate import Estimate
from lib.outcome import Outcome
from lib.runtime import Cluster, Node, plan_layout
from lib.score_config import ScoreResources
from lib.scoring import Run
from lib.storage import Store
from lib.survey import Survey, Tally
from tests.stand_in import add, prepared

HERE = Cluster((Node(4, 0),))
LAYOUT = plan_layout(HERE, ScoreResources())

NOTHING = Survey(
    tally=Tally(),
    outcome=Outcome(),
    tokens=Estimate(value=0.0, low=0.0, high=0.0),
    sampled_rows=0,
    sampled_errors=0,
    block_guesses=np.zeros(0),
    sample=None,
    sampling_seconds=0.0,
)


def planned(folder: Path, model: str) -> Run:
    add(folder, "a.parquet", "one", "two")
    return prepared(folder, model, "x")


def test_a_plan_shows_no_credentials(tmp_path: Path, classifier: str) -> None:
    run, secret = planned(tmp_path, classifier), "s3://key:hidden@host/folder"
    model = run.config.model.model_copy(update={"path": secret})
    run = replace(
        run,
        config=run.config.model_copy(update={"model": model}),
        output=Store(secret),
        job=replace(run.job, archive=Store(secret)),
    )
    found = replace(NOTHING, outcome=Outcome(bad_shards={"a": f"{secret}/a: storage failed to read it"}))
    record = plan.describe(run, found, HERE, LAYOUT, None, None)
    assert {record[name] for name in ("input", "output", "model")} == {"s3://***@host/folder"}
    assert "hidden" not in "".join([*map(str, record.values()), *plan.lines(record)])
