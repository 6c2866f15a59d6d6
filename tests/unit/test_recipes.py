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
import pyarrow.parquet as pq
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


@pytest.fixture
def numbered(tmp_path: Path) -> dict[str, Subset]:
    """Sets without a text that is in two of them."""
    sets = {}
    for number, (name, count) in enumerate((("train", 50), ("valid", 1000), ("test", 1000))):
        data = make_set(tmp_path / f"{name}.arrow", [LABELS[row % 3] for row in range(count)])
        data.hashes = np.arange(count, dtype=np.uint64) + np.uint64(10_000 * number)
        sets[name] = Subset(data, np.arange(count))
    return sets


def repeat(sets: dict[str, Subset], count: int, source: str, target: str) -> None:
    """Give the last rows of one set the texts of the first rows of another."""
    sets[target].data.hashes[-count:] = sets[source].data.hashes[:count]


def what_duplicates_do(what: str) -> TrainConfig:
    """A configuration with `data.duplicates`."""
    values = {"train": {"path": "t"}, "model": {"base": "b"}, "output": {"path": "o"}, "data": {"duplicates": what}}
    return validate(TrainConfig, values)


@pytest.mark.parametrize("known", [1, 2])
@pytest.mark.parametrize(
    ("source", "target", "what"), [("train", "valid", "training"), ("valid", "test", "validation")]
)
def test_duplicates_are_refused_above_one_row_of_a_thousand(
    source: str,
    target: str,
    what: str,
    known: int,
    numbered: dict[str, Subset],
    capsys: pytest.CaptureFixture[str],
) -> None:
    repeat(numbered, known, source, target)
    shown = rf"{known} of 1,000 {target} rows have the text of a {what} row"
    if known > 1:
        with pytest.raises(UsageError, match=rf"{shown}, expected at most 0\.1%.*to leave them out of {what}"):
            check_duplicates(numbered, what_duplicates_do("refuse"), 0)
        return
    nothing = {"train": {"valid": 0, "test": 0}, "valid": {"test": 0}}
    counted = nothing | {source: nothing[source] | {target: known}}
    assert check_duplicates(numbered, what_duplicates_do("refuse"), 0) == (numbered, counted)
    assert f"WARNING: {shown}, " in capsys.readouterr().err


def test_duplicates_are_left_out_of_the_set_that_teaches(
    numbered: dict[str, Subset], capsys: pytest.CaptureFixture[str]
) -> None:
    """A text that is in all three stays in the last one."""
    repeat(numbered, 3, "train", "valid")
    repeat(numbered, 2, "train", "test")
    numbered["valid"].data.hashes[0] = numbered["test"].data.hashes[0]
    left, known = check_duplicates(numbered, what_duplicates_do("drop"), 0)
    assert known == {"train": {"valid": 3, "test": 2}, "valid": {"test": 3}}
    np.testing.assert_array_equal(left["train"].chosen, np.arange(3, 50))
    np.testing.assert_array_equal(left["valid"].chosen, [*range(1, 997), 999])
    assert left["test"] is numbered["test"]
    said = capsys.readouterr().err
    assert "a training row: 3 training rows are left out" in said
    assert "a validation row: 3 validation rows are left out" in said
    assert "WARNING" not in said


def test_rows_that_teach_twice_are_left_out_twice(numbered: dict[str, Subset]) -> None:
    """With `valid.fraction = 0` the training rows are the validation rows."""
    sets = numbered | {"valid": numbered["train"]}
    repeat(sets, 2, "train", "test")
    left, known = check_duplicates(sets, what_duplicates_do("drop"), 0)
    assert known == {"train": {"test": 2}, "valid": {"test": 2}}
    assert left["valid"] is left["train"]
    assert len(left["train"]) == 48


def test_leaving_out_every_row_is_refused(numbered: dict[str, Subset]) -> None:
    repeat(numbered, 50, "train", "test")
    with pytest.raises(UsageError, match=r"50 of 1,000 test rows .* no training row is left without them"):
        check_duplicates(numbered, what_duplicates_do("drop"), 0)


@pytest.mark.parametrize(
    ("schema", "sections", "message"),
    [
        (TrainConfig, {"head": {"dropout": 0.1}}, "head.dropout is set, but the head is the family's own"),
        (TrainConfig, {"head": {"activation": "relu", "pooling": "mean"}}, "activation .* has no hidden layer"),
        (TrainConfig, {"loss": {"focal_gamma": 3.0}}, "focal_gamma .* is of the focal loss"),
        (TrainConfig, {"stopping": {"keep": "last", "patience": 4}}, "patience .* nothing stops before the last step"),
        (PretrainConfig, {"stopping": {"keep": "last", "patience": 4}}, "patience .* nothing stops before the last"),
        (TrainConfig, {"optim": {"rdrop": 1.0}, "model": {"dropout": 0.0}}, "both passes of a row are the same"),
    ],
)
def test_what_is_set_and_would_change_nothing_is_refused(
    schema: Any, sections: dict[str, Any], message: str, make_job: Any
) -> None:
    """Also where it is the default: who writes it down expects something of it."""
    with pytest.raises(UsageError, match=message):
        make_job(schema, **sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"truncation": "head_tail"}}, "head_tail with two text columns"),
        ({"model": {"window_stride": 4}}, "window_stride with two text columns"),
        ({"valid": {"fraction": 0}}, "give each task its valid or a valid.fraction"),
    ],
)
def test_what_no_task_can_have_is_refused(
    sections: dict[str, Any], message: str, rows: Path, tmp_path: Path, make_job: Any
) -> None:
    """One task has pairs, the other single texts."""
    table = pa.table({"text": ["a b"] * 4, "second": ["c d"] * 4, "label": ["bad", "good"] * 2})
    fakes.write_archive(str(tmp_path), {"pairs.parquet": table})
    pairs = {"path": f"{tmp_path}/pairs.parquet", "text_column": ["text", "second"]}
    with pytest.raises(UsageError, match=message):
        make_job(train={"path": None}, tasks={"one": {"path": f"{rows}/train.parquet"}, "two": pairs}, **sections)


def test_no_task_is_called_as_the_training_is(rows: Path, make_job: Any) -> None:
    tasks = {name: {"path": f"{rows}/train.parquet"} for name in ("train", "tone")}
    with pytest.raises(UsageError, match=r"^tasks.train: .*give the task another name"):
        make_job(train={"path": None}, tasks=tasks)


def test_a_mistake_that_is_found_before_anything_is_learned_leaves_the_name_free(make_job: Any, tmp_path: Path) -> None:
    """The one below is found when the rows have been tokenized. A run that was there before is not touched."""
    values: dict[str, Any] = {"class_weights": {"god": 2.0}}
    with pytest.raises(UsageError, match="'god' is none of the 3 labels, did you mean 'good'"):
        make_job(loss=values)
    assert not list((tmp_path / "checkpoint").rglob("*")), "neither its name nor its texts"
    job = make_job(loss={"class_weights": {"good": 2.0}})
    before = sorted(str(one) for one in (tmp_path / "checkpoint").rglob("*"))
    assert before
    with pytest.raises(UsageError, match="was started with another configuration"):
        train(validate(TrainConfig, job.config.model_dump(exclude_unset=True) | {"loss": values}), "night-1", CLUSTER)
    assert sorted(str(one) for one in (tmp_path / "checkpoint").rglob("*")) == before


@pytest.mark.parametrize("of_each", [5, 2, 1])
def test_a_few_rows_of_each_label_leave_some_to_validate(
    of_each: int, tmp_path: Path, make_job: Any, make_fit: Any
) -> None:
    """A tenth of five is no row."""
    labels = [label for label in LABELS for _ in range(of_each)]
    fakes.write_archive(
        str(tmp_path),
        {"few.parquet": pa.table({"text": [f"text {row}" for row in range(len(labels))], "label": labels})},
    )
    job = make_job(train={"path": f"{tmp_path}/few.parquet"})
    if of_each == 1:
        with pytest.raises(UsageError, match="of 3 rows none can be set aside, for no label has two"):
            make_fit(job)
        return
    sets = make_fit(job).sets
    assert len(sets["valid"]) == round(0.1 * len(labels))
    assert len(sets["train"]) + len(sets["valid"]) == len(labels)


def test_a_label_that_a_row_has_twice_is_one(rows: Path, tmp_path: Path, make_job: Any) -> None:
    table = pq.read_table(f"{rows}/train.parquet")
    twice = pa.array([[*row, *row] for row in table["several"].to_pylist()])
    fakes.write_archive(str(tmp_path), {"twice.parquet": table.set_column(2, "several", twice)})
    sets = {"path": f"{tmp_path}/twice.parquet", "label_column": "several"}
    assert make_job(train=sets, loss={"positive_weights": "balanced"}).objective.positive_weights == BALANCED_POSITIVE


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_card_says_what_chose_the_weights_and_how_good_the_decision_is(
    keep: str, tmp_path: Path, make_job: Any, make_fit: Any
) -> None:
    """Thresholds are part of the decision, for the validation rows as for the test rows."""
    optim, decision = {"epochs": 2, "learning_rate": 1e-3}, {"thresholds": 0.95}
    fit = make_fit(make_job(train={"label_column": "several"}, optim=optim, stopping={"keep": keep}, decision=decision))
    fit.run()
    conclude(fit)
    folder = tmp_path / "checkpoint"
    card, page = ((folder / name).read_text() for name in ("README.md", "report.html"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["valid"]["macro_f1"] != metrics["best"]["macro_f1"]
    row = next(line for line in card.splitlines() if line.startswith("| validation"))
    assert f"{metrics['valid']['macro_f1']:.4f}" in row
    assert ("which chose the weights" in row) == (keep == "best")
    assert ("Chosen by macro f1 on the validation rows" in page) == (keep == "best")
    assert ("The weights of the last step: by the validation rows none were chosen" in page) == (keep == "last")


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
