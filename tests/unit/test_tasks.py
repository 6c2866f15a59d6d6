"""Several tasks on one encoder: which rows an epoch sees, and that each row's loss is that of its own head."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.batching import sample_rows, share_of
from lib.classifying import check_tasks_apart
from lib.config import parse_command, validate
from lib.errors import UsageError
from lib.learning import Team, accumulate
from lib.loss import Objective, SeveralObjectives, rdrop_losses
from lib.mapped import LabelledSet, Subset
from lib.model import logits_of, new_classifier
from lib.schema import Task
from lib.train_config import TrainConfig
from tests import fakes

ALONE = Team(rank=0, size=1, device=torch.device("cpu"), dtype=torch.float32)
TONES, TOPICS = ("bad", "fair", "good"), ("sea", "shop", "sport", "state")
PLACES = (slice(0, 3), slice(3, 7), slice(7, 8))
REQUIRED: dict[str, Any] = {"model": {"base": "b"}, "output": {"path": "o"}}


# which rows


@given(st.lists(st.integers(1, 300), min_size=2, max_size=5), st.floats(1, 10), st.integers(0, 9))
def test_an_epoch_sees_each_set_by_its_share_and_its_rows_alike(
    sizes: list[int], temperature: float, epoch: int
) -> None:
    rows = sample_rows(sizes, temperature, 0, epoch)
    assert len(rows) == sum(sizes)
    assert np.array_equal(rows, sample_rows(sizes, temperature, 0, epoch))
    counts = np.bincount(rows, minlength=sum(sizes))
    shares = np.array(sizes) ** (1 / temperature)
    start = 0
    for size, share in zip(sizes, shares / shares.sum(), strict=True):
        mine = counts[start : start + size]
        assert abs(mine.sum() - share * sum(sizes)) <= 1
        assert mine.max() - mine.min() <= 1
        start += size


def test_without_a_temperature_each_row_is_seen_once_and_with_one_epochs_differ() -> None:
    assert np.array_equal(sample_rows([3, 5], 1.0, 0, 4), np.arange(8))
    first, second = (sample_rows([10, 1000], 4.0, 0, epoch) for epoch in (0, 1))
    assert np.count_nonzero(first < 10) == np.count_nonzero(second < 10) > 100
    assert not np.array_equal(first, second)


# what another task learns from


class Hashed(LabelledSet):
    """Rows of which only the texts matter."""

    def __init__(self, hashes: list[int]) -> None:
        self.hashes = np.array(hashes, np.uint64)


def rows_with(*hashes: int) -> Subset:
    return Subset(Hashed(list(hashes)), np.arange(len(hashes)))


def configured(duplicates: str) -> TrainConfig:
    return validate(TrainConfig, REQUIRED | {"train": {"path": "t"}, "data": {"duplicates": duplicates}})


def tasks_that_share_texts() -> dict[str, dict[str, Subset]]:
    return {
        "tone": {"train": rows_with(1, 2, 3), "valid": rows_with(4), "test": rows_with(5, 6, 6)},
        "topic": {"train": rows_with(6, 7, 4, 8), "valid": rows_with(9)},
        "stars": {"train": rows_with(20), "valid": rows_with(21), "test": rows_with(9, 22)},
    }


def test_what_one_task_learns_from_and_another_is_tested_on_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    several = tasks_that_share_texts()
    found, known = check_tasks_apart(several, configured("keep"), 0)
    assert [len(sets["train"]) for sets in found.values()] == [3, 4, 1]
    assert known["tone"] == {"topic": {"valid": 1, "test": 2}, "stars": {"valid": 0, "test": 0}}
    assert known["topic"] == {"tone": {"valid": 0}, "stars": {"valid": 0}}, (
        "valid and test of two tasks may share texts"
    )
    said = capsys.readouterr().err
    assert (
        "1 of 1 tasks.tone.valid rows, 2 of 3 tasks.tone.test rows have the text of a tasks.topic training row" in said
    )
    assert said.count("WARNING") == 1


def test_such_rows_are_left_out_of_what_is_learned_or_refused() -> None:
    several = tasks_that_share_texts()
    found, _ = check_tasks_apart(several, configured("drop"), 0)
    assert found["topic"]["train"].hashes.tolist() == [7, 8]
    assert all(found[name] == several[name] for name in ("tone", "stars"))
    with pytest.raises(
        UsageError, match=r"tasks\.tone\.test rows have the text of a tasks\.topic training row, expected at most 0\.1%"
    ):
        check_tasks_apart(several, configured("refuse"), 0)


def test_one_task_has_no_other() -> None:
    sets = {"": {"train": rows_with(1), "valid": rows_with(1), "test": rows_with(1)}}
    assert check_tasks_apart(sets, configured("refuse"), 0) == (sets, {"": {}})


# each row's own loss


def write_set(
    path: Path,
    labels: pa.Array,
    names: tuple[str, ...],
    task: Task,
    seed: int,
    pairs: bool = False,
    weights: bool = False,
) -> LabelledSet:
    chance = np.random.default_rng(seed)
    lists = [chance.integers(5, 200, int(chance.integers(2, 40))).tolist() for _ in labels]
    columns = {"ids": pa.array(lists, pa.list_(pa.uint16())), "label": labels}
    if weights:
        columns["weight"] = pa.array(chance.uniform(0, 2, len(labels)), pa.float32())
    if pairs:
        columns["type_ids"] = pa.array([[0, *[1] * (len(ids) - 1)] for ids in lists], pa.list_(pa.uint8()))
    table = pa.table(columns)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    return LabelledSet([str(path)], names, task, 0, 64)


@pytest.fixture
def sets(tmp_path: Path) -> list[LabelledSet]:
    """One label a row, with weights; several labels; a number of pairs."""
    chance = np.random.default_rng(1)
    several = [[topic for topic in TOPICS if chance.random() < 0.4] for _ in range(11)]
    return [
        write_set(
            tmp_path / "tone.arrow",
            pa.array([TONES[row % 3] for row in range(13)]),
            TONES,
            Task.MULTI_CLASS,
            1,
            weights=True,
        ),
        write_set(tmp_path / "topic.arrow", pa.array(several, pa.list_(pa.string())), TOPICS, Task.MULTI_LABEL, 2),
        write_set(
            tmp_path / "stars.arrow",
            pa.array(chance.normal(size=9), pa.float32()),
            ("stars",),
            Task.REGRESSION,
            3,
            pairs=True,
        ),
    ]


def objectives(rdrop: float = 0.0) -> SeveralObjectives:
    return SeveralObjectives(
        parts=(
            Objective(task=Task.MULTI_CLASS, class_weights=(1.0, 3.0, 0.5), smoothing=0.1, rdrop=rdrop),
            Objective(task=Task.MULTI_LABEL, positive_weights=(1.0, 2.0, 1.0, 4.0), rdrop=rdrop),
            Objective(task=Task.REGRESSION, rdrop=rdrop),
        ),
        places=PLACES,
    )


def test_mixed_rows_are_those_of_their_sets(sets: list[LabelledSet]) -> None:
    mixed = LabelledSet.mix(sets)
    assert len(mixed) == 33
    rows = np.array([32, 0, 14, 12, 24, 23])
    ids, mask, type_ids = mixed.gather(rows)
    assert type_ids is not None
    for place, row in enumerate(rows.tolist()):
        number = int(np.searchsorted([13, 24], row, side="right"))
        own = row - [0, 13, 24][number]
        one_ids, one_mask, one_types = sets[number].gather(np.array([own]))
        assert np.array_equal(ids[place][mask[place]], one_ids[one_mask])
        assert type_ids[place].any() == (one_types is not None)
        assert mixed.targets[row, 0] == number
        taught = np.atleast_1d(sets[number].targets[own])
        assert np.allclose(mixed.targets[row, 1 : 1 + len(taught)], taught)
    assert mixed.weights is not None and sets[0].weights is not None
    assert np.allclose(mixed.weights, [*sets[0].weights, *[1] * 20])


def plain_loss(model: torch.nn.Module, sets: list[LabelledSet]) -> torch.Tensor:
    """The oracle: each task's rows alone through the model, its own columns of the answer, torch's losses, the mean by weight."""
    sums, weights = [], []
    for number, (data, place) in enumerate(zip(sets, PLACES, strict=True)):
        for row in range(len(data)):
            ids, mask, types = data.gather(np.array([row]))
            segments = None if types is None else torch.from_numpy(types)
            logits = logits_of(model, torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)), segments)[
                :, place
            ]
            target = torch.from_numpy(np.atleast_1d(data.targets[row]))
            if number == 0:
                loss = torch.nn.functional.cross_entropy(logits, target.long(), label_smoothing=0.1)
            elif number == 1:
                heavier = torch.tensor([1.0, 2.0, 1.0, 4.0])
                loss = torch.nn.functional.binary_cross_entropy_with_logits(
                    logits, target[None].float(), pos_weight=heavier
                )
            else:
                loss = torch.nn.functional.mse_loss(logits[0], target)
            weight = 1.0
            if number == 0:
                assert data.weights is not None
                weight = float(data.weights[row]) * (1.0, 3.0, 0.5)[int(data.targets[row])]
            sums.append(loss * weight)
            weights.append(weight)
    return torch.stack(sums).sum() / sum(weights)


@pytest.mark.parametrize("passes", [1, 4])
def test_a_step_over_mixed_rows_has_the_gradient_of_each_task_by_itself(
    passes: int, sets: list[LabelledSet], tmp_path: Path
) -> None:
    fakes.make_encoder(tmp_path / "bert", "bert")

    def fresh() -> torch.nn.Module:
        labels = tuple(str(number) for number in range(8))
        return new_classifier(str(tmp_path / "bert"), labels, Task.SEVERAL, 0.0, 7).train()

    model, mixed = fresh(), LabelledSet.mix(sets)
    batch = np.random.default_rng(0).permutation(33)
    found = accumulate(model, mixed, share_of(batch, 0, 1, passes), batch, objectives(), ALONE)
    other = fresh()
    expected = plain_loss(other, sets)
    expected.backward()
    assert float(found) == pytest.approx(expected.item(), abs=1e-5)
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None, name
        assert float((mine.grad - theirs.grad).abs().max()) < 1e-5, name


def test_r_drop_pulls_each_task_together_by_itself() -> None:
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 8, generator=chance)
    targets = torch.tensor([[0, 2, 0, 0, 0], [1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.float32)
    several = SeveralObjectives(parts=objectives(rdrop=0.7).parts[:2], places=PLACES[:2])
    found = several.losses(logits, targets)
    for number, rows in enumerate(([0, 2], [1, 3])):
        part, both = several.parts[number], [*rows, *(row + 4 for row in rows)]
        own = logits[both][:, PLACES[number]]
        taught = targets[rows, 1].long() if number == 0 else targets[rows, 1:]
        losses = part.plain_losses(own, torch.cat([taught, taught]))
        assert torch.allclose(found[rows], rdrop_losses(own, losses, part.task, 0.7))


# configuration


def mistakes(values: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as found:
        validate(TrainConfig, REQUIRED | values)
    return str(found.value)


def test_tasks_are_given_by_name_in_a_file_or_on_the_command_line() -> None:
    argv = ["--set", "model.base=b", "--set", "output.path=o", "--set", "tasks.tone.path=/tone"]
    argv += ["--set", 'tasks.stars={path = "/stars", regression = true}', "--set", "tasks.tone.label_column=mood"]
    config = parse_command(TrainConfig, argv, prog="jobs.train", description="").config
    tone, stars = config.tasks.named.values()
    assert (tone.path, tone.label_column, stars.path, stars.regression) == ("/tone", "mood", "/stars", True)
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_what_does_not_go_with_tasks_is_refused() -> None:
    two = {"a": {"path": "p"}, "b": {"path": "q"}}
    assert mistakes({}).startswith("train.path is required: give it as --set train.path=")
    assert "there is one, 'a'; give two or more" in mistakes({"tasks": {"a": {"path": "p"}}})
    assert "unknown key 'tasks.b.pth', did you mean 'path'?" in mistakes(
        {"tasks": {**two, "b": {"pth": "q", "path": "q"}}}
    )
    assert "tasks.b.path is required" in mistakes({"tasks": {**two, "b": {}}})
    assert "train.path with tasks (a, b)" in mistakes({"tasks": two, "train": {"path": "x"}})
    assert "test.path with tasks (a, b)" in mistakes({"tasks": two, "test": {"path": "x"}})
    assert "tasks.b-c" in mistakes({"tasks": {**two, "b-c": {"path": "q"}}})
    assert "sampling.temperature is set, but there are no tasks" in mistakes(
        {"train": {"path": "x"}, "sampling": {"temperature": 2}}
    )
