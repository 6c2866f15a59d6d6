"""Which failures of training workers are worth another try; read by Ray Train's controller, which need not import torch for it."""

from typing import Any

from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from lib.errors import DeniedError, UsageError

_starting: list[Any] = []
"""In a controller's process: its worker group, from when there are workers until they have their work."""


class StartWatch(WorkerGroupCallback):
    """Keeps hold of workers that are being started.

    Ray 2.60: if one dies then, the controller forgets the group, and the others keep their place until the job ends; a new group
    has no room beside it, and is waited for without end.
    """

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Workers are there."""
        _starting[:] = [worker_group]

    def after_worker_group_training_start(self, _group: Any) -> None:
        """Workers have their work; from here on the controller knows the group."""
        _starting.clear()


class RetryPolicy(DefaultFailurePolicy):
    """As Ray has it, but for two things.

    A wrong configuration or wrong data is not tried again: it would be as wrong, and takes the workers' start. A worker that dies while
    it is started counts as any other; Ray 2.60 tries again for ever, or not at all if it was about to get its work.
    """

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Whether the workers are started again."""
        causes = causes_of(training_failed_error)
        if any(isinstance(cause, UsageError) and not isinstance(cause, DeniedError) for cause in causes):
            return FailureDecision.RAISE
        if isinstance(training_failed_error, ControllerError) and isinstance(
            training_failed_error.controller_failure, RayActorError | WorkerGroupStartupFailedError
        ):
            while _starting:
                _starting.pop().shutdown()
            training_failed_error = WorkerGroupError(
                str(training_failed_error), {0: training_failed_error.controller_failure}
            )
        return super().make_decision(training_failed_error)


def causes_of(error: BaseException) -> list[BaseException]:
    """What the workers of a training died of, and what that came of."""
    if isinstance(error, ControllerError):
        return chain_of(error.controller_failure)
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else []
    return [cause for failure in failures for cause in chain_of(failure)]


def chain_of(error: BaseException | None) -> list[BaseException]:
    """An exception and its causes; what a worker died of, Ray Train 2.60 keeps as `health_check_failure` alone."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = getattr(error, "cause", None) or getattr(error, "health_check_failure", None) or error.__cause__
    return chain
