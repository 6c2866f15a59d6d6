"""What a command means as a Ray job: its id, its command line on the cluster, its metadata; and what its end says.

The id derives from job, configuration and run id, and from how many attempts ended without success before it. So a command
that is given again, by whomever, finds what is running instead of starting it twice: Ray takes an id once.
"""

import hashlib
import json
import re
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lib.config import CREDENTIALS, Command
from lib.errors import ExitCode, UsageError
from lib.packaging import Package, check_paths, sent_name

SHOWN_CHARACTERS = 500
"""of what Ray says about a driver that it lost"""

SIGNALLED = 128
"""A shell ends with this and the signal's number if its command was killed; Ray starts drivers through one."""


@dataclass(frozen=True)
class Submission:
    """One run of one job with one configuration, whoever asks for it and however often."""

    job: str
    run_id: str
    digest: str
    """of job, configuration, run id and the job's own arguments, but for how it shows its answer"""
    entrypoint: str
    commit: str | None

    @property
    def prefix(self) -> str:
        """What the ids of all attempts begin with: safe in a URL and as a file name."""
        return f"{self.job}-{re.sub(r'[^A-Za-z0-9._-]', '-', self.run_id)[:60]}-{self.digest}"

    def attempt(self, number: int) -> str:
        """The submission id of an attempt, from 1."""
        return f"{self.prefix}-{number}"

    @property
    def metadata(self) -> dict[str, str]:
        """What Ray shows beside the job."""
        return {
            "textsweep_job": self.job,
            "run_id": self.run_id,
            "config_digest": self.digest,
            "git_commit": self.commit or "",
        }


def plan(job: str, argv: Sequence[str], command: Command[Any], package: Package) -> Submission:
    """What a job's arguments `argv`, parsed as `command`, are on the cluster.

    Raises `UsageError` for what works on this machine alone, and for passwords in URLs: Ray shows the command line to everybody.
    """
    config = command.config.model_dump(mode="json")
    text = json.dumps(config, sort_keys=True)
    if CREDENTIALS.search(text) or any(CREDENTIALS.search(word) for word in argv):
        raise UsageError(
            "a URL with user:password@ is in the command, and Ray would show it to everybody who sees the job; credentials"
            " come from the environment of the cluster"
        )
    own = {name: value for name, value in vars(command.arguments).items() if name not in ("config", "set", "run_id")}
    check_paths(package, config, own)
    own.pop("json", None)  # how an answer is shown; and --status takes the word for itself
    identity = json.dumps([job, command.run_id, config, own], sort_keys=True, default=str)
    words = list(argv)
    if command.arguments.config:
        sent = sent_name(package, command.arguments.config)
        words = [sent if word == command.arguments.config else word for word in words]
        words = [f"--config={sent}" if word.startswith("--config=") else word for word in words]
    if command.arguments.run_id is None:
        words += ["--run-id", command.run_id]
    return Submission(
        job=job,
        run_id=command.run_id,
        digest=hashlib.sha256(identity.encode()).hexdigest()[:12],
        entrypoint=shlex.join(["python", "-m", f"jobs.{job}", *words]),
        commit=package.commit,
    )


def outcome(status: str, code: int | None, message: str) -> tuple[ExitCode, str]:
    """The job's own exit code and what it means, from what Ray keeps of a job that has ended: its status, its driver's exit
    code, None if the driver did not end by itself, and Ray's message."""
    if status == "SUCCEEDED":
        return ExitCode.DONE, "done"
    if status == "STOPPED":
        return ExitCode.STOPPED, "stopped on request; run the same command again to go on"
    if code is None:
        # Its supervisor died, its node was lost, no resources, no environment: how the driver itself ended is unknown.
        shown = " ".join(message.split())[:SHOWN_CHARACTERS]
        return ExitCode.INCOMPLETE, f"Ray lost the driver or could not start it: {shown}; run the same command again"
    if code in set(ExitCode):
        return ExitCode(code), f"the job ended with exit code {code}"
    if code < 0 or code > SIGNALLED:
        number = -code if code < 0 else code - SIGNALLED
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return (
            ExitCode.INCOMPLETE,
            f"the driver was killed by {name}, by hand or for want of memory; run the same command again",
        )
    if code in (126, 127):
        return (
            ExitCode.USAGE,
            f"`python` cannot be run on the cluster (exit code {code}): put it on the PATH of Ray's nodes",
        )
    return ExitCode.BUG, f"the driver ended with exit code {code}, which no job has"
