"""The training loss against torch's own, scikit-learn's class weights and the papers' formulas; exact for any number of workers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from lib.batching import share_of
from lib.errors import UsageError
from lib.learning import Team, accumulate
from lib.loss import Objective, make_objective
from lib.model import new_classifier
from lib.schema import Task
from lib.train_config import LossSection
from tests import fakes
from tests.labelled import LABELS, make_set

ROWS = 32
CPU = torch.device("cpu")


def test_a_number_is_learned_by_its_squared_error() -> None:
    chance = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(9, 1, generator=chance), torch.randn(9, generator=chance)
    found = make_objective(LossSection(), 0.0, Task.REGRESSION, ("stars",), {}, 9).losses(logits, targets)
    assert torch.equal(found, nn.MSELoss(reduction="none")(logits[:, 0], targets))
    for section, rdrop, name in (
        (LossSection(kind="focal"), 0.0, r"loss\.kind"),
        (LossSection(label_smoothing=0.1), 0.0, r"loss\.label_smoothing"),
        (LossSection(), 1.0, r"optim\.rdrop"),
    ):
        with pytest.raises(UsageError, match=f"{name}: it is for classes, and train.regression learns a number"):
            make_objective(section, rdrop, Task.REGRESSION, ("stars",), {}, 9)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    fakes.make_encoder(folder, "bert")
    return str(folder)


OBJECTIVES = {
    "weighted": Objective(task=Task.MULTI_CLASS, class_weights=(0.2, 1.0, 5.0)),
    "weighted focal": Objective(task=Task.MULTI_CLASS, class_weights=(0.2, 1.0, 5.0), gamma=2.0),
    "positive": Objective(task=Task.MULTI_LABEL, positive_weights=(3.0, 1.0, 0.5)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_the_weighted_mean_for_any_division_of_a_step(
    name: str, encoder: str, tmp_path: Path
) -> None:
    """1 x 32, 2 x 16, 4 accumulated 8s, 2 workers of 2 x 8, and 7 workers: one gradient, plain torch's on the whole batch."""
    objective = OBJECTIVES[name]
    chance = np.random.default_rng(1)
    single = [LABELS[index] for index in chance.integers(0, 3, ROWS)]
    several = [[label for label in LABELS if chance.random() < 0.4] for _ in range(ROWS)]
    labels = several if objective.task is Task.MULTI_LABEL else single
    weights = np.where(np.arange(ROWS) % 5, chance.random(ROWS) * 2, 0).astype(np.float32)
    data = make_set(tmp_path / "set.arrow", labels, objective.task, weights)
    rows = chance.permutation(ROWS)

    def gradient(workers: int, accumulation: int) -> list[torch.Tensor]:
        model = new_classifier(encoder, LABELS, objective.task, 0.0, 7).double()
        for rank in range(workers):
            team = Team(rank=rank, size=workers, device=CPU, dtype=torch.float64)
            accumulate(model, data, share_of(rows, rank, workers, accumulation), rows, objective, team)
        return [one.grad / workers for one in model.parameters() if one.grad is not None]

    model = new_classifier(encoder, LABELS, objective.task, 0.0, 7).double()
    ids, mask, _ = data.gather(rows)
    logits = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits
    targets = torch.from_numpy(data.targets[rows])
    by_row = torch.from_numpy(weights[rows]).double()
    if objective.task is Task.MULTI_LABEL:
        positive = torch.tensor(objective.positive_weights)
        losses = nn.BCEWithLogitsLoss(pos_weight=positive, reduction="none")(logits.float(), targets.float()).mean(1)
    else:
        classes = torch.tensor(objective.class_weights)
        losses = nn.CrossEntropyLoss(reduction="none")(logits.float(), targets)
        losses = losses * (1 - (-losses).exp()) ** objective.gamma
        by_row = by_row * classes[targets]
    ((losses * by_row).sum() / by_row.sum()).backward()
    expected = [one.grad for one in model.parameters() if one.grad is not None]
    largest = max(float(one.abs().max()) for one in expected)
    for workers, accumulation in ((1, 1), (2, 1), (1, 4), (2, 2), (7, 1)):
        found = gradient(workers, accumulation)
        worst = max(float((left - right).abs().max()) for left, right in zip(found, expected, strict=True))
        assert worst <= 1e-5 * largest, (workers, accumulation)


def test_weighted_by_class_is_torchs_own_weighted_mean() -> None:
    logits, targets = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    objective = Objective(task=Task.MULTI_CLASS, class_weights=(0.2, 1.0, 5.0))
    weights = torch.from_numpy(objective.row_weights(targets.numpy(), None))
    ours = (objective.losses(logits, targets) * weights).sum() / weights.sum()
    assert ours == pytest.approx(nn.CrossEntropyLoss(torch.tensor(objective.class_weights))(logits, targets).item())


def test_smoothing_and_focus_are_the_formulas() -> None:
    logits, targets = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    p = logits.double().softmax(-1).numpy()
    right = p[np.arange(40), targets]
    focal = Objective(task=Task.MULTI_CLASS, gamma=1.5).losses(logits, targets)
    assert focal.numpy() == pytest.approx(-((1 - right) ** 1.5) * np.log(right), rel=1e-4)
    smooth = Objective(task=Task.MULTI_CLASS, smoothing=0.1).losses(logits, targets)
    assert smooth.numpy() == pytest.approx(-0.9 * np.log(right) - 0.1 * np.log(p).mean(1), rel=1e-4)
    hot = (torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) < 0.5).to(torch.uint8)
    q = np.where(hot, logits.double().sigmoid(), 1 - logits.double().sigmoid())
    focal = Objective(task=Task.MULTI_LABEL, gamma=1.5).losses(logits, hot)
    assert focal.numpy() == pytest.approx((-((1 - q) ** 1.5) * np.log(q)).mean(1), rel=1e-4)
    smooth = Objective(task=Task.MULTI_LABEL, smoothing=0.1).losses(logits, hot)
    assert smooth.numpy() == pytest.approx((-0.95 * np.log(q) - 0.05 * np.log(1 - q)).mean(1), rel=1e-4)


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    rows = np.repeat([0, 1, 2], [10, 1, 89])
    counts = {label: int((rows == index).sum()) for index, label in enumerate(LABELS)}
    found = make_objective(LossSection(class_weights="balanced"), 0.0, Task.MULTI_CLASS, LABELS, counts, 100)
    assert found.class_weights == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=rows))
    assert found.row_weights(rows, None).mean() == pytest.approx(1)
    positive = LossSection(positive_weights="balanced")
    found = make_objective(positive, 0.0, Task.MULTI_LABEL, LABELS, counts, 100)
    assert found.positive_weights == pytest.approx([9, 99, 11 / 89])


def test_weights_are_given_by_label() -> None:
    section = LossSection(class_weights={"good": 4.0, "bad": 0.0})
    assert make_objective(section, 0.0, Task.MULTI_CLASS, LABELS, {}, 1).class_weights == (0.0, 1.0, 4.0)


@pytest.mark.parametrize(
    ("section", "task", "message"),
    [
        (LossSection(class_weights="balanced"), Task.MULTI_LABEL, "several labels; use loss.positive_weights"),
        (LossSection(positive_weights="balanced"), Task.MULTI_CLASS, "one label; use loss.class_weights"),
        (LossSection(focal_gamma=2.0), Task.MULTI_LABEL, 'it is of the focal loss; set loss.kind = "focal", or leave'),
        (LossSection(kind="focal", label_smoothing=0.1), Task.MULTI_CLASS, "each undoes the other"),
        (
            LossSection(class_weights={"god": 2.0}),
            Task.MULTI_CLASS,
            "'god' is none of the 3 labels, did you mean 'good'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(section: LossSection, task: Task, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_objective(section, 0.0, task, LABELS, {}, 1)
