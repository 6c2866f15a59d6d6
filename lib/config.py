"""Configuration: one validated, frozen record per job, from a TOML file and `--set` on the command line.

The records themselves lie in `score_config`, `train_config` and `pretrain_config`. They know names, types and defaults, and not what a
path points to: that is checked where it is opened.
"""

import argparse
import json
import re
import secrets
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib.errors import UsageError, nearest

PrecisionChoice = Literal["auto", "fp32", "bf16", "int8"]

TrainPrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]

Truncation = Literal["head", "tail", "head_tail"]

EngineChoice = Literal["auto", "torch", "openvino"]

TokenPooling = Literal["first", "mean", "max"]

CREDENTIALS = re.compile(r"(?<=://)[^/\s\"']*@")
"""user:password@ in a URL; an @ behind the host, as in a path, is none."""


class Section(BaseModel):
    """A frozen record that refuses unknown keys; the text under each field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    of_each: ClassVar[type["Section"] | None] = None
    """of a section that holds records by name: what each of them is"""


class Resources(Section):
    """What a job of any kind needs of its cluster."""

    min_gpus: int = Field(default=0, ge=0)
    """GPUs that the cluster must have before work begins; an autoscaler is asked for those that are not there"""
    min_cpus: int = Field(default=0, ge=0)
    """the same of CPUs"""
    wait_seconds: float = Field(default=900, ge=0)
    """for nodes, if min_gpus or min_cpus ask for more than there are"""


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What a model's folder may make this process do besides reading numbers."""

    pickle: bool = False
    code: bool = False


TRUST_NOTHING = Trust()


def raise_if_code_was_refused(folder: str, error: Exception) -> None:
    """Raise `UsageError` if what transformers raised says that the folder's own code would have to be run."""
    if "trust_remote_code" in str(error):
        raise UsageError(
            f"{folder}: asks for Python code of its own to be run, and none of it was run. If you have read that code and trust it:"
            " --set model.trust_remote_code=true"
        ) from None


ConfigT = TypeVar("ConfigT", bound=Section)

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+=-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class Command(Generic[ConfigT]):
    """A parsed command line."""

    config: ConfigT
    run_id: str
    arguments: argparse.Namespace


def parse_command(
    schema: type[ConfigT],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    extra: argparse.ArgumentParser | None = None,
) -> Command[ConfigT]:
    """Parse `[--config FILE] [--set section.key=value ...] [--run-id ID]` into a validated configuration.

    `extra` adds a job's own arguments. If some of them have no name, a --set takes one key: more would take them, too. Raises `UsageError` that names the key, the value and what was expected.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {prog}",
        description=description,
        epilog=describe_keys(schema),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[extra] if extra else [],
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file with the keys below")
    takes_several = extra is None or all(action.option_strings for action in extra._actions)
    parser.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        nargs="+" if takes_several else 1,
        action="extend",
        default=[],
        help=f"{'keys' if takes_several else 'one key'}, as TOML (a bare word is a string); wins over the file; may be repeated",
    )
    parser.add_argument(
        "--run-id", help="name of this run; an orchestrator passes its logical date (default: time and chance)"
    )
    arguments = parser.parse_args(argv)
    values = read_file(arguments.config) if arguments.config else {}
    for assignment in arguments.set:
        assign(values, assignment)
    run_id = arguments.run_id or f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    if not RUN_ID.fullmatch(run_id):
        raise UsageError(
            f"--run-id {run_id!r}: expected 1 to 128 letters, digits and . _ : + = -, starting with a letter or digit"
        )
    command = Command(config=validate(schema, values), run_id=run_id, arguments=arguments)
    if ONLY_PARSE.get():
        raise CommandParsed(command)
    return command


ONLY_PARSE: ContextVar[bool] = ContextVar("ONLY_PARSE", default=False)
"""Whether `parse_command` ends the job that called it: see `parse_only`."""


class CommandParsed(Exception):
    """The way out of a job that was only asked to read its command line."""

    def __init__(self, command: Command[Any]) -> None:
        super().__init__("the command line was parsed")
        self.command = command


def parse_only(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> Command[Any]:
    """What a job's `main` makes of its arguments, without running it. Raises what the job itself would raise."""
    before = ONLY_PARSE.set(True)
    try:
        main(argv)
    except CommandParsed as parsed:
        return parsed.command
    finally:
        ONLY_PARSE.reset(before)
    raise AssertionError("a job that takes a configuration must read it first of all, by parse_command")


def read_file(path: str) -> dict[str, Any]:
    """Read a TOML configuration file."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--config {path}: there is no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UsageError(f"--config {path}: not a file that can be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not valid TOML: {error}") from None


def assign(values: dict[str, Any], assignment: str) -> None:
    """Put one `section.key=value` into `values`, in place."""
    key, sign, text = assignment.partition("=")
    parts = key.strip().split(".")
    depth, expected = 2, "section.key=value, such as --set input.path=s3://bucket/archive"
    if parts[:2] == ["search", "space"]:
        depth = 4
        expected = "search.space.SECTION.KEY=VALUE, such as --set 'search.space.optim.learning_rate=[1e-5, 5e-4]'"
    elif parts[0] == "tasks":
        depth = max(2, min(3, len(parts)))  # tasks.NAME={...} is a whole one
        expected = "tasks.NAME.KEY=VALUE, such as --set tasks.topic.path=s3://bucket/topics"
    if not sign or len(parts) != depth or not all(parts):
        raise UsageError(f"--set {assignment!r}: expected {expected}")
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise UsageError(f"--set {assignment!r}: {part!r} is a value in the file, expected a section")
    try:
        section[parts[-1]] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        section[parts[-1]] = text.strip()


def validate(schema: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Turn plain values into the job's record, or raise one `UsageError` that lists every mistake."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        found = {
            describe_mistake(schema, tuple(map(str, item["loc"])), item["type"], item["msg"], item["input"])
            for item in error.errors()
        }
        raise UsageError("; ".join(sorted(found, key=lambda text: (not text.startswith("unknown"), text)))) from None


def describe_mistake(schema: type[Section], where: tuple[str, ...], kind: str, message: str, found: object) -> str:
    """Say in one sentence what is wrong with one key."""
    sections = {name: field.annotation for name, field in schema.model_fields.items()}
    if not where:
        return message.removeprefix("Value error, ")
    if kind == "extra_forbidden":
        section = sections.get(where[0])
        section = section.of_each if section is not None and section.of_each and len(where) == 3 else section
        if len(where) == 1 or section is None:
            return f"unknown section {where[0]!r}{nearest(where[0], sections)} (known: {', '.join(sections)})"
        names = list(section.model_fields)
        known = ".".join(where[:-1])
        return f"unknown key {'.'.join(where)!r}{nearest(where[-1], names)} (known in [{known}]: {', '.join(names)})"
    if kind == "missing":
        missing = (
            [key for key, _, required, _ in keys_of(schema) if required and key.startswith(where[0] + ".")]
            if len(where) == 1
            else [".".join(where)]
        )
        return "; ".join(f"{key} is required: give it as --set {key}=... or in the --config file" for key in missing)
    key = ".".join(where[: 3 if where[0] == "tasks" else 2])
    message = message.removeprefix("Value error, ")
    return f"{key} = {masked(json.dumps(found, default=str))}: {message[0].lower()}{message[1:]}"


def masked(text: str) -> str:
    """A text without the user names and passwords of its URLs."""
    return CREDENTIALS.sub("***@", text)


def write_json(path: str, record: Mapping[str, Any]) -> None:
    """Write what --json FILE asks for. Raises `UsageError` if it cannot be written there."""
    try:
        Path(path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {path}: cannot be written: {error}") from error


def keys_of(schema: type[Section]) -> Iterator[tuple[str, str, bool, str]]:
    """Yield `(section.key, default, required, help)` for every key of a job."""
    for name, field in schema.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        fields = (section.of_each or section).model_fields
        prefix = f"{name}.NAME" if section.of_each else name
        for key, leaf in fields.items():
            default = "" if leaf.is_required() or leaf.default is None else json.dumps(leaf.default)
            yield f"{prefix}.{key}", default, leaf.is_required() and prefix == name, leaf.description or ""


def describe_keys(schema: type[Section]) -> str:
    """List all keys with their help and defaults, for `--help`."""
    lines = ["keys:"]
    for key, default, required, text in keys_of(schema):
        note = " (required)" if required else f" [{default}]" if default else ""
        lines.append(f"  {key}{note}\n      {text}")
    return "\n".join(lines)
