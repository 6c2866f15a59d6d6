"""Which weights learn, in every family: frozen layers, one layer more each epoch, adapters that are merged at the end."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lib.batching import IntArray
from lib.config import validate
from lib.errors import UsageError
from lib.learning import Learner, Team, rate_factor, read_batch
from lib.loss import Objective
from lib.mapped import LabelledSet
from lib.model import logits_of, new_classifier
from lib.schema import Task
from lib.train_config import HeadSection, OptimSection, TrainConfig
from lib.training import check_validation
from lib.tuning import (
    ADAPTER,
    add_adapters,
    check_tuning,
    compile_passes,
    depth_of,
    freeze,
    merge_adapters,
    recompute_layers,
)
from tests import fakes
from tests.labelled import LABELS, make_set

OBJECTIVE = Objective(task=Task.MULTI_CLASS)
ALONE = Team(rank=0, size=1, device=torch.device("cpu"), dtype=torch.float32)
STEPS_AN_EPOCH = 2


def losses_of(model: torch.nn.Module, rows: LabelledSet, batch: IntArray) -> torch.Tensor:
    return OBJECTIVE.losses(read_batch(model, logits_of, rows, batch, ALONE), torch.from_numpy(rows.targets[batch]))


@pytest.fixture
def rows(tmp_path: Path) -> LabelledSet:
    return make_set(tmp_path / "set.arrow", [LABELS[row % 3] for row in range(16)])


@pytest.fixture(params=fakes.FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    fakes.make_encoder(tmp_path / request.param, request.param)
    return new_classifier(str(tmp_path / request.param), LABELS, Task.MULTI_CLASS, 0.1, 7)


@pytest.fixture
def bert(tmp_path: Path) -> Any:
    fakes.make_encoder(tmp_path / "bert", "bert")
    return new_classifier(str(tmp_path / "bert"), LABELS, Task.MULTI_CLASS, 0.1, 7)


def configure(**sections: dict[str, Any]) -> TrainConfig:
    values: dict[str, dict[str, Any]] = {
        "train": {"path": "x"},
        "model": {"base": "x"},
        "output": {"path": "x"},
        "optim": {"learning_rate": 1e-2},
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    return validate(TrainConfig, values)


def learn(model: Any, rows: LabelledSet, config: TrainConfig, epochs: int = 1) -> list[set[str]]:
    """Train, and say which parameters each epoch changed."""
    total = epochs * STEPS_AN_EPOCH
    learner = Learner(model, config.optim, OBJECTIVE, ALONE, total)
    changed = []
    for epoch in range(epochs):
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        learner.begin_epoch(epoch)
        for place in range(STEPS_AN_EPOCH):
            learner.step(epoch * STEPS_AN_EPOCH + place, rows, np.arange(16))
        changed.append({name for name, one in model.named_parameters() if not torch.equal(one, before[name])})
    return changed


def layers_of(model: Any) -> int:
    return max(depth_of(name, model) for name, _ in model.named_parameters()) - 1


def at_most(model: Any, depth: int) -> set[str]:
    return {name for name, _ in model.named_parameters() if depth_of(name, model) <= depth}


@pytest.mark.parametrize("frozen", [0, 1, "all"])
def test_what_is_frozen_stays_and_all_else_learns(model: Any, rows: LabelledSet, frozen: Any) -> None:
    config = configure(model={"freeze_layers": frozen})
    freeze(model, config)
    deepest = 0 if frozen == "all" else layers_of(model) - frozen
    assert learn(model, rows, config) == [at_most(model, deepest)]
    assert model.base_model.training == (deepest > 0), "an encoder of which nothing learns has no dropout"


def test_one_layer_more_learns_each_epoch(model: Any, rows: LabelledSet) -> None:
    changed = learn(model, rows, configure(optim={"unfreeze_layers": 1, "learning_rate": 1e-2}), epochs=4)
    expected = [at_most(model, epoch) for epoch in range(4)]
    assert expected[-1] == {name for name, _ in model.named_parameters()}
    assert changed == expected


def test_frozen_layers_are_not_unfrozen(bert: Any, rows: LabelledSet) -> None:
    config = configure(model={"freeze_layers": 1}, optim={"unfreeze_layers": 1})
    freeze(bert, config)
    assert learn(bert, rows, config, epochs=3)[-1] == at_most(bert, 1)


def test_adapters_learn_beside_the_encoder_and_are_merged_into_it(model: Any, rows: LabelledSet) -> None:
    config = configure(lora={"rank": 4, "dropout": 0.1})
    plain = [name for name, _ in model.named_parameters()]
    add_adapters(model, config.lora)
    names = [name for name, _ in model.named_parameters()]
    adapters = {name for name in names if ADAPTER in name}
    in_layers = {depth_of(name, model) for name in adapters}
    assert in_layers == set(range(1, layers_of(model) + 1)), "every layer has adapters"
    assert learn(model, rows, config) == [adapters | at_most(model, 0)]
    ids, mask, _ = rows.gather(np.arange(16))
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
    with torch.no_grad():
        before = model.eval()(**inputs).logits
        merge_adapters(model)
        after = model(**inputs).logits
    assert [name for name, _ in model.named_parameters()] == plain
    assert torch.allclose(before, after, atol=2e-6)


def test_the_layers_that_get_adapters_can_be_named(bert: Any) -> None:
    add_adapters(bert, configure(lora={"rank": 2, "alpha": 2, "target_modules": ["dense"]}).lora)
    adapted = {name.partition(ADAPTER)[0].rpartition(".")[2] for name, _ in bert.named_parameters() if ADAPTER in name}
    assert adapted == {"dense"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"alpha": 8}}, "lora.alpha is set, but there are no adapters; set lora.rank"),
        ({"lora": {"rank": 8}, "model": {"freeze_layers": 1}}, "model.freeze_layers and lora.rank: with adapters"),
        ({"lora": {"rank": 8}, "stopping": {"average": 2}}, "stopping.average and lora.rank: the mean of two adapters"),
        ({"lora": {"rank": 8}, "optim": {"unfreeze_layers": 1}}, "optim.unfreeze_layers and lora.rank"),
        ({"model": {"freeze_layers": "all"}, "optim": {"unfreeze_layers": 1}}, "there is no layer to unfreeze"),
        (
            {"model": {"freeze_layers": "all"}, "optim": {"layer_decay": 0.9}},
            "no layer learns whose rate it could lower",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_tuning(configure(**sections))


def test_a_share_for_validation_beside_rows_of_its_own_is_said_to_be_of_no_use(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = {}
    for fraction in (0.05, 0.1):
        check_validation(configure(valid={"path": "x", "fraction": fraction}))
        said[fraction] = capsys.readouterr().out
    assert said == {0.05: "valid.fraction = 0.05 is not used: valid.path names the rows\n", 0.1: ""}


def test_layers_that_are_not_there_are_named(bert: Any) -> None:
    with pytest.raises(
        UsageError, match=r'freeze_layers = 3, but 2 layers of model.base are read; give at most that, or "all"'
    ):
        freeze(bert, configure(model={"freeze_layers": 3}))
    with pytest.raises(UsageError, match=r"layer_decay with model.freeze_layers = 2, all that there are"):
        freeze(bert, configure(model={"freeze_layers": 2}, optim={"layer_decay": 0.9}))
    with pytest.raises(
        UsageError, match=r"q_proj names no linear layer of a bert encoder; choose from dense, key, query, value"
    ):
        add_adapters(bert, configure(lora={"rank": 2, "target_modules": ["q_proj"]}).lora)
    bert.config.model_type = "new"
    with pytest.raises(UsageError, match=r"it has to be given for a new encoder; choose from dense, key, query, value"):
        add_adapters(bert, configure(lora={"rank": 2}).lora)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules_are_those_of_transformers(schedule: str) -> None:
    """Ours is at a rate above zero in the first step, theirs in the second."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = {} if schedule == "constant" else {"num_training_steps": 40}
    make: Any = getattr(transformers, f"get_{schedule}_schedule_with_warmup")
    theirs = make(optimizer, num_warmup_steps=10, **options)
    for step in range(10, 40):
        ours = rate_factor(step, 40, 0.25, OptimSection(schedule=schedule).schedule)
        assert ours == pytest.approx(theirs.lr_lambdas[0](step)), step
    assert [rate_factor(step, 40, 0.25, schedule) for step in range(10)] == pytest.approx(
        [theirs.lr_lambdas[0](step + 1) for step in range(10)]
    )


@pytest.mark.parametrize("head", [HeadSection(), HeadSection(pooling="mean")], ids=["family", "own"])
@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_layers_computed_again_give_the_same_gradients_from_less_memory(
    family: str, head: HeadSection, tmp_path: Path, rows: LabelledSet
) -> None:
    """With dropout; what autograd keeps is counted where it is kept."""
    fakes.make_encoder(tmp_path, family)

    def learn(again: bool) -> tuple[list[torch.Tensor], int]:
        model = new_classifier(str(tmp_path), LABELS, Task.MULTI_CLASS, 0.2, 0, head=head)
        if again:
            recompute_layers(model)
        model.train()
        torch.manual_seed(0)
        kept = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        batch = np.arange(16)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = losses_of(model, rows, batch).sum()
        kept_by_forward = kept
        loss.backward()
        return [one.grad for one in model.parameters() if one.grad is not None], kept_by_forward

    plain, memory = learn(False)
    if family in ("albert", "mpnet"):
        with pytest.raises(UsageError, match=f"transformers has none for {family} encoders; raise optim.accumulation"):
            learn(True)
        return
    again, less = learn(True)
    assert less < memory / 2
    assert len(again) == len(plain)
    for left, right in zip(plain, again, strict=True):
        assert torch.equal(left, right)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++, which torch.compile needs")
@pytest.mark.parametrize(
    ("head", "lora"),
    [({}, {}), ({"pooling": "max", "hidden_sizes": [8], "dropout": 0.0}, {}), ({}, {"rank": 2})],
    ids=["the family's head", "a head of its own", "adapters"],
)
def test_compiled_passes_give_the_same_gradients_for_rows_of_any_length(
    head: dict[str, Any], lora: dict[str, Any], rows: LabelledSet, tmp_path: Path
) -> None:
    fakes.make_encoder(tmp_path / "bert", "bert")
    config = configure(head=head, lora=lora)

    def learn(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = new_classifier(str(tmp_path / "bert"), LABELS, Task.MULTI_CLASS, 0.0, 0, head=config.head).train()
        add_adapters(model, config.lora)
        if compiled:
            compile_passes(model)
        for batch in (np.arange(3), np.arange(3, 8), np.arange(8, 16)):
            losses_of(model, rows, batch).sum().backward()
        return [one.grad for one in model.parameters() if one.grad is not None]

    plain = learn(False)
    torch._dynamo.utils.counters.clear()
    found = learn(True)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "compiled, and not again for each length"
    for left, right in zip(found, plain, strict=True):
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-6)


def test_compiling_without_a_compiler_is_refused(bert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"no C\+\+ compiler 'no-such-compiler' on this node"):
        compile_passes(bert)
