"""What reviewers should not have to look at: ruff, strict mypy, and nothing of the machine that a file was written on."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_the_checkers_have_nothing_to_say(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def tracked_files() -> list[Path]:
    """The files of the repository; of a copy without git, its sources."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    if done.returncode:
        return [path for folder in ("lib", "jobs", "tests", "cluster") for path in (REPOSITORY / folder).rglob("*.*")]
    return [REPOSITORY / name for name in done.stdout.split("\0") if name]


def test_no_file_names_the_machine_it_was_written_on() -> None:
    places = [f"{place}/".encode() for place in (REPOSITORY, REPOSITORY.parent) if len(place.parts) > 1]
    guilty = [
        f"{path.relative_to(REPOSITORY)}: {place.decode()}"
        for path in tracked_files()
        if path.is_file()
        for place in places
        if place in path.read_bytes()
    ]
    assert not guilty
