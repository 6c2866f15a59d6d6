"""Which failures of training workers are worth another try; read by Ray Train's controller, which need not import torch for it."""

from typing import Any

from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2.api.exceptions import WorkerGroupError

from lib.errors import DeniedError, UsageError


class RetryPolicy(DefaultFailurePolicy):
    """As Ray has it, but a wrong configuration or wrong data is not tried again: it would be as wrong, and takes the workers' start."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Whether the workers are started again."""
        if any(
            isinstance(cause, UsageError) and not isinstance(cause, DeniedError)
            for cause in causes_of(training_failed_error)
        ):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


def causes_of(error: BaseException) -> list[BaseException]:
    """What the workers of a training died of, and what that came of."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else []
    return [cause for failure in failures for cause in chain_of(failure)]


def chain_of(error: BaseException | None) -> list[BaseException]:
    """An exception and its causes; what a worker died of, Ray Train 2.60 keeps as `health_check_failure` alone."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = getattr(error, "cause", None) or getattr(error, "health_check_failure", None) or error.__cause__
    return chain
