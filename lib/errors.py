"""Errors that a person acts on, and the exit code each one ends a job with.

Every message names the object, what was found, what was expected and what to do. Anything that is neither a
`TextsweepError` nor a `StoppedError` is a bug: it keeps its traceback and ends the process with Python's own exit code 1.
"""

import contextlib
import enum
import gc
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from types import FrameType


class ExitCode(enum.IntEnum):
    """What an orchestrator branches on."""

    DONE = 0
    BUG = 1
    USAGE = 2
    """The command or the configuration is wrong: running it again changes nothing."""
    OVER_LIMIT = 3
    """All work is done, but what came of it is not accepted: bad rows, bad shards or drift over a limit, a new model that may be worse."""
    INCOMPLETE = 4
    """Infrastructure failed; what is finished stays finished, run the same command again."""
    STOPPED = 5
    """Stopped on request (SIGTERM or Ctrl-C); run the same command again to go on."""
    OVER_BUDGET = 6
    """`limits.budget` is spent; what is finished stays finished. Not 4: what runs a job again by itself on 4 would spend the budget
    again each time. Not 5: nobody asked for it just now, and somebody has to decide whether the rest is worth another budget."""


class TextsweepError(Exception):
    """Base of all errors with a message for the user."""

    exit_code = ExitCode.BUG


class UsageError(TextsweepError):
    """The command, the configuration or what it points to is wrong."""

    exit_code = ExitCode.USAGE


class DeniedError(UsageError):
    """The storage does not let us in. Once a run is at work this is trouble of the storage, not of the command: see `at_work`."""


class OverLimitError(TextsweepError):
    """All work is done, and what came of it is beyond what is allowed: bad rows and shards, drift, the loss of a new model."""

    exit_code = ExitCode.OVER_LIMIT


class IncompleteError(TextsweepError):
    """Infrastructure failed; the same command can be run again."""

    exit_code = ExitCode.INCOMPLETE


class BudgetError(TextsweepError):
    """The budget of a run is spent."""

    exit_code = ExitCode.OVER_BUDGET


class StoppedError(BaseException):
    """The process was asked to stop.

    No `Exception`, as `KeyboardInterrupt` is none: a signal handler raises it anywhere, also below code that takes every
    `Exception` for a failure of its own. `Thread.start` undid a start that had gone well, and its `KeyError` hid the stop.
    """

    exit_code = ExitCode.STOPPED


def say(line: str) -> None:
    """Warn whoever runs the job. Not on standard output: that is where `jobs.predict` writes its CSV."""
    print(line, file=sys.stderr, flush=True)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the closest known name, or an empty string."""
    match = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {match[0]!r}?" if match else ""


received: list[signal.Signals] = []
"""Requests to stop, in the order they came."""


def stop_on_signals() -> None:
    """Turn SIGTERM and Ctrl-C into `StoppedError` in the main thread. Call it after `ray.init`, which sets its own."""

    def stop(signum: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(signum))
        raise_if_stopped()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def raise_if_stopped() -> None:
    """Raise `StoppedError` if the process was asked to stop.

    For loops around Ray's calls: Ray 2.60 waits in C++, where an exception that a signal handler raises is lost.
    """
    if received:
        raise StoppedError(
            f"stopped by {received[0].name}: what is finished is kept; run the same command again to go on"
        )


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """What was allowed when the run started and is not any more makes the run incomplete, not the command wrong."""
    try:
        yield
    except DeniedError as error:
        raise IncompleteError(f"{error}; it was allowed when the run started: run the same command again") from error


COLLECT_EVERY = 50_000
"""New objects between two looks for garbage; Python's 700 cost a second of a start, whose imports make a million that stay."""


def run_job(main: Callable[[Sequence[str]], None]) -> int:
    """Run a job's `main` on the command line's arguments and return its exit code."""
    gc.set_threshold(COLLECT_EVERY)
    try:
        main(sys.argv[1:])
    except (TextsweepError, StoppedError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return int(error.exit_code)
    return int(ExitCode.DONE)
