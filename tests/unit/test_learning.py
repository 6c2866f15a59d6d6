"""One optimizer step against plain torch and plain transformers, without Ray."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from lib.batching import share_of
from lib.calibration import Decision
from lib.finetuning import find_errors
from lib.learning import Learner, Team, accumulate, features_of_rows, logits_of_rows, new_optimizer, together
from lib.loss import Objective, rdrop_losses
from lib.mapped import LabelledSet, Subset
from lib.metrics import describe, steps_to_keep
from lib.model import new_classifier
from lib.schema import Task
from lib.sharding import copy_weights, mean_of
from lib.train_config import OptimSection, StoppingSection
from lib.tuning import depth_of
from lib.windows import Windows
from tests import fakes
from tests.labelled import LABELS, Weights, difference, make_set


@pytest.fixture
def small_set(tmp_path: Path) -> LabelledSet:
    """23 rows in two record batches of a mapped file."""
    labels = np.random.default_rng(0).choice(LABELS, 23).tolist()
    return make_set(tmp_path / "set.arrow", labels, batch_rows=14)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


PLAIN = Objective(task=Task.MULTI_CLASS)

ALONE = Team(rank=0, size=1, device=torch.device("cpu"), dtype=torch.float32)


def plain_loss(model: Any, data: LabelledSet, rows: Sequence[int]) -> torch.Tensor:
    """Mean loss of some rows, each in a forward pass of its own."""
    losses = []
    for row in rows:
        ids, mask, _ = data.gather(np.array([row]))
        assert mask.all()
        target = torch.tensor([int(data.targets[row])])
        losses.append(model(input_ids=torch.from_numpy(ids), labels=target).loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("accumulation_steps", "rdrop"), [(1, 0.0), (2, 0.0), (5, 0.0), (30, 0.0), (2, 3.0)])
def test_the_gradient_is_that_of_the_mean_loss(
    base: str, small_set: LabelledSet, accumulation_steps: int, rdrop: float
) -> None:
    """Without dropout R-Drop's two passes are equal, and change nothing."""
    rows = np.random.default_rng(1).permutation(23)[:17]
    ours = new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7)
    shares = share_of(rows, 0, 1, accumulation_steps)
    loss = accumulate(ours, small_set, shares, rows, Objective(task=Task.MULTI_CLASS, rdrop=rdrop), ALONE)
    plain = new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7)
    expected = plain_loss(plain, small_set, rows.tolist())
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    for (name, left), right in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None, name
        assert torch.allclose(left.grad, right.grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("rdrop", [0.0, 2.0])
def test_windows_of_a_row_give_one_answer_and_one_gradient(
    base: str, tmp_path: Path, pooling: Literal["mean", "max"], rdrop: float
) -> None:
    """Against a plain loop over rows and their windows."""
    labels = np.random.default_rng(0).choice(LABELS, 23).tolist()
    data = make_set(tmp_path / "set.arrow", labels, max_length=12, windows=Windows(3, 8, pooling))
    whole = make_set(tmp_path / "whole.arrow", labels)
    rows = np.arange(23)[::-1]
    objective = Objective(task=Task.MULTI_CLASS, rdrop=rdrop)
    models = [new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7) for _ in range(2)]
    loss = accumulate(models[0], data, share_of(rows, 0, 1, 3), rows, objective, ALONE)
    losses, logits = [], []
    for row in rows:
        (ids,), _, _ = whole.gather(np.array([row]))
        plain: Any = models[1]
        windows = [
            plain(input_ids=torch.from_numpy(ids[start : start + 12])[None]).logits for start in range(0, len(ids), 12)
        ]
        together = torch.cat(windows)
        logits.append(together.mean(0) if pooling == "mean" else together.max(0).values)
        losses.append(functional.cross_entropy(logits[-1], torch.tensor(int(data.targets[row]))))
    expected = torch.stack(losses).mean()
    expected.backward()
    assert max(map(len, (whole.gather(np.array([row]))[0][0] for row in rows))) > 36, "some have several windows"
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    for (name, left), right in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert left.grad is not None and right.grad is not None, name
        assert torch.allclose(left.grad, right.grad, rtol=1e-4, atol=1e-6), name
    found = logits_of_rows(models[0], data, rows, ALONE)
    assert found == pytest.approx(torch.stack(logits).detach().numpy(), abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 30])
def test_any_number_of_workers_gives_the_same_confusion_matrix(base: str, small_set: LabelledSet, size: int) -> None:
    """Their shares one after the other in this process; of 30 workers some have no row of 23."""
    model = new_classifier(base, LABELS, Task.MULTI_CLASS, 0.5, 7)
    rows = Subset(small_set, np.random.default_rng(0).permutation(23))
    parts = [logits_of_rows(model, small_set, rows.chosen[rank::size], ALONE) for rank in range(size)]
    found = together(parts)
    assert found is not None and sum(map(len, parts)) == 23
    plain = [model(input_ids=torch.from_numpy(small_set.ids_of(row))[None]).logits[0] for row in rows.chosen.tolist()]
    expected = confusion_matrix(rows.targets, [int(one.argmax()) for one in plain], labels=[0, 1, 2])
    assert describe(rows.targets, found, Decision(task=Task.MULTI_CLASS), LABELS)["confusion"] == expected.tolist()
    assert found == pytest.approx(torch.stack(plain).detach().numpy(), abs=1e-5)


def test_errors_on_a_part_of_a_set_are_numbered_as_the_set_is(small_set: LabelledSet) -> None:
    rows = Subset(small_set, np.array([5, 9, 20]))
    wrong = np.eye(3, dtype=np.float32)[(rows.targets + 1) % 3] * np.array([[1.0], [3.0], [2.0]], np.float32)
    config = SimpleNamespace(output=SimpleNamespace(report_text=False))
    fit: Any = SimpleNamespace(
        job=SimpleNamespace(tasks=[SimpleNamespace(index=SimpleNamespace(labels=LABELS))], config=config),
        sets_of=[{"valid": rows}],
    )
    assert [one["row"] for one in find_errors(fit, 0, Decision(task=Task.MULTI_CLASS), "valid", wrong)] == [9, 20, 5]


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_features_are_the_mean_of_the_last_states_of_each_row_alone(
    family: str, small_set: LabelledSet, process_group: None, tmp_path: Path
) -> None:
    fakes.make_encoder(tmp_path / family, family)
    model: Any = new_classifier(str(tmp_path / family), LABELS, Task.MULTI_CLASS, 0.5, 7)
    rows = Subset(small_set, np.array([3, 20, 4]))
    found = features_of_rows(model, rows, ALONE)
    assert found is not None
    for row, feature in zip(rows.chosen, found, strict=True):
        ids = torch.from_numpy(small_set.ids_of(int(row)))[None]
        with torch.no_grad():
            expected = model.base_model(input_ids=ids).last_hidden_state[0].mean(0)
        assert feature == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.parametrize("task", [Task.MULTI_CLASS, Task.MULTI_LABEL])
def test_rdrop_is_the_formula_of_its_paper(task: Task) -> None:
    """By torch's own distributions; half of it, see `rdrop_losses`."""
    logits, losses = torch.randn(2 * 5, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10.0)
    distribution: Any = Categorical if task is Task.MULTI_CLASS else Bernoulli
    first, second = (distribution(logits=some) for some in logits.chunk(2))
    both = (kl_divergence(first, second) + kl_divergence(second, first)) / 2
    both = both if both.ndim == 1 else both.mean(dim=1)
    expected = (losses[:5] + losses[5:] + 0.7 * both) / 2
    assert torch.allclose(rdrop_losses(logits, losses, task, 0.7), expected, atol=1e-6)


def test_rdrop_weighs_what_dropout_makes_of_a_row(base: str, small_set: LabelledSet) -> None:
    model = new_classifier(base, LABELS, Task.MULTI_CLASS, 0.3, 7).train()
    found = []
    for weight in (1e-9, 4.0):
        torch.manual_seed(3)
        objective = Objective(task=Task.MULTI_CLASS, rdrop=weight)
        found.append(float(accumulate(model, small_set, [np.arange(23)], np.arange(23), objective, ALONE)))
    assert found[1] > found[0] + 1e-4


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_every_weight_of_every_family_learns(family: str, small_set: LabelledSet, tmp_path: Path) -> None:
    """Workers would wait for the gradient of a weight that takes no part."""
    fakes.make_encoder(tmp_path / family, family)
    model = new_classifier(str(tmp_path / family), LABELS, Task.MULTI_CLASS, None, 7)
    accumulate(model, small_set, [np.arange(4)], np.arange(4), PLAIN, ALONE)
    assert [name for name, one in model.named_parameters() if one.grad is None] == []


def test_steps_are_those_of_a_plain_torch_loop(base: str, small_set: LabelledSet) -> None:
    """AdamW, decay of matrices alone, clipping, warm-up and decay of the rate, written out plainly."""
    optim = OptimSection(learning_rate=1e-3, warmup_fraction=0.25, weight_decay=0.1, max_grad_norm=0.5)
    batches = [np.arange(0, 8), np.arange(8, 16), np.arange(16, 23), np.arange(0, 8)]
    learner = Learner(new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7), optim, PLAIN, ALONE, 4)
    plain = new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7).train()
    groups = [
        {"params": [one for one in plain.parameters() if one.ndim > 1], "weight_decay": 0.1},
        {"params": [one for one in plain.parameters() if one.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    for number, (rows, rate) in enumerate(zip(batches, (1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3), strict=True)):
        learner.step(number, small_set, rows)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        plain_loss(plain, small_set, rows.tolist()).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        assert norm > 0.5, "clipping must be at work"
        optimizer.step()
    ours = {name: one.detach() for name, one in learner.model.named_parameters()}
    assert difference(ours, {name: one.detach() for name, one in plain.named_parameters()}) < 1e-5


def logits_for(model: Any, data: LabelledSet, rows: Any) -> torch.Tensor:
    """What a plain model says of rows."""
    ids, mask, _ = data.gather(rows)
    found: torch.Tensor = model(
        input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64))
    ).logits
    return found


def test_steps_in_bf16_are_those_of_plain_autocast(base: str, small_set: LabelledSet, process_group: None) -> None:
    """Without loss scaling; the weights stay in fp32."""
    optim = OptimSection(learning_rate=1e-3, warmup_fraction=0.0, weight_decay=0.0, schedule="constant")
    brief = replace(ALONE, dtype=torch.bfloat16)
    learner = Learner(new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7), optim, PLAIN, brief, 3)
    plain: Any = new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for number in range(3):
        rows = np.arange(number, number + 8)
        learner.step(number, small_set, rows)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = logits_for(plain, small_set, rows)
        assert logits.dtype is torch.bfloat16
        functional.cross_entropy(logits.float(), torch.from_numpy(small_set.targets[rows])).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    assert all(one.dtype == torch.float32 for one in learner.model.parameters())
    assert difference(copy_weights(learner.model), copy_weights(plain)) < 1e-5
    means, _ = learner.means()
    assert "loss_scale" not in means


@pytest.mark.parametrize(("family", "apart"), [("bert", 1e-5), ("deberta-v2", 1e-4)])
def test_steps_in_fp16_are_those_of_torchs_recipe_with_loss_scaling(
    family: str, apart: float, small_set: LabelledSet, process_group: None, tmp_path: Path
) -> None:
    """Each backward pass of a scale that is too large is thrown away, and the scale halved, until the gradients are numbers.

    DeBERTa in fp16 gave no numbers in older versions of transformers (microsoft/DeBERTa#77, transformers#24116).
    """
    base = str(tmp_path / family)
    fakes.make_encoder(base, family)
    optim = OptimSection(learning_rate=1e-3, warmup_fraction=0.0, weight_decay=0.0, schedule="constant")
    half = replace(ALONE, dtype=torch.float16)
    learner = Learner(new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7), optim, PLAIN, half, 12)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    plain: Any = new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    scaler, scales = torch.amp.GradScaler("cpu", init_scale=2.0**24), []
    for number in range(12):
        rows = np.arange(number, number + 8)
        learner.step(number, small_set, rows)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            logits = logits_for(plain, small_set, rows)
            loss = functional.cross_entropy(logits, torch.from_numpy(small_set.targets[rows]))
        scaled: Any = scaler.scale(loss)
        scaled.backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert all(one.dtype == torch.float32 for one in learner.model.parameters())
    assert difference(copy_weights(learner.model), copy_weights(plain)) < apart
    skipped = len(set(scales) - {2.0**24})
    assert 1 <= skipped < 8, "some steps must have been skipped, and some made"
    means, bad = learner.means()
    assert bad is None and math.isfinite(means["grad_norm"])
    assert (means["loss_scale"], means["skipped_steps"]) == (scales[-1], skipped)


def test_each_layer_learns_at_its_own_rate(base: str) -> None:
    optim = OptimSection(learning_rate=1e-3, head_learning_rate=5e-3, layer_decay=0.5)
    model = new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7)
    assert model.config.num_hidden_layers == 2
    names = {id(one): name for name, one in model.named_parameters()}
    rates = {
        names[id(one)]: group["peak"] for group in new_optimizer(model, optim).param_groups for one in group["params"]
    }
    expected = {
        "bert.embeddings.": 1e-3 / 4,
        "bert.encoder.layer.0.": 1e-3 / 2,
        "bert.encoder.layer.1.": 1e-3,
        "bert.pooler.": 5e-3,
        "classifier.": 5e-3,
    }
    assert rates == {name: next(rate for start, rate in expected.items() if name.startswith(start)) for name in rates}
    assert rates.keys() == set(names.values())


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_every_family_has_a_depth_for_each_layer(family: str, tmp_path: Path) -> None:
    fakes.make_encoder(tmp_path / family, family)
    model = new_classifier(str(tmp_path / family), LABELS, Task.MULTI_CLASS, None, 7)
    depths = {name: depth_of(name, model) for name, _ in model.named_parameters()}
    layers = (
        1 if family == "albert" else model.config.num_hidden_layers
    )  # ALBERT's layers are one, used again and again
    assert set(depths.values()) == set(range(layers + 2))
    words = next(name for name, one in model.named_parameters() if one is model.get_input_embeddings().weight)
    assert depths[words] == layers + 1
    encoder = {id(one) for one in model.base_model.parameters()}
    assert {depths[name] for name, one in model.named_parameters() if id(one) not in encoder} == {0}


def test_the_average_of_the_weights_is_what_is_evaluated(
    base: str, small_set: LabelledSet, process_group: None
) -> None:
    """Its first value is the first step's; from then on a tenth of each step's weights comes in."""
    optim = OptimSection(learning_rate=1e-2, ema_decay=0.9)
    learner = Learner(new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7), optim, PLAIN, ALONE, 4)
    expected: Weights = {}
    for number in range(4):
        learner.step(number, small_set, np.arange(23))
        for name, one in learner.model.state_dict().items():
            expected[name] = one.clone() if number == 0 else 0.9 * expected[name] + 0.1 * one
    average = learner.candidate.state_dict()
    assert difference(average, expected) < 1e-6
    assert difference(average, learner.model.state_dict()) > 1e-3
    found = learner.evaluate(Subset(small_set, np.arange(23)))
    assert found is not None
    plain = plain_loss(learner.candidate.eval(), small_set, range(23)).item()
    losses = Decision(task=Task.MULTI_CLASS).losses(found, small_set.targets)
    assert losses.mean() == pytest.approx(plain, rel=1e-5)


def test_a_set_gives_its_rows_in_any_order(small_set: LabelledSet) -> None:
    rows = Subset(small_set, np.array([22, 0, 13, 14]))
    ids, mask, type_ids = small_set.gather(rows.chosen)
    assert type_ids is None
    assert mask.sum(axis=1).tolist() == rows.lengths.tolist()
    for place, row in enumerate(rows.chosen):
        alone, _, _ = small_set.gather(np.array([row]))
        assert ids[place][mask[place]].tolist() == alone[0].tolist()
        assert not ids[place][~mask[place]].any()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"metric": "loss"}, [30]),
        ({"metric": "loss", "average": 3}, [30, 20, 50]),
        ({"metric": "macro_f1", "average": 2}, [10, 40]),
        ({"metric": "macro_f1", "average": 9}, [10, 40, 30, 20]),
        ({"keep": "last", "average": 2}, [50, 40]),
    ],
)
def test_the_best_evaluations_are_kept_or_the_last(settings: dict[str, Any], expected: list[int]) -> None:
    """Of equally good ones the earlier; one that is no number never."""
    losses, scores = (5.0, 2.0, 1.0, 4.0, 2.0), (0.9, 0.1, 0.3, 0.9, math.nan)
    history = [
        {"step": 10 * number, "loss": loss, "macro_f1": score}
        for number, (loss, score) in enumerate(zip(losses, scores, strict=True), 1)
    ]
    section = StoppingSection(**settings)
    assert steps_to_keep(history, section, section.metric or "loss") == expected


def test_the_mean_of_weights_is_that_of_torch(base: str) -> None:
    models = [new_classifier(base, LABELS, Task.MULTI_CLASS, None, seed) for seed in range(3)]
    for number, one in enumerate(models):
        for parameter in one.parameters():
            parameter.data += number * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    expected = AveragedModel(models[0], use_buffers=True)
    for one in models:
        expected.update_parameters(one)
    found = mean_of([copy_weights(one) for one in models])
    assert difference(found, expected.module.state_dict()) < 1e-6
