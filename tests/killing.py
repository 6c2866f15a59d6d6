"""Killing a training worker in the middle of its run."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from lib.states import STATE_NAME, STATES_NAME


def train_workers() -> list[int]:
    """Process ids of this session's training workers: descendants of this process, nobody else's."""
    parents, found = {}, []
    for entry in Path("/proc").iterdir():
        try:
            status = (entry / "stat").read_text() if entry.name.isdigit() else ""
            title = (entry / "cmdline").read_text() if status else ""
        except OSError:
            continue
        if status:
            parents[int(entry.name)] = int(status.rpartition(")")[2].split()[1])
            if title.startswith("ray::RayTrainWorker"):
                found.append(int(entry.name))

    def is_mine(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return sorted(filter(is_mine, found))


def leave_half_written(output: Path) -> None:
    """Put a training state beside those of the run in a local folder that is newer than all of them, and cut off."""
    (newest, state) = max(
        (path.parent, path) for path in output.glob(f"_train/*/checkpoints/checkpoint_*/{STATE_NAME}")
    )
    half = newest.with_name("checkpoint_9999-12-31_23-59-59.999999")
    half.mkdir()
    (half / STATE_NAME).write_bytes(state.read_bytes()[:1000])


def states_of(output: Path) -> list[str]:
    """The names of the states that Ray Train lists of the run in a local folder, the last one at the end."""
    for path in output.glob(f"_train/*/{STATES_NAME}"):
        with contextlib.suppress(ValueError, OSError):  # it is being written, or removed
            return [one["checkpoint_dir_name"] for one in json.loads(path.read_text())["checkpoint_results"]]
    return []


@contextlib.contextmanager
def killing(output: Path, checkpoints: int, listed: int = 0) -> Iterator[list[int]]:
    """Kill a worker of the run in a local folder once so many of its checkpoints were seen, and Ray Train lists so many; gives the killed
    process ids.

    It leaves a half-written checkpoint, as one does that dies while it saves.
    """
    killed: list[int] = []
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01) and not killed:
            seen.update(path.name for path in output.glob("_train/*/checkpoints/checkpoint_*"))
            if len(seen) >= checkpoints and len(states_of(output)) >= listed and (workers := train_workers()):
                leave_half_written(output)
                os.kill(workers[-1], signal.SIGKILL)
                killed.append(workers[-1])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()
