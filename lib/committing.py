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

PACKAGES = ("torch", "transformers", "ray")


def find_committed(output: Store, config: FitConfig, run_id: str) -> dict[str, Any] | None:
    """What `metrics.json` of a checkpoint that this very run committed holds, or None if there is no checkpoint.

    Raises `UsageError` if the checkpoint there is another run's.
    """
    if output.info(COMMIT_NAME) is None:
        return None
    raw = output.read(CARD_NAME)
    trained = Card.model_validate_json(raw).trained if raw else {}
    if trained.get("run_id") != run_id or trained.get("config") != deciding(config):
        same = trained.get("run_id") == run_id
        raise UsageError(
            f"output.path {output.url}: holds the checkpoint of run {trained.get('run_id', 'unknown')!r}"
            f"{' with another configuration' if same else ''}, this is run {run_id!r}; a committed checkpoint is never"
            " changed: give this run another output.path"
        )
    return json.loads(output.read(METRICS_NAME) or b"{}")


def deciding(config: Section) -> dict[str, Any]:
    """The configuration as plain JSON, without credentials, and what decides no result: a run may go on with other workers."""
    found: dict[str, Any] = json.loads(masked(config.model_dump_json(exclude={"resources", "tracking"})))
    return found


def provenance(config: Section, run_id: str) -> dict[str, Any]:
    """What every card says of how its checkpoint was made."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return {"run_id": run_id, "config": deciding(config), "versions": versions}
