"""What a person is told when a run's name is taken, and when training workers end for good."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from torch.cuda import OutOfMemoryError as GpuOutOfMemoryError

from lib.committing import deciding
from lib.config import validate
from lib.errors import DeniedError, IncompleteError, UsageError
from lib.failures import RetryPolicy, StartWatch
from lib.pretrain_config import PretrainConfig
from lib.states import STATES_NAME, forget_unreadable_states
from lib.storage import open_store
from lib.train_config import TrainConfig
from lib.workers import claim, claimed, explain
from tests.conftest import REPOSITORY

JOB: Any = SimpleNamespace(
    max_length=64,
    config=SimpleNamespace(
        optim=SimpleNamespace(batch_size=32), resources=SimpleNamespace(num_workers=4, min_workers=2)
    ),
)


def raised_by_a_worker(error: Exception) -> WorkerGroupError:
    return WorkerGroupError("a worker raised", {0: error})


@pytest.mark.parametrize("death", [ActorDiedError(), OutOfMemoryError("no memory")])
def test_workers_that_die_too_often_leave_a_run_that_can_go_on(death: Exception) -> None:
    """As Ray Train 2.60 raises it after its last restart: the death is wrapped, and is no cause of what wraps it."""
    error = WorkerGroupError("a worker died", {0: WorkerHealthCheckFailedError("A worker health check failed.", death)})
    with pytest.raises(IncompleteError, match=r"workers died more than 3 times: .*run the same command again"):
        explain(error, JOB)


def test_a_bug_stays_a_bug() -> None:
    explain(raised_by_a_worker(ZeroDivisionError("division by zero")), JOB)


def test_a_gpu_that_is_too_small_is_a_matter_of_the_configuration() -> None:
    with pytest.raises(
        UsageError,
        match=r"out of GPU memory with 32 rows a step on 2 to 4 workers .*max_length = 64; raise optim.accum",
    ):
        explain(raised_by_a_worker(GpuOutOfMemoryError("CUDA out of memory")), JOB)


def test_pairs_that_are_too_many_for_a_gpu_are_not_said_to_be_accumulated() -> None:
    """Contrastive tuning refuses [optim]."""
    values: dict[str, Any] = {"train": {"path": "t"}, "model": {"base": "b"}, "output": {"path": "o"}}
    config = validate(TrainConfig, values | {"contrastive": {"iterations": 5}})
    with pytest.raises(UsageError, match=r"max_length = 64; lower contrastive.batch_size or model.max_length, under"):
        explain(
            raised_by_a_worker(GpuOutOfMemoryError("no memory")),
            cast(Any, SimpleNamespace(max_length=64, config=config)),
        )


def test_what_a_worker_says_to_the_user_is_said() -> None:
    """Also where it is the cause of something else."""
    wrapped = RuntimeError("the worker group ended")
    wrapped.__cause__ = UsageError("valid.path: 64 of 64 rows are known")
    for error in (wrapped, wrapped.__cause__):
        with pytest.raises(UsageError, match=r"^valid.path: 64 of 64 rows are known$"):
            explain(raised_by_a_worker(error), JOB)


def test_storage_that_lets_nobody_in_any_more_leaves_a_run_that_can_go_on() -> None:
    denied = DeniedError("s3://bucket/out: not allowed to write it (ExpiredToken)")
    with pytest.raises(IncompleteError, match=r"ExpiredToken\); it was allowed when the run started"):
        explain(raised_by_a_worker(denied), JOB)


@pytest.mark.parametrize(
    ("error", "decision"),
    [
        (UsageError("valid.path: 64 of 64 rows are known"), FailureDecision.RAISE),
        (DeniedError("s3://bucket/out: not allowed to write it (SlowDown)"), FailureDecision.RETRY),
        (IncompleteError("s3://bucket/out: storage failed"), FailureDecision.RETRY),
        (ZeroDivisionError("division by zero"), FailureDecision.RETRY),
        (WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError()), FailureDecision.RETRY),
    ],
)
def test_what_would_be_as_wrong_again_is_not_tried_again(error: Exception, decision: FailureDecision) -> None:
    assert RetryPolicy(FailureConfig(max_failures=3)).make_decision(raised_by_a_worker(error)) is decision


@pytest.mark.parametrize("death", [ActorDiedError(), WorkerGroupStartupFailedError("a worker failed to initialize")])
def test_workers_that_die_while_they_start_count_as_those_that_die_later(death: Exception) -> None:
    """Ray 2.60 would end the run at once for the first, and try again for ever for the second."""
    policy, error = RetryPolicy(FailureConfig(max_failures=3)), ControllerError(death)
    found = [policy.make_decision(one) for one in (error, error, raised_by_a_worker(death), error)]
    assert found == [*[FailureDecision.RETRY] * 3, FailureDecision.RAISE]
    with pytest.raises(IncompleteError, match=r"workers died more than 3 times: .*run the same command again"):
        explain(pickle.loads(pickle.dumps(error)), JOB)


@pytest.mark.parametrize("has_work", [False, True])
def test_only_workers_that_were_being_started_are_given_back(has_work: bool) -> None:
    """Those that have their work the controller ends itself, and may do so once alone."""
    ended: list[str] = []
    group, watch = SimpleNamespace(shutdown=lambda: ended.append("group")), StartWatch()
    watch.after_worker_group_start(group)
    if has_work:
        watch.after_worker_group_training_start(group)
    policy = RetryPolicy(FailureConfig(max_failures=3))
    for _ in range(2):
        policy.make_decision(ControllerError(ActorDiedError()))
    assert ended == ([] if has_work else ["group"])


def test_what_is_wrong_with_the_controller_is_not_taken_for_a_worker_that_died() -> None:
    error = ControllerError(ZeroDivisionError("division by zero"))
    assert RetryPolicy(FailureConfig(max_failures=3)).make_decision(error) is FailureDecision.RAISE
    explain(error, JOB)


def test_ray_train_decides_on_it_without_torch() -> None:
    script = "import sys, lib.failures; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=REPOSITORY, text=True)
    assert done.stdout == "False False\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, None),
        (json.dumps({"ray_version": ray.__version__}).encode(), None),
        (json.dumps({"ray_version": "2.9.0"}).encode(), f"is of Ray 2.9.0, this is {ray.__version__}"),
        (json.dumps({"ray_version": ray.__version__, "results": [1, 2]}).encode()[:-9], "was cut off"),
        (b"", "was cut off"),
    ],
    ids=["none", "whole", "other Ray", "cut off", "empty"],
)
def test_a_list_of_states_that_cannot_be_read_is_forgotten(
    content: bytes | None, said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = open_store(str(tmp_path))
    if content is not None:
        folder.replace(STATES_NAME, content)
    forget_unreadable_states(folder)
    found = capsys.readouterr().err
    assert folder.read(STATES_NAME) == (content if said is None else None)
    assert said is None or (f"{said}" in found and "training begins anew" in found)
    assert bool(found) == (said is not None)


def configured(schema: type[Any] = TrainConfig, /, **sections: dict[str, Any]) -> Any:
    """A configuration that nothing but its run's name is asked of."""
    paths = {"train": {"path": "a"}, "model": {"base": "b"}, "output": {"path": "c"}}
    if schema is TrainConfig:
        paths["valid"] = {"path": "d"}
    return validate(schema, paths | sections)


@pytest.mark.parametrize("is_new", [True, False])
def test_a_mistake_gives_back_the_name_of_a_new_run_alone(is_new: bool, tmp_path: Path) -> None:
    """What an unfinished run has learned is still worth something."""
    folder, mine = open_store(str(tmp_path)), configured()
    if not is_new:
        claim(folder, mine, "night-1")
    with pytest.raises(UsageError, match="a mistake"), claimed(folder, mine, "night-1"):
        raise UsageError("a mistake")
    assert (folder.info("run.json") is None) == is_new


def test_a_name_is_claimed_by_one_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever sections and keys the two have: a training and a further pre-training lie in the same folder."""
    folder = open_store(str(tmp_path))
    claim(folder, configured(optim={"epochs": 4}), "night-1")
    claim(folder, configured(optim={"epochs": 4, "seed": 0}, resources={"num_workers": 2}), "night-1")
    assert capsys.readouterr().out == "going on with run night-1\n"
    for other, said in (
        (configured(optim={"epochs": 3}), "optim.epochs = 3, it was 4"),
        (configured(optim={"epochs": 4, "rdrop": 1.0}), "optim.rdrop = 1.0, it was 0.0"),
        (configured(PretrainConfig, optim={"epochs": 4}), "valid.path = None, it was 'd'"),
        (configured(PretrainConfig, optim={"epochs": 4}), "train.label_column is not set, it was 'label'"),
        (configured(PretrainConfig, optim={"epochs": 4}), "; and "),
    ):
        with pytest.raises(UsageError, match=rf"with another configuration \(.*{re.escape(said)}.*\);"):
            claim(folder, other, "night-1")


@pytest.mark.parametrize(
    "section, key, chosen", [("optim", "rdrop", 1.0), ("stopping", "keep", "last"), ("head", "pooling", "mean")]
)
def test_an_upgrade_that_brings_a_key_leaves_a_run_that_began_before_it_as_it_is(
    section: str, key: str, chosen: Any, tmp_path: Path
) -> None:
    """Its record lacks the key. Only who sets it has another configuration."""
    folder, theirs = open_store(str(tmp_path)), deciding(configured())
    for older in (
        {**theirs, section: {name: one for name, one in theirs[section].items() if name != key}},
        {**theirs, section: {}},
    ):
        folder.replace("run.json", json.dumps(older).encode())
        claim(folder, configured(), "night-1")
        with pytest.raises(UsageError, match=rf"{section}\.{key} = .*, it was not set"):
            claim(folder, configured(**{section: {key: chosen}}), "night-1")
