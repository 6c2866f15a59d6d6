"""What a person is told when training workers end for good."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from lib.errors import IncompleteError
from lib.workers import explain

JOB: Any = SimpleNamespace()


@pytest.mark.parametrize("death", [ActorDiedError(), OutOfMemoryError("no memory")])
def test_workers_that_die_too_often_leave_a_run_that_can_go_on(death: Exception) -> None:
    """As Ray Train 2.60 raises it after its last restart: the death is wrapped, and is no cause of what wraps it."""
    error = WorkerGroupError("a worker died", {0: WorkerHealthCheckFailedError("A worker health check failed.", death)})
    with pytest.raises(IncompleteError, match=r"workers died more than 3 times: .*run the same command again"):
        explain(error, JOB)


def test_a_bug_stays_a_bug() -> None:
    explain(WorkerGroupError("a worker raised", {0: ZeroDivisionError("division by zero")}), JOB)
