"""Each key of a recipe reaches what it is for: the job that `train` makes, and one worker's fit of it, in this process without Ray."""

import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from sklearn.utils.class_weight import compute_class_weight

from lib.classifying import ClassifierFit, ClassifierJob, check_duplicates, new_model
from lib.committing import deciding
from lib.config import read_file, validate
from lib.errors import UsageError
from lib.finetuning import conclude
from lib.fitting import Job, join_team
from lib.loss import Objective
from lib.mapped import Subset
from lib.masked_fitting import PretrainFit
from lib.pretrain_config import PretrainConfig
from lib.pretraining import pretrain
from lib.runtime import Cluster, Node
from lib.schema import Task
from lib.train_config import TrainConfig
from lib.training import train
from lib.trial import alone
from tests import fakes
from tests.conftest import REPOSITORY
from tests.labelled import LABELS, make_rows, make_set

CLUSTER = Cluster((Node(cpus=1, gpus=0),))
ROWS, OTHER_ROWS = 64, 24

COUNTS = np.array([make_rows(ROWS, 1)[1].count(label) for label in LABELS])
BALANCED = tuple(compute_class_weight("balanced", classes=np.array(LABELS), y=np.array(make_rows(ROWS, 1)[1])).tolist())
GIVEN = np.array([ROWS - COUNTS[0], *COUNTS[1:]])
"""rows of `several` that have each label"""
BALANCED_POSITIVE = tuple(((ROWS - GIVEN) / GIVEN).tolist())


class AloneFit(ClassifierFit):
    """An attempt that has no Ray to save with, and begins anew."""

    def save(self) -> None:
        """Nothing."""

    def resume(self) -> None:
        """Nothing."""


class AlonePretrainFit(PretrainFit):
    """The same of a masked-language model."""

    def resume(self) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labelled sets: `label` has one of three, `several` none or two of them; `weight` counts rows."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count, seed in (("train", ROWS, 1), ("other", OTHER_ROWS, 2)):
        texts, labels = make_rows(count, seed)
        several = [[label, LABELS[0]] if label != LABELS[0] else [] for label in labels]
        weights = [0.5 + index % 3 for index in range(count)]
        table = pa.table({"text": texts, "label": labels, "several": several, "weight": weights})
        fakes.write_archive(str(folder), {f"{name}.parquet": table})
    return folder


@pytest.fixture
def make_job(rows: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Checks and tokenizes as a job does, up to where it starts workers."""
    for module in ("labelled", "corpus"):
        monkeypatch.setattr(f"lib.{module}.tokenize_all", lambda items, tokenize_block: [*map(tokenize_block, items)])
    for module in ("training", "pretraining"):
        monkeypatch.setattr(f"lib.{module}.run_to_commit", lambda work, job, use_gpu: {"job": job})

    def make(schema: Any = TrainConfig, **sections: dict[str, Any]) -> Any:
        values: dict[str, dict[str, Any]] = {
            "train": {"path": f"{rows}/train.parquet"},
            "model": {"base": base, "precision": "fp32"},
            "output": {"path": f"{tmp_path}/checkpoint"},
        }
        for name, section in sections.items():
            values.setdefault(name, {}).update(section)
        shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
        run = train if schema is TrainConfig else pretrain
        return run(validate(schema, values), "night-1", CLUSTER)["job"]

    return make


@pytest.fixture
def make_fit() -> Iterator[Any]:
    """One worker's fit of a job, before its first step."""
    yield lambda job, fit=AloneFit: fit(job, alone(job, use_gpu=False))
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("frozen", "stay"),
    [(None, ()), (1, ("bert.embeddings.", "bert.encoder.layer.0.")), ("all", ("bert.embeddings.", "bert.encoder."))],
)
def test_layers_are_frozen(frozen: Any, stay: tuple[str, ...], make_job: Any) -> None:
    model: Any = new_model(make_job(model={"freeze_layers": frozen}))
    for name, one in model.named_parameters():
        assert one.requires_grad != name.startswith(stay), name


@pytest.mark.parametrize(
    ("column", "loss", "optim", "expected"),
    [
        ("label", {"kind": "focal", "focal_gamma": 3.0}, {}, {"gamma": 3.0}),
        ("label", {"label_smoothing": 0.2}, {"rdrop": 1.5}, {"smoothing": 0.2, "rdrop": 1.5}),
        ("label", {"class_weights": {"fair": 5.0}}, {}, {"class_weights": (1.0, 5.0, 1.0)}),
        ("several", {"positive_weights": {"good": 4.0}}, {}, {"positive_weights": (1.0, 1.0, 4.0)}),
        ("label", {"class_weights": "balanced"}, {}, {"class_weights": BALANCED}),
        ("several", {"positive_weights": "balanced"}, {}, {"positive_weights": BALANCED_POSITIVE}),
    ],
    ids=["focal", "smoothing", "class", "positive", "balanced", "balanced positive"],
)
def test_the_loss_is_what_training_makes_small(
    column: str,
    loss: dict[str, Any],
    optim: dict[str, Any],
    expected: dict[str, Any],
    rows: Path,
    make_job: Any,
    make_fit: Any,
) -> None:
    sets = {"train": {"label_column": column}, "valid": {"path": f"{rows}/other.parquet"}}
    job = make_job(**sets, loss=loss, optim=optim)
    task = Task.MULTI_CLASS if column == "label" else Task.MULTI_LABEL
    assert job.tasks[0].objective == Objective(task=task, **expected)
    assert make_fit(job).learner.objective == Objective(task=task, **expected)


def test_rows_count_as_their_column_says(make_job: Any, make_fit: Any) -> None:
    assert make_fit(make_job()).sets["train"].data.weights is None
    found = make_fit(make_job(train={"weight_column": "weight"})).sets["train"].data.weights
    assert found.tolist() == [0.5 + index % 3 for index in range(ROWS)]


@pytest.mark.parametrize("wanted", [False, True])
def test_layers_are_computed_again_and_passes_are_compiled(
    wanted: bool, make_job: Any, make_fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.tuning.shutil.which", lambda compiler: compiler)  # nothing is compiled before a first pass
    model = make_fit(make_job(model={"gradient_checkpointing": wanted, "compile": wanted})).learner.model
    assert model.base_model.is_gradient_checkpointing == wanted
    assert (model._compiled_call_impl is not None) == wanted
    job = make_job(PretrainConfig, model={"gradient_checkpointing": wanted})
    assert make_fit(job, AlonePretrainFit).learner.model.base_model.is_gradient_checkpointing == wanted


@pytest.mark.parametrize(
    ("precision", "has_bf16", "expected"),
    [
        ("fp32", True, torch.float32),
        ("bf16", False, torch.bfloat16),
        ("fp16", True, torch.float16),
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
    ],
)
def test_passes_are_made_in_the_precision_that_was_asked_for(
    precision: Any, has_bf16: bool, expected: torch.dtype, make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job: ClassifierJob = make_job(model={"precision": precision})
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: has_bf16)
    worker = {f"get_{name}": lambda: 0 for name in ("world_rank", "local_rank")}
    worker |= {f"get_{name}": lambda: 1 for name in ("world_size", "local_world_size")}
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(**worker))
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    try:
        assert alone(job, use_gpu=False).dtype is expected
        assert join_team(job).dtype is expected
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("temperature", "small"), [(1.0, OTHER_ROWS), (4.0, 38)])
def test_small_sets_are_seen_oftener(temperature: float, small: int, rows: Path, make_job: Any, make_fit: Any) -> None:
    """24 rows beside 64: by their fourth roots 0.44 of the epoch's 88."""
    tasks = {
        "tone": {"path": f"{rows}/train.parquet", "valid": f"{rows}/other.parquet"},
        "few": {"path": f"{rows}/other.parquet", "valid": f"{rows}/other.parquet"},
    }
    fit = make_fit(make_job(train={"path": None}, tasks=tasks, sampling={"temperature": temperature}))
    seen = np.concatenate(fit.batches_of(0))
    assert len(seen) == ROWS + OTHER_ROWS
    assert abs(np.count_nonzero(seen >= ROWS) - small) <= 1


def test_training_rows_are_changed_at_each_step(make_job: Any, make_fit: Any) -> None:
    assert make_fit(make_job()).learner.seen_at is None
    fit = make_fit(make_job(augment={"drop": 0.5}))
    data, every = fit.sets["train"].data, np.arange(ROWS)
    assert fit.learner.seen_at(data, 0).read(every)[1].sum() < 0.9 * data.read(every)[1].sum()


@pytest.mark.parametrize("known", [1, 2])
def test_duplicates_are_refused_above_one_row_of_a_thousand(
    known: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the test rows three more are known from the validation rows: they are said, and count for nothing else."""
    sets = {}
    for number, (name, count) in enumerate((("train", 50), ("valid", 1000), ("test", 1000))):
        data = make_set(tmp_path / f"{name}.arrow", [LABELS[row % 3] for row in range(count)])
        data.hashes = np.arange(count, dtype=np.uint64) + np.uint64(10_000 * number)
        sets[name] = Subset(data, np.arange(count))
    sets["valid"].data.hashes[:known] = sets["train"].hashes[:known]
    sets["test"].data.hashes[-3:] = sets["valid"].hashes[-3:]
    values = {"train": {"path": "t"}, "model": {"base": "b"}, "output": {"path": "o"}, "data": {"duplicates": "refuse"}}
    config = validate(TrainConfig, values)
    if known > 1:
        with pytest.raises(
            UsageError, match=r"2 of 1,000 valid rows have the text of a training row, expected at most 0\.1%"
        ):
            check_duplicates(sets, config, 0)
        return
    assert check_duplicates(sets, config, 0) == (sets, {"valid": 1, "test": 0})
    assert "3 of 1,000 test rows have the text of a validation row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("schema", "sections", "message"),
    [
        (TrainConfig, {"head": {"dropout": 0.1}}, "head.dropout is set, but the head is the family's own"),
        (TrainConfig, {"head": {"activation": "relu", "pooling": "mean"}}, "activation .* has no hidden layer"),
        (TrainConfig, {"loss": {"focal_gamma": 3.0}}, "focal_gamma .* is of the focal loss"),
        (TrainConfig, {"stopping": {"keep": "last", "patience": 4}}, "patience .* nothing stops before the last step"),
        (PretrainConfig, {"stopping": {"keep": "last", "patience": 4}}, "patience .* nothing stops before the last"),
    ],
)
def test_what_is_set_and_would_change_nothing_is_refused(
    schema: Any, sections: dict[str, Any], message: str, make_job: Any
) -> None:
    """Also where it is the default: who writes it down expects something of it."""
    with pytest.raises(UsageError, match=message):
        make_job(schema, **sections)


def test_few_labels_are_learned_from_all_rows_and_the_last_weights_kept(
    rows: Path, tmp_path: Path, make_job: Any, make_fit: Any
) -> None:
    """The configuration as it stands in the repository, up to the committed checkpoint."""
    values = read_file(str(REPOSITORY / "jobs" / "configs" / "train_few_labels.toml"))
    job: Job = make_job(**values | {"test": {"path": f"{rows}/other.parquet"}})
    fit = make_fit(job)
    fit.run()
    conclude(fit)
    metrics = json.loads((tmp_path / "checkpoint" / "metrics.json").read_text())
    assert metrics["rows"] == {"train": ROWS, "valid": ROWS, "test": OTHER_ROWS}
    assert metrics["known_from_training"] == metrics["known_from_validation"] == {"test": 0}
    assert [entry["step"] for entry in metrics["history"]] == [*range(4, 81, 4)]
    assert metrics["best"]["step"] == 80
    losses = [entry["loss"] for entry in metrics["history"]]
    assert losses[-1] < losses[0]
    assert "none were set aside" in (tmp_path / "checkpoint" / "README.md").read_text()
    page = (tmp_path / "checkpoint" / "report.html").read_text()
    shown = re.search(r"<h2>Configuration</h2><pre>(.*?)</pre>", page, re.DOTALL)
    assert shown and json.loads(html.unescape(shown[1])) == deciding(job.config)
