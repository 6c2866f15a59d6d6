"""A configuration written as TOML is the same one when it is read."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.config import read_file, validate
from lib.toml import float_text, to_toml, value_text
from lib.train_config import TrainConfig

CONFIGS = sorted((Path(__file__).parents[2] / "jobs" / "configs").glob("train_*.toml"))
TASKS: dict[str, Any] = {
    "tasks": {"tone": {"path": "a", "label_column": "l"}, "topic": {"path": "b", "valid": "v", "test": "t"}},
    "model": {"base": 'C:\\models\\"mine"', "freeze_layers": "all"},
    "head": {"hidden_sizes": [16, 8]},
    "loss": {"class_weights": {"not spam": 2.5, "ünïcode\n": 1.0}},
    "output": {"path": "# no comment\t\x7f"},
}


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
