"""The space of a search: what a range means, which points are tried, and what cannot be searched."""

from typing import Any

import numpy as np
import pytest

from lib.config import parse_command, validate
from lib.errors import UsageError
from lib.halving import percents_of
from lib.space import (
    Choice,
    Range,
    SearchConfig,
    SearchSection,
    configuration_at,
    draw,
    point_text,
    points_of,
    read_domain,
    read_space,
)
from lib.train_config import TrainConfig


def configure(space: dict[str, Any] | None = None, **sections: dict[str, Any]) -> SearchConfig:
    values: dict[str, dict[str, Any]] = {"train": {"path": "t"}, "model": {"base": "b"}, "output": {"path": "/o"}}
    values["search"] = {} if space is None else {"space": space}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return validate(SearchConfig, values)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([1e-5, 5e-4], Range(1e-5, 5e-4, log=True, whole=False)),
        ([0.1, 0.5], Range(0.1, 0.5, log=False, whole=False)),
        ([0, 0.3], Range(0, 0.3, log=False, whole=False)),
        ([16, 32], Choice((16, 32))),
        ([1e-5, 2e-5, 1e-5, 3e-5], Choice((1e-5, 2e-5, 3e-5))),
        (["linear", "cosine"], Choice(("linear", "cosine"))),
        ([[16], [16, 8]], Choice(([16], [16, 8]))),
        ({"min": 2, "max": 6}, Range(2, 6, log=False, whole=True)),
        ({"min": 0.1, "max": 0.2, "log": True}, Range(0.1, 0.2, log=True, whole=False)),
    ],
)
def test_what_is_given_for_a_key_is_a_range_or_a_choice(found: Any, expected: Choice | Range) -> None:
    assert read_domain("optim.x", found) == expected


@pytest.mark.parametrize(
    "found", [3, "linear", [], [1], [2, 2], {"min": 1}, {"min": 5, "max": 2}, {"min": 0, "max": 1.0, "log": True}]
)
def test_what_gives_nothing_to_choose_from_is_refused(found: Any) -> None:
    with pytest.raises(UsageError, match=r"search\.space\.optim\.epochs"):
        read_domain("optim.epochs", found)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"optim": {"learning_rat": [1e-5, 1e-3]}},
            r"unknown key 'optim.learning_rat', did you mean 'learning_rate'\?",
        ),
        ({"optm": {"epochs": [1, 2]}}, r"unknown section 'optm', did you mean 'optim'\?"),
        ({"optim": {"epochs": [2, 0]}}, r"search\.space: optim\.epochs = 0: .*greater than or equal to 1"),
        ({"optim": {"schedule": ["linear", "step"]}}, r"search\.space: optim\.schedule = \"step\""),
        ({"optim": {"seed": [1, 2]}}, r"optim.seed cannot be searched: .* give valid.path"),
        ({"stopping": {"metric": ["loss", "accuracy"]}}, r"stopping.metric cannot be searched"),
        ({"valid": {"fraction": [0.1, 0.3]}}, r"valid.fraction cannot be searched"),
        ({"resources": {"num_workers": [1, 2]}}, r"resources.num_workers cannot be searched"),
        ({}, r"search.space is empty"),
    ],
)
def test_a_key_that_cannot_be_searched_is_named(space: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_space(configure(space))


def test_the_command_line_takes_any_key_of_training() -> None:
    argv = ["--set", "train.path=t", "--set", "model.base=b", "--set", "output.path=/o"]
    argv += [
        "--set",
        "search.space.optim.learning_rate=[1e-5, 5e-4]",
        "--set",
        "search.space.model.truncation=['head', 'tail']",
    ]
    config = parse_command(SearchConfig, argv, prog="jobs.search", description="").config
    assert list(read_space(config)) == ["optim.learning_rate", "model.truncation"]
    for wrong in (
        "search.space.optim=3",
        "search.space={optim = {epochs = [1, 2]}}",
        "search.space.learning_rate=[1, 2]",
    ):
        with pytest.raises(
            UsageError, match=r"expected search\.space\.SECTION\.KEY=VALUE, such as --set 'search\.space"
        ):
            parse_command(SearchConfig, [*argv, "--set", wrong], prog="jobs.search", description="")


def test_the_first_point_is_what_was_given_and_all_are_different_and_allowed() -> None:
    config = configure(optim={"learning_rate": 3e-4, "epochs": 8})
    points = points_of(config, read_space(config))
    assert points[0] == {"optim.learning_rate": 3e-4, "optim.epochs": 8, "optim.batch_size": 32}
    assert len(points) == 8 == len(set(map(point_text, points)))
    for point in points[1:]:
        assert 1e-5 <= point["optim.learning_rate"] <= 5e-4
        assert point["optim.epochs"] in range(2, 7) and point["optim.batch_size"] in (16, 32, 64)
        trained = configuration_at(config, point, path="/o/best")
        assert type(trained) is TrainConfig and trained.output.path == "/o/best"
        assert trained.optim.epochs == point["optim.epochs"]


def test_more_trials_begin_with_the_same_ones_and_another_seed_with_others() -> None:
    def points(**search: Any) -> list[str]:
        config = configure(None, search=search)
        return [point_text(one) for one in points_of(config, read_space(config))]

    assert points(trials=20)[:8] == points(trials=8) == points()
    assert points(seed=1)[1:] != points()[1:]


def test_every_part_of_a_range_is_tried() -> None:
    """As many points as cells: chance leaves a third of them empty (1/e), which this would see."""
    for space, log in (
        ({"optim": {"learning_rate": [1e-5, 1e-3]}}, True),
        ({"optim": {"warmup_fraction": [0.0, 1.0]}}, False),
    ):
        ((key, domain),) = read_space(configure(space)).items()
        values = np.array([point[key] for point in draw({key: domain}, 0, 16)])
        places = (np.log10(values) + 5) / 2 if log else values
        counts, _ = np.histogram(places, bins=8, range=(0, 1))
        assert counts.min() >= 1
    numbers = [one["n"] for one in draw({"n": Range(2, 6, log=False, whole=True)}, 0, 25)]
    assert set(numbers) == {2, 3, 4, 5, 6}


def test_a_small_space_gives_fewer_trials() -> None:
    config = configure({"optim": {"batch_size": [16, 32], "epochs": [2, 3]}})
    points = points_of(config, read_space(config))
    assert {(one["optim.batch_size"], one["optim.epochs"]) for one in points} == {
        (32, 4),
        (16, 2),
        (16, 3),
        (32, 2),
        (32, 3),
    }
    assert len(points) == 5


def test_tasks_and_what_was_given_stay_in_a_trials_configuration() -> None:
    tasks = {"tone": {"path": "a", "label_column": "l"}, "topic": {"path": "b"}}
    values = {"tasks": tasks, "model": {"base": "b", "max_length": 64}, "output": {"path": "o"}}
    config = validate(SearchConfig, values)
    assert configuration_at(config, {}) == validate(TrainConfig, values)
    assert configuration_at(config, {}).model.model_fields_set == {"base", "max_length"}
    dropped = [configuration_at(config, {"head.dropout": value}).head for value in (0.1, 0.3)]
    assert [head.model_fields_set for head in dropped] == [set(), {"dropout"}], "a default is not set by that"


def test_trials_are_looked_at_after_the_same_parts_of_their_steps() -> None:
    assert percents_of(SearchSection()) == (25, 50)
    assert percents_of(SearchSection(grace=0.1, reduction=3)) == (10, 30, 90)
    assert percents_of(SearchSection(stopping="none")) == ()
