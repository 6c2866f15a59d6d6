"""Run a job on a Ray cluster: send the project, follow the job, end as it ends.

Reads   the project's files (what git tracks; without git jobs/ and lib/; at most 50 MB), and the cluster's token, where Ray's own
        commands look for it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token. No token is an argument.
Writes  nothing here; on the cluster what the job writes.

    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/run/secrets/ray-token
    python -m jobs.submit score --address https://head.example.com --config jobs/configs/score.toml \\
        --set input.path=s3://bucket/archive --run-id 2026-11-19
    python -m jobs.submit score ...the same... --status      # also: --stop, --logs, --detach

All arguments but the ones below are the job's own (behind -- all are), see `python -m jobs.score --help`; they are checked here, before
anything is sent. The same job, configuration and run id are one submission: while it runs, the same command follows it, after
success it answers at once, after a failure or a stop it starts the next attempt, which goes on where the last one was.

Ctrl-C on a terminal asks whether to leave the job running or to stop it. Without a terminal, and on SIGTERM, the job is left
running: whoever ends a client (a lost shell, a scheduler that restarts) seldom means the job, and the same command finds it again.

Exit codes: the job's own, 0 to 6. Besides: 2 nothing was sent; 4 the cluster cannot be reached or has lost the job, or the driver
was killed: run the same command again; 5 the job was stopped, or is not followed any more. With --detach, --status, --logs and --stop
0 if that was done.
"""

import argparse
import importlib
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lib import packaging
from lib.config import parse_only
from lib.errors import (
    ExitCode,
    StoppedError,
    TextsweepError,
    UsageError,
    nearest,
    received,
    run_job,
    say,
    stop_on_signals,
)
from lib.job_server import Found, Server, connect
from lib.submission import Submission, outcome, plan

ROOT = Path(__file__).parents[1]


class JobError(TextsweepError):
    """The job on the cluster did not end well; this command ends as the job did."""

    def __init__(self, exit_code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def main(argv: Sequence[str]) -> None:
    """Check, find or send, follow, end as the job ends."""
    arguments, job, own = parse(argv)
    stop_on_signals()
    package = packaging.collect(ROOT)
    submission = plan(job, own, parse_only(importlib.import_module(f"jobs.{job}").main, own), package)
    server = connect(arguments.address, insecure=arguments.insecure, patience_seconds=arguments.patience)
    last = server.latest(submission)
    if arguments.status or arguments.logs or arguments.stop:
        look_or_stop(server, arguments, submission, last)
        return

    if last and last.status == "SUCCEEDED":
        say(f"{last.id}: done already, nothing was sent")
        return
    again = same_command(argv, own, submission.run_id)
    if last and not last.has_ended:
        current, news = last.id, f"{last.status} already, nothing was sent{other_code(last, package)}"
    else:
        resources = arguments.entrypoint_num_cpus, arguments.entrypoint_num_gpus
        current, news = send(server, submission, last, package, *resources)
    if arguments.detach:
        say(f"{current}: {news}")
        say(f"{current}: not followed; to follow it: {again}")
        return
    follow(server, current, news, again)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """Our own arguments, the job's name, and the job's arguments as they are."""
    head, behind = list(argv), []
    if "--" in head:
        head, behind = head[: head.index("--")], head[head.index("--") + 1 :]
    others = (path for path in (ROOT / "jobs").glob("*.py") if path.stem != Path(__file__).stem)
    jobs = sorted(path.stem for path in others if "parse_command(" in path.read_text("utf-8"))
    parser = argparse.ArgumentParser(
        prog="python -m jobs.submit",
        usage="%(prog)s JOB [--address URL] [options] [arguments of the job]",
        description=__doc__,
        epilog=f"JOB: {', '.join(jobs)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(json=False)
    add = parser.add_argument
    add("--address", metavar="URL", help="the cluster's job server (default: RAY_API_SERVER_ADDRESS)")
    add(
        "--insecure",
        action="store_true",
        help="send the token over http to another machine: only on a network that you trust",
    )
    add("--detach", action="store_true", help="do not follow the job")
    add("--status", action="store_true", help="say how the last attempt is; start nothing")
    if {"--status", "--help", "-h"} & set(head):  # otherwise it is the job's
        add("--json", action="store_true", help="with --status: as one JSON object on standard output")
    add("--logs", action="store_true", help="print the last attempt's log so far; start nothing")
    add("--stop", action="store_true", help="end the job: SIGTERM, and after 40 s SIGKILL; start nothing")
    add(
        "--entrypoint-num-cpus",
        metavar="N",
        type=float,
        default=0,
        help="CPUs that the job's driver takes, on any node that has them free; 0, the default: none, it runs on the head. Give compare"
        " and predict some: they compute in the driver, with as many threads",
    )
    add(
        "--entrypoint-num-gpus",
        metavar="N",
        type=float,
        default=0,
        help="GPUs that the job's driver takes, on a node that has them free (default: 0). compare and predict compute on one if they"
        " have it; score and train ask for theirs themselves",
    )
    add(
        "--patience",
        metavar="SECONDS",
        type=float,
        default=300,
        help="how long to try again when the cluster cannot be reached (default: 300)",
    )
    job = head.pop(0) if head and not head[0].startswith("-") else None
    arguments, own = parser.parse_known_args(head)
    if job not in jobs:
        found = f"{job!r} is none{nearest(job, jobs)}" if job else "there is none"
        raise UsageError(f"expected a job's name first: {found} (jobs: {', '.join(jobs)})")
    if sum([arguments.status, arguments.logs, arguments.stop, arguments.detach]) > 1:
        raise UsageError("--status, --logs, --stop and --detach: expected at most one of them")
    return arguments, job, own + behind


def same_command(argv: Sequence[str], own: Sequence[str], run_id: str) -> str:
    """The command that follows what `argv` submitted; `own` are the job's arguments in it."""
    end = argv.index("--") if "--" in argv else len(argv)
    words = [word for word in argv[:end] if word != "--detach"]
    named = any(word.startswith("--run-id") for word in own)
    return shlex.join(["python", "-m", "jobs.submit", *words, *argv[end:], *([] if named else ["--run-id", run_id])])


def other_code(last: Found, package: packaging.Package) -> str:
    """A warning if what runs is not what stands here."""
    there = last.details.metadata or {}
    commit = there.get("git_commit", "")
    return f" (it runs the code of {commit[:12]}{commit[40:]})" if commit != (package.commit or "") else ""


def send(
    server: Server,
    submission: Submission,
    last: Found | None,
    package: packaging.Package,
    num_cpus: float,
    num_gpus: float,
) -> tuple[str, str]:
    """Start the next attempt; returns its id, and what is to be said of it."""
    if last:
        say(f"{last.id}: {outcome_of(last)[1]}")
    current = submission.attempt(last.number + 1 if last else 1)
    say(f"{current}: sending {package}")
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "project.zip"
        packaging.write_zip(package, archive)
        started = server.submit(submission, current, archive, num_cpus, num_gpus)
    how = "submitted" if started else "submitted already, by this command or another"
    return current, f"{how}: {submission.entrypoint}"


def outcome_of(found: Found) -> tuple[ExitCode, str]:
    """How an attempt that has ended did so."""
    return outcome(found.status, found.details.driver_exit_code, found.details.message or "")


def follow(server: Server, current: str, news: str, again: str) -> None:
    """Show the job's log until its end. Raises `JobError` unless it ended well.

    Says the `news` first, inside: a signal that comes as soon as they are read is one to a command that follows a job.
    """
    try:
        say(f"{current}: {news}")
        found = server.follow(current)
    except StoppedError:
        if not wants_stop():
            raise JobError(
                ExitCode.STOPPED, f"{current} is not followed any more and goes on; to follow it: {again}"
            ) from None
        say(f"{current}: stopping")
        found = server.stop(current)
    code, meaning = outcome_of(found)
    if code:
        raise JobError(code, f"{current}: {meaning}")
    say(f"{current}: {meaning}")


def wants_stop() -> bool:
    """Ask whether the job is to be stopped, if there is somebody to ask. Another Ctrl-C leaves it running."""
    if not sys.stdin.isatty() or received[-1] != signal.SIGINT:
        return False
    say("\nStop the job on the cluster, or leave it running? Type stop or leave (Enter leaves it):")
    try:
        return sys.stdin.readline().strip().lower() in ("s", "stop")
    except StoppedError:
        return False


def look_or_stop(server: Server, arguments: argparse.Namespace, submission: Submission, last: Found | None) -> None:
    """What starts nothing. Raises `UsageError` if there is nothing to look at."""
    if last is None:
        raise UsageError(f"{submission.prefix}: never submitted to this cluster, or its head was started anew since")
    if arguments.logs:
        print(server.logs(last.id), end="", flush=True)
        return
    if arguments.stop and not last.has_ended:
        last = server.stop(last.id)
    code, meaning = outcome_of(last) if last.has_ended else (None, last.details.message or "")
    if arguments.json:
        about = {"job": submission.job, "run_id": submission.run_id, "submission_id": last.id, "attempt": last.number}
        times = {"started_ms": last.details.start_time, "ended_ms": last.details.end_time}
        print(json.dumps({**about, "status": last.status, "exit_code": code, "message": meaning, **times}, indent=2))
    else:
        print(f"{last.id}: {last.status}: {meaning}")


if __name__ == "__main__":
    sys.exit(run_job(main))
