"""What a command means as a Ray job, where the token comes from, and what an end says."""

import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

import lib
from jobs import compare, publish, submit
from lib.config import parse_only
from lib.errors import ExitCode, StoppedError, UsageError
from lib.job_log import Log
from lib.job_server import AnswerError, check_address, find_token
from lib.packaging import Package
from lib.submission import Submission, outcome, plan

PACKAGE = Package(Path("/project"), ("jobs/configs/a.toml",), 1, "0" * 40)


def planned(*argv: str) -> Submission:
    return plan("publish", argv, parse_only(publish.main, argv), PACKAGE)


def test_the_same_job_configuration_and_run_are_one_submission(tmp_path: Path) -> None:
    one = planned("list", "--set", "output.path=s3://b/scores", "--run-id", "n:1")
    assert one.attempt(2) == f"publish-n-1-{one.digest}-2"
    assert one.prefix == planned("list", "--run-id=n:1", "--set", 'output.path="s3://b/scores"').prefix
    others = [
        planned("list", "--set", "output.path=s3://b/scores", "--run-id", "n-1"),
        planned("list", "--set", "output.path=s3://b/other", "--run-id", "n:1"),
        planned("verify", "--set", "output.path=s3://b/scores", "--run-id", "n:1"),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 4


def test_how_an_answer_is_shown_is_no_other_submission() -> None:
    """`--status --json` must find what `--json` submitted."""
    words = ["list", "--set", "output.path=s3://b/scores", "--run-id", "1"]
    assert planned(*words).digest == planned(*words, "--json").digest


def test_a_jobs_own_paths_are_looked_at() -> None:
    words = ["--champion", "s3://b/7", "--challenger", "models/8", "--set", "test.path=s3://b/test"]
    with pytest.raises(UsageError, match="--challenger = 'models/8': not among the files"):
        plan("compare", words, parse_only(compare.main, words), PACKAGE)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["publish", "list", "--detach"], "publish list --run-id 1"),
        (["publish", "--detach", "--run-id=2"], "publish --run-id=2"),
        (["predict", "--", "--detach", "a b"], "predict -- --detach 'a b' --run-id 1"),
    ],
)
def test_the_command_that_follows_a_job_is_the_same_and_follows(argv: list[str], expected: str) -> None:
    command = submit.same_command(argv, submit.parse(argv)[2], "1")
    assert command == f"python -m jobs.submit {expected}"


def test_the_command_on_the_cluster_is_the_one_given() -> None:
    argv = ["verify", "--set", "output.path=s3://b/a b", "--json"]
    words = shlex.split(planned(*argv).entrypoint)
    assert words[:3] == ["python", "-m", "jobs.publish"]
    assert words[3:-2] == argv
    assert words[-2] == "--run-id", "a name of chance is fixed here, so that the job can be found again"


@pytest.mark.parametrize("argv", [["list", "--set", "output.path=s3://me:secret@b/scores"]])
def test_a_password_is_not_shown_to_everybody(argv: Sequence[str]) -> None:
    with pytest.raises(UsageError, match="user:password@") as refused:
        planned(*argv)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, ExitCode.DONE),
        *(("FAILED", int(code), code) for code in ExitCode if code),
        ("FAILED", 137, ExitCode.INCOMPLETE),
        ("FAILED", -9, ExitCode.INCOMPLETE),
        ("FAILED", None, ExitCode.INCOMPLETE),
        ("FAILED", 127, ExitCode.USAGE),
        ("FAILED", 77, ExitCode.BUG),
        ("STOPPED", None, ExitCode.STOPPED),
    ],
)
def test_an_end_has_an_exit_code(status: str, code: int | None, expected: ExitCode) -> None:
    assert outcome(status, code, "lost its node")[0] == expected


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8265", "http://localhost:8265", "http://[::1]:8265", "https://head.example.com"]
)
def test_an_address_is_taken(address: str) -> None:
    assert check_address(address, insecure=False) == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "head:8265",
        "ray://head:10001",
        "http://me:secret@127.0.0.1",
        "http://head:8265",
        "http://127.example.com",
        "http://localhost.example.com",
    ],
)
def test_an_address_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(UsageError) as refused:
        check_address(address, insecure=False)
    assert "secret" not in str(refused.value)
    assert check_address("http://head:8265", insecure=True)


def test_the_token_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "made here")
    monkeypatch.setattr(lib, "made_token", "made here")
    with pytest.raises(UsageError, match="RAY_AUTH_TOKEN_PATH"):
        find_token()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("at home\n")
    assert find_token() == "at home"
    (tmp_path / "named").write_text("named")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    assert find_token() == "named"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="nowhere: cannot be read"):
        find_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert find_token() == "given"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert find_token() is None


def test_our_options_are_taken_out_and_the_rest_is_the_jobs() -> None:
    arguments, job, own = submit.parse(
        ["publish", "list", "--address", "http://x", "--json", "--set", "a.b=c", "--detach", "--", "--status"]
    )
    assert (arguments.address, arguments.detach, arguments.status, job) == ("http://x", True, False, "publish")
    assert own == ["list", "--json", "--set", "a.b=c", "--status"]
    assert submit.parse(["compare", "--json", "/shared/verdict.json"])[2] == ["--json", "/shared/verdict.json"]
    assert submit.parse(["score", "--set", "a.b=c", "d.e=f", "--detach"])[2] == ["--set", "a.b=c", "d.e=f"]
    assert not submit.parse(["publish", "list", "--stop"])[0].json
    arguments, _, own = submit.parse(["publish", "list", "--status", "--json"])
    assert (arguments.json, own) == (True, ["list"])
    for wrong in ([], ["demo"], ["submit"], ["--stop"], ["score", "--stop", "--logs"]):
        with pytest.raises(UsageError):
            submit.parse(wrong)


@pytest.mark.parametrize(
    ("typed", "signals", "is_stopped"),
    [
        ("stop\n", [signal.SIGINT], True),
        (" S\n", [signal.SIGINT], True),
        ("leave\n", [signal.SIGINT], False),
        ("\n", [signal.SIGINT], False),
        ("", [signal.SIGINT], False),
        ("yes\n", [signal.SIGINT], False),
        (None, [signal.SIGINT], False),
        ("stop\n", [signal.SIGINT, signal.SIGTERM], False),
    ],
)
def test_a_job_is_stopped_only_if_a_person_says_so(
    typed: str | None, signals: list[signal.Signals], is_stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is a second Ctrl-C, an empty answer the end of input; whom SIGTERM ended is not asked."""

    def readline() -> str:
        if typed is None:
            raise StoppedError("stopped")
        return typed

    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True, readline=readline))
    monkeypatch.setattr(submit, "received", signals)
    assert submit.wants_stop() is is_stopped


def test_a_log_that_starts_over_repeats_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log()
    log.show(0, "one\n")
    log.show(4, "two\n")
    log.show(0, "one\ntwo\nthree\n")
    log.show(14, "four\n")
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\n"


def test_a_terminal_shows_progress_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log()
    log.in_place = True
    log.show(0, "start\nscoring: 1 of 9\nscoring: 2 of 9\ndone\n")
    log.end()
    assert capsys.readouterr().out == "start\nscoring: 1 of 9\r\x1b[Kscoring: 2 of 9\ndone\n"


def test_an_answer_is_told_by_its_last_line() -> None:
    text = "Traceback\n  File\nValueError: Job x already exists.\n.\n.\n"
    assert str(AnswerError(500, text)) == "HTTP 500: ValueError: Job x already exists."
