"""Errors: each kind has its exit code, a message without a traceback, and a bug keeps its traceback."""

import importlib
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import ray

from lib.errors import (
    ExitCode,
    IncompleteError,
    OverLimitError,
    StoppedError,
    TextsweepError,
    UsageError,
    nearest,
)
from lib.runtime import ray_session

REPOSITORY = Path(__file__).parents[2]


def run_job(body: str) -> subprocess.CompletedProcess[str]:
    """Run a job whose `main` has this body in a process of its own."""
    code = (
        "import sys\nfrom lib import errors\ndef main(argv):\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
        + "\nsys.exit(errors.run_job(main))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError, 2), (OverLimitError, 3), (IncompleteError, 4), (StoppedError, 5)],
)
def test_each_error_ends_a_job_with_its_exit_code_and_one_line(
    error: type[TextsweepError | StoppedError], code: int
) -> None:
    done = run_job(f"raise errors.{error.__name__}('bucket x: not there')")
    assert done.returncode == code == error.exit_code
    assert done.stderr == f"{error.__name__}: bucket x: not there\n"


def test_a_job_that_ends_well_ends_with_0() -> None:
    assert run_job("pass").returncode == ExitCode.DONE


def test_a_bug_keeps_its_traceback_and_ends_with_1() -> None:
    done = run_job("return {}['missing']")
    assert done.returncode == ExitCode.BUG
    assert "Traceback" in done.stderr
    assert "KeyError: 'missing'" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_job_as_stopped(number: signal.Signals) -> None:
    done = run_job(f"""
        import os, signal
        errors.stop_on_signals()
        os.kill(os.getpid(), {int(number)})
        signal.pause()
    """)
    assert done.returncode == ExitCode.STOPPED
    assert f"stopped by {number.name}" in done.stderr
    assert "run the same command again" in done.stderr


def test_a_stop_is_not_taken_for_the_failure_of_what_it_interrupts() -> None:
    """As in `Thread.start`, which undoes a start for any `Exception`, and in clients that try again for any."""
    done = run_job(f"""
        import os
        errors.stop_on_signals()
        try:
            os.kill(os.getpid(), {int(signal.SIGTERM)})
        except Exception:
            raise KeyError("a failure of its own")
    """)
    assert done.returncode == ExitCode.STOPPED, done.stderr
    assert done.stderr.startswith("StoppedError: stopped by SIGTERM")


def test_the_nearest_name_is_offered_only_if_it_is_near() -> None:
    assert nearest("text_colum", ["path", "text_column"]) == ", did you mean 'text_column'?"
    assert nearest("zzz", ["path", "text_column"]) == ""
    assert nearest("x", []) == ""


@pytest.mark.parametrize(("job", "argv"), [("demo", ["x"]), ("demo_corpus", []), ("demo_store", ["a", "b"])])
def test_jobs_of_the_demo_refuse_a_wrong_command_as_all_jobs_do(job: str, argv: list[str]) -> None:
    with pytest.raises(UsageError, match="found"):
        importlib.import_module(f"jobs.{job}").main(argv)


def start_of_ray_fails(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: Any) -> None:
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    with ray_session():
        pass


def test_a_machine_too_busy_to_start_ray_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what Ray 2.60 raises, which has no type of its own."""
    with pytest.raises(IncompleteError, match=r"it did not start within 30 s.*run again"):
        start_of_ray_fails(Exception("The current node timed out during startup. This could"), monkeypatch)
    with pytest.raises(OSError, match="another"):
        start_of_ray_fails(OSError("another"), monkeypatch)
