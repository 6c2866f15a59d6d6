"""A configuration as a person would write it, in a TOML file or a few lines: the keys that differ from their defaults."""

import json
from collections.abc import Mapping
from typing import Any

from lib.config import Section, masked


def to_toml(config: Section, comments: tuple[str, ...] = ()) -> str:
    """A job's configuration without what is the default anyway; `comments` are lines above it. Credentials in URLs are masked."""
    parts = [*(f"# {line}" for line in comments)]
    for name, section in config:
        for path, values in tables_of(name, section):
            parts += ["", f"[{path}]", *(f"{key_text(key)} = {value_text(value)}" for key, value in values.items())]
    return masked("\n".join(parts).lstrip("\n")) + "\n"


def announcement(run_id: str, config: Section) -> str:
    """What a job prints when it starts: its run, and each key that is not as it comes, with credentials in URLs masked."""
    tables = [table for name, section in config for table in tables_of(name, section)]
    keys = [
        f"  {path}.{key_text(key)} = {value_text(value)}" for path, values in tables for key, value in values.items()
    ]
    return masked("\n".join([f"run {run_id}", *keys]))


def tables_of(path: str, section: Section) -> list[tuple[str, dict[str, Any]]]:
    """The tables that hold a section: its own, if there is anything to say, and one for each section that has a name in it."""
    own, found = {}, []
    fields = type(section).model_fields
    for key, value in section:
        if isinstance(value, Section):
            found += tables_of(f"{path}.{key_text(key)}", value)
        elif (
            key not in fields
            or fields[key].is_required()
            or value != fields[key].get_default(call_default_factory=True)
        ):
            own[key] = value
    return ([(path, own)] if own else []) + found


def key_text(key: str) -> str:
    """A key, in quotes where it must be."""
    bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if bare else value_text(key)


def value_text(value: Any) -> str:
    """One value. Raises `TypeError` for what TOML cannot say."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return float_text(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key_text(key)} = {value_text(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(value_text, value)) + "]"
    raise TypeError(f"{value!r} has no form in TOML")


def float_text(value: float) -> str:
    """The shortest text that gives the same number, with a point or an exponent: 3e-4 rather than 0.0003."""
    text = repr(value)
    if value and abs(value) < 1e-3 and "e" not in text:
        digits = text.lstrip("-0.")
        mantissa = f"{digits[0]}.{digits[1:]}" if len(digits) > 1 else digits
        exponent = len(text.partition(".")[2]) - len(digits) + 1
        text = f"{'-' if value < 0 else ''}{mantissa}e-{exponent}"
    return text.replace("e-0", "e-").replace("e+", "e")
