"""A job that does what its configuration says: for tests of what runs jobs. Copied into a project's folder as `jobs/scripted.py`."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from lib.config import Section, parse_command
from lib.errors import run_job


class StepSection(Section):
    """What to do."""

    codes: tuple[int, ...] = (0,)
    """the exit code of each run in turn, the last one's for all that follow"""
    folder: str
    """where each run leaves a file with its process id, `run-N`; it ends when `go` is there"""
    waits: bool = False
    """wait for `go`"""
    stopping_seconds: float = 0
    """what ending takes after SIGTERM"""


class ScriptedConfig(Section):
    """Everything the job can be told."""

    step: StepSection


def main(argv: Sequence[str]) -> None:
    """Leave a trace, wait, end."""
    command = parse_command(ScriptedConfig, argv, prog="jobs.scripted", description=__doc__ or "")
    step, folder = command.config.step, Path(command.config.step.folder)
    folder.mkdir(parents=True, exist_ok=True)

    def stop(_signum: int, _frame: FrameType | None) -> None:
        print("stopping", flush=True)
        time.sleep(step.stopping_seconds)
        print("stopped well", flush=True)
        os._exit(5)

    signal.signal(signal.SIGTERM, stop)
    number = len(list(folder.glob("run-*"))) + 1
    (folder / f"run-{number}").write_text(str(os.getpid()))
    print(f"run {number} of {command.run_id} at work", flush=True)
    while step.waits and not (folder / "go").exists():
        time.sleep(0.1)
    code = step.codes[min(number, len(step.codes)) - 1]
    print(f"run {number} ends with {code}", flush=True)
    os._exit(code)


if __name__ == "__main__":
    sys.exit(run_job(main))
