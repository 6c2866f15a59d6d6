"""What a training has committed: which run it was, what decided it, and how it was made."""

import json
import platform
from importlib.metadata import version
from typing import Any

from lib.checkpoint import CARD_NAME, COMMIT_NAME, Card
from lib.config import Section, masked
from lib.errors import UsageError
from lib.pretrain_config import FitConfig
from lib.storage import Store

METRICS_NAME = "metrics.json"

DECIDES_NOTHING: dict[str, Any] = {"resources": True, "tracking": True, "search": {"concurrent"}}
"""Sections and keys of a configuration: a run may go on with other workers, a search with fewer trials at a time."""

SHOWN_DIFFERENCES = 8
"""At most, in an error: a further pre-training and a training differ in 57."""

PACKAGES = ("torch", "transformers", "ray")


def find_committed(output: Store, config: FitConfig, run_id: str) -> dict[str, Any] | None:
    """What `metrics.json` of a checkpoint that this very run committed holds, or None if there is no checkpoint.

    Raises `UsageError` if the checkpoint there is another run's.
    """
    if output.info(COMMIT_NAME) is None:
        return None
    raw = output.read(CARD_NAME)
    trained = Card.model_validate_json(raw).trained if raw else {}
    if trained.get("run_id") != run_id or differences(config, trained.get("config", {})):
        same = trained.get("run_id") == run_id
        raise UsageError(
            f"output.path {output.url}: holds the checkpoint of run {trained.get('run_id', 'unknown')!r}"
            f"{' with another configuration' if same else ''}, this is run {run_id!r}; a committed checkpoint is never"
            " changed: give this run another output.path"
        )
    return json.loads(output.read(METRICS_NAME) or b"{}")


def deciding(config: Section, only_chosen: bool = False) -> dict[str, Any]:
    """The configuration as plain JSON, without credentials and `DECIDES_NOTHING`; or only what is not at its default."""
    found: dict[str, Any] = json.loads(
        masked(config.model_dump_json(exclude=DECIDES_NOTHING, exclude_defaults=only_chosen))
    )
    return found


def differences(config: Section, theirs: dict[str, Any]) -> list[str]:
    """In which keys a configuration is not the one that a run was started with, and how.

    A key that came after that run, with a newer version, is no difference at its default: a night is not lost to an upgrade.
    """
    ours, before = flat(without_news(deciding(config), theirs, deciding(config, only_chosen=True))), flat(theirs)
    found = [
        f"{key} {f'= {ours[key]!r}' if key in ours else 'is not set'}, it was {repr(before[key]) if key in before else 'not set'}"
        for key in ours | before
        if (key in ours, ours.get(key)) != (key in before, before.get(key))
    ]
    more = len(found) - SHOWN_DIFFERENCES
    return found if more <= 0 else [*found[:SHOWN_DIFFERENCES], f"and {more} more"]


def without_news(mine: dict[str, Any], theirs: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """`mine` without the keys that `theirs` does not know and nobody has chosen."""
    return {
        key: without_news(value, theirs[key], chosen.get(key, {}))
        if isinstance(value, dict) and isinstance(theirs.get(key), dict)
        else value
        for key, value in mine.items()
        if key in theirs or key in chosen
    }


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration by section.key."""
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}


def provenance(config: Section, run_id: str) -> dict[str, Any]:
    """What every card says of how its checkpoint was made."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return {"run_id": run_id, "config": deciding(config), "versions": versions}
