"""Configuration: TOML and --set give one validated record, and every mistake is named with what was expected."""

import argparse
import importlib
from pathlib import Path

import pytest

from lib.config import Command, Section, keys_of, parse_command, read_file, validate
from lib.errors import ExitCode, UsageError
from lib.pretrain_config import PretrainConfig
from lib.score_config import CompareConfig, PredictConfig, PublishConfig, ScoreConfig, ZeroShotConfig
from lib.space import SearchConfig
from lib.train_config import TrainConfig

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
SCHEMAS: dict[str, type[Section]] = {
    "score": ScoreConfig,
    "plan": ScoreConfig,
    "train": TrainConfig,
    "pretrain": PretrainConfig,
    "predict": PredictConfig,
    "publish": PublishConfig,
    "zero_shot": ZeroShotConfig,
    "compare": CompareConfig,
    "search": SearchConfig,
}
REQUIRED = ["--set", "input.path=s3://b/archive", "--set", "model.path=/m", "--set", "output.path=/o"]


def parse(*argv: str) -> Command[ScoreConfig]:
    return parse_command(ScoreConfig, argv, prog="jobs.score", description="")


def refusal(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(*argv)
    assert caught.value.exit_code is ExitCode.USAGE
    return str(caught.value)


def test_required_keys_alone_are_enough() -> None:
    config = parse(*REQUIRED).config
    assert config.input.path == "s3://b/archive"
    assert config.input.text_column == "text"


def test_missing_keys_are_all_named() -> None:
    message = refusal("--set", "model.path=/m", "--set", "input.text_column=body")
    assert "input.path is required" in message
    assert "output.path is required" in message
    assert "--set output.path=" in message
    assert "model.path" not in message


def test_an_unknown_key_is_named_with_its_nearest_and_all_known_ones() -> None:
    message = refusal(*REQUIRED, "--set", "input.text_colum=body")
    assert message.startswith("unknown key 'input.text_colum', did you mean 'text_column'?")
    assert "known in [input]: path, text_column, key_columns" in message


def test_an_unknown_section_is_named_with_its_nearest_and_all_known_ones() -> None:
    message = refusal(*REQUIRED, "--set", "inputs.path=x")
    assert "unknown section 'inputs', did you mean 'input'?" in message
    assert "known: input, model, output" in message


def test_every_mistake_is_told_at_once_unknown_keys_first() -> None:
    message = refusal(*REQUIRED, "--set", "planning.chunk_mb=0", "--set", "model.pth=x", "--set", "output.prefix=1x")
    first, *others = message.split("; ")
    assert first.startswith("unknown key 'model.pth'")
    assert any(text.startswith("planning.chunk_mb = 0: ") for text in others)
    assert any(text.startswith('output.prefix = "1x": ') for text in others)


@pytest.mark.parametrize(
    ("assignment", "key", "expected"),
    [
        ("input.key_columns=['id', 'day']", "key_columns", ("id", "day")),
        ("input.text_column=['first', 'second']", "text_column", ("first", "second")),
        ("input.text_column=a.b", "text_column", "a.b"),
        ("input.text_column=two words", "text_column", "two words"),
        ("input.text_column='quoted'", "text_column", "quoted"),
        ("input.path=s3://bucket/a=b/*.parquet", "path", "s3://bucket/a=b/*.parquet"),
        ("input.path= /spaces ", "path", "/spaces"),
    ],
)
def test_values_are_toml_and_a_bare_word_is_a_string(assignment: str, key: str, expected: object) -> None:
    assert getattr(parse(*REQUIRED, "--set", assignment).config.input, key) == expected


@pytest.mark.parametrize("assignment", ["input.path", "path=x", "a.b.c=x", ".path=x", "=x", ""])
def test_an_assignment_without_section_and_key_is_refused(assignment: str) -> None:
    assert "expected section.key=value" in refusal(*REQUIRED, "--set", assignment)


@pytest.mark.parametrize("assignment", ["tasks=3", "tasks.a.b.c=x", "tasks..path=x"])
def test_an_assignment_to_no_key_of_a_task_is_refused(assignment: str) -> None:
    assert "expected tasks.NAME.KEY=VALUE" in refusal(*REQUIRED, "--set", assignment)


@pytest.mark.parametrize(("text", "kind"), [("5", int), ("0.5", float), ("0", int), ("0.0", float), ("1.0", float)])
def test_a_limit_keeps_whether_it_is_a_count_or_a_fraction(text: str, kind: type) -> None:
    found = parse(*REQUIRED, "--set", f"limits.max_bad_rows={text}").config.limits.max_bad_rows
    assert type(found) is kind
    assert found == kind(text)


@pytest.mark.parametrize("text", ["-1", "-0.5", "1.5", "many"])
def test_a_limit_that_is_neither_is_refused(text: str) -> None:
    assert "limits.max_bad_rows" in refusal(*REQUIRED, "--set", f"limits.max_bad_rows={text}")


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "score.toml"
    file.write_text('[input]\npath = "a"\n[model]\npath = "m"\n[output]\npath = "o"\n[planning]\nchunk_mb = 2\n')
    config = parse("--config", str(file), "--set", "input.path=b").config
    assert (config.input.path, config.planning.chunk_mb) == ("b", 2)


def test_one_set_takes_several_keys_unless_a_job_has_arguments_without_a_name() -> None:
    config = parse("--set", *REQUIRED[1::2], "forecast.gpus=32", "forecast.gpu_hour=3.5", "--run-id", "x").config
    assert (config.output.path, config.forecast.gpus, config.forecast.gpu_hour) == ("/o", 32, 3.5)
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument("texts", nargs="*")
    words = ["--set", "model.path=/m", "a text", "--set", "model.precision=bf16"]
    command = parse_command(PredictConfig, words, prog="jobs.predict", description="", extra=extra)
    assert (command.arguments.texts, command.config.model.precision) == (["a text"], "bf16")


def test_a_file_that_is_not_there_or_no_toml_is_named(tmp_path: Path) -> None:
    assert "missing.toml: there is no such file" in refusal("--config", str(tmp_path / "missing.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("[input\npath = 1")
    assert f"--config {broken}: not valid TOML" in refusal("--config", str(broken))
    broken.write_bytes(b"\xff\xfe")
    assert "not valid TOML" in refusal("--config", str(broken))
    assert "not a file" in refusal("--config", str(tmp_path))


def test_a_value_where_a_section_belongs_is_named(tmp_path: Path) -> None:
    file = tmp_path / "score.toml"
    file.write_text("input = 5\n")
    assert "expected a section" in refusal("--config", str(file), *REQUIRED)
    assert "input = 5" in refusal("--config", str(file))


@pytest.mark.parametrize("run_id", ["2026-11-20T00:00:00+00:00", "a", "manual__x", "x" * 128, "dt=1"])
def test_run_ids_of_orchestrators_are_taken(run_id: str) -> None:
    assert parse(*REQUIRED, "--run-id", run_id).run_id == run_id


@pytest.mark.parametrize("run_id", ["_x", ".x", "a/b", "a b", "../x", "x" * 129, "é", "a\n"])
def test_run_ids_that_are_no_file_names_are_refused(run_id: str) -> None:
    assert repr(run_id) in refusal(*REQUIRED, f"--run-id={run_id}")


def test_a_run_id_is_made_up_once_a_run() -> None:
    assert parse(*REQUIRED).run_id != parse(*REQUIRED).run_id


def test_an_unknown_argument_ends_with_the_exit_code_of_a_wrong_command() -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*REQUIRED, "--runid", "x")
    assert caught.value.code == ExitCode.USAGE


def test_records_are_frozen() -> None:
    config = parse(*REQUIRED).config
    for section, key in ((config, "input"), (config.input, "path")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, key, None)


def example_files() -> list[Path]:
    """The configurations that come with the jobs."""
    return sorted(CONFIGS.glob("*.toml"))


@pytest.mark.parametrize("file", example_files(), ids=lambda file: file.name)
def test_every_configuration_in_the_repository_is_valid(file: Path) -> None:
    schema = next(SCHEMAS[word] for word in file.stem.split("_") if word in SCHEMAS)
    values = read_file(str(file))
    if schema is TrainConfig and "tasks" not in values:
        values.setdefault("train", {}).setdefault("path", "given")
    given = {f"{section}.{key}" for section, keys in values.items() for key in keys}
    for key, _, required, _ in keys_of(schema):
        if required and key not in given:  # what a user adds on the command line
            section, _, name = key.partition(".")
            values.setdefault(section, {})[name] = "given"
    validate(schema, values)


@pytest.mark.parametrize("job", SCHEMAS)
def test_help_lists_every_key_with_its_default_and_a_text(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"jobs.{job}")
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"python -m jobs.{job}" in shown
    for key, default, required, text in keys_of(SCHEMAS[job]):
        assert text, f"{key} has no help"
        note = " (required)" if required else f" [{default}]" if default else ""
        assert f"  {key}{note}\n      {text}" in shown
