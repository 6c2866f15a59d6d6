"""Training states: what a run goes on from, as Ray Train keeps them, and those that were cut off."""

import json
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import ray
import ray.train
import torch

from lib.errors import say
from lib.storage import Store

STATE_NAME = "state.pt"
"""In the folder of each state."""

STATES_FOLDER = "checkpoints"
STATES_NAME = f"{STATES_FOLDER}/checkpoint_manager_snapshot.json"
"""Ray Train's list of the states that it keeps of a run."""


def forget_unreadable_states(folder: Store) -> None:
    """Remove Ray Train's list of training states if a kill cut it off, or another version of Ray wrote it.

    Ray 2.60 writes it in place and ends every attempt that cannot read it (`CheckpointManagerInitializationError`).
    """
    raw = folder.read(STATES_NAME)
    if raw is None:
        return
    try:
        writer = json.loads(raw)["ray_version"]
    except (ValueError, KeyError, TypeError):
        why = "was cut off while it was written"
    else:
        if writer == ray.__version__:
            return
        why = f"is of Ray {writer}, this is {ray.__version__}"
    say(f"WARNING: {folder.url}/{STATES_NAME} {why}: which states there are cannot be told, and training begins anew")
    folder.delete(STATES_NAME)


def find_whole(states: Sequence[ray.train.Checkpoint]) -> tuple[dict[str, Any] | None, int | None]:
    """The first state that can be read, and its place among them. A file that a full disk or a lost node cut off is passed over."""
    for place, one in enumerate(states):
        try:
            return read_state(one), place
        except (RuntimeError, EOFError, UnpicklingError) as error:
            then = "the one before it is taken" if place + 1 < len(states) else "training begins anew"
            say(f"WARNING: {one.path}/{STATE_NAME} cannot be read ({str(error).splitlines()[0]}): {then}")
    return None, None


def read_state(checkpoint: ray.train.Checkpoint) -> dict[str, Any]:
    """What `Fit.save` saved."""
    with checkpoint.as_directory() as folder:
        state: dict[str, Any] = torch.load(Path(folder) / STATE_NAME, map_location="cpu", weights_only=True)
    return state
