"""A configuration written as TOML is the same one when it is read."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import zero_shot
from lib.config import Section, read_file, validate
from lib.errors import UsageError
from lib.pretrain_config import PretrainConfig
from lib.score_config import ZeroShotConfig
from lib.space import SearchConfig
from lib.toml import announcement, float_text, to_toml, value_text
from lib.train_config import TrainConfig

CONFIGS = sorted((Path(__file__).parents[2] / "jobs" / "configs").glob("train_*.toml"))
TASKS: dict[str, Any] = {
    "tasks": {"tone": {"path": "a", "label_column": "l"}, "topic": {"path": "b", "valid": "v", "test": "t"}},
    "model": {"base": 'C:\\models\\"mine"', "freeze_layers": "all"},
    "head": {"hidden_sizes": [16, 8]},
    "loss": {"class_weights": {"not spam": 2.5, "ünïcode\n": 1.0}},
    "output": {"path": "# no comment\t\x7f"},
}
TINY: dict[str, Any] = {"model": {"base": "b"}, "output": {"path": "o"}}
TASK_LINES = [
    'tasks.tone.path = "a"',
    'tasks.tone.label_column = "l"',
    'tasks.topic.path = "b"',
    'tasks.topic.valid = "v"',
    'tasks.topic.test = "t"',
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_is_in_the_repository_is_written_as_it_was_read(path: Path) -> None:
    values = {"train": {"path": "t"}, "model": {"base": "b"}, "output": {"path": "o"}}
    values |= {name: values.get(name, {}) | section for name, section in read_file(str(path)).items()}
    config = validate(TrainConfig, values)
    text = to_toml(config, ("what it is",))
    assert text.startswith("# what it is\n")
    assert validate(TrainConfig, tomllib.loads(text)) == config


def test_names_and_texts_of_all_kinds_survive() -> None:
    config = validate(TrainConfig, TASKS)
    assert validate(TrainConfig, tomllib.loads(to_toml(config))) == config


def test_defaults_are_left_out_and_passwords_are_masked() -> None:
    values = {
        "train": {"path": "https://me:secret@host/rows", "label_column": "label"},
        "model": {"base": "b"},
        "optim": {"learning_rate": 1.2e-4, "epochs": 4},
        "output": {"path": "o"},
    }
    text = to_toml(validate(TrainConfig, values))
    assert text == (
        '[train]\npath = "https://***@host/rows"\n\n[model]\nbase = "b"\n\n[optim]\nlearning_rate = 1.2e-4\n\n'
        '[output]\npath = "o"\n'
    )


@pytest.mark.parametrize(
    ("schema", "values", "expected"),
    [
        (
            TrainConfig,
            {"train": {"path": "https://me:secret@host/rows"}, **TINY, "optim": {"learning_rate": 1.2e-4, "epochs": 4}},
            ['train.path = "https://***@host/rows"', 'model.base = "b"', "optim.learning_rate = 1.2e-4"],
        ),
        (
            SearchConfig,
            {"train": {"path": "t"}, **TINY, "search": {"space": {"optim": {"batch_size": [8, 16]}}, "trials": 2}},
            [
                'train.path = "t"',
                'model.base = "b"',
                "search.space = {optim = {batch_size = [8, 16]}}",
                "search.trials = 2",
            ],
        ),
        (PretrainConfig, {"train": {"path": "t"}, **TINY}, ['train.path = "t"', 'model.base = "b"']),
        (ZeroShotConfig, {"labels": {"file": "l"}, **TINY}, ['labels.file = "l"', 'model.base = "b"']),
        (TrainConfig, {"tasks": TASKS["tasks"], **TINY}, ['model.base = "b"', *TASK_LINES]),
    ],
    ids=["train", "search", "pretrain", "zero_shot", "tasks"],
)
def test_a_job_says_in_a_few_lines_what_it_was_told(
    schema: type[Section], values: dict[str, Any], expected: list[str]
) -> None:
    first, *lines = announcement("2026-11-19", validate(schema, values)).splitlines()
    assert first == "run 2026-11-19"
    assert sorted(lines) == sorted(f"  {line}" for line in [*expected, 'output.path = "o"'])


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_the_same_and_stay_floats(value: float) -> None:
    found = tomllib.loads(f"x = {float_text(value)}")["x"]
    assert isinstance(found, float) and found == value


@given(st.recursive(st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(st.characters(codec="utf-8")),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner)))  # fmt: skip
def test_values_of_all_kinds_survive(value: Any) -> None:
    assert tomllib.loads(f"x = {value_text(value)}")["x"] == value


def test_small_numbers_are_written_as_a_person_would() -> None:
    assert [float_text(value) for value in (3e-4, 5e-05, 0.01, 1.0, 1e22)] == ["3e-4", "5e-5", "0.01", "1.0", "1e22"]


def test_no_job_prints_a_password(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Nor its whole configuration, which stands in the card."""
    values = ("labels.file=/nowhere.toml", "model.base=https://me:secret@host/base", f"output.path={tmp_path}")
    with pytest.raises(UsageError, match="nowhere"):
        zero_shot.main([word for value in values for word in ("--set", value)])
    said = capsys.readouterr().out
    assert '  model.base = "https://***@host/base"\n' in said
    assert "secret" not in said
    assert len(said.splitlines()) == 4
