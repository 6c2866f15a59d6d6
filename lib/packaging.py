"""What is sent to a cluster: the project's files as one archive, and whether a configuration finds there what it names.

In a git checkout these are the files that git tracks, as they are in the working tree. Elsewhere they are `jobs/` and `lib/`.
The archive depends on names and contents alone, so that Ray, which names it by its hash, sends the same files once.
"""

import subprocess
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import UsageError

MAX_MEGABYTES = 50
"""Code and configurations have 3 MB. The head keeps what is sent in its memory, and every node of a job unpacks it."""

SHOWN_FILES = 5
"""of those that make it too large"""

FOLDERS = ("jobs", "lib")
"""what is sent without git"""

INPUT_KEYS = {"path", "file", "base", "rows", "valid", "test", "augment.model", "--champion", "--challenger", "--csv"}
OUTPUT_KEYS = {"output.path", "tracking.path", "tracking.uri", "--json", "--output", "--html"}
"""Keys and arguments of jobs whose values are paths; those of the first, with or without their section, are read."""

EPOCH = (1980, 1, 1, 0, 0, 0)
"""the earliest time that a zip archive can hold"""


@dataclass(frozen=True)
class Package:
    """The files that are sent."""

    root: Path
    files: tuple[str, ...]
    """relative to the root, sorted"""
    bytes: int
    """of all files, before compression"""
    commit: str | None
    """the git commit, followed by -dirty if tracked files were changed since; None without git"""

    def __str__(self) -> str:
        what = f"tracked by git at {self.commit[:12]}{self.commit[40:]}" if self.commit else "in jobs/ and lib/, no git"
        return f"{len(self.files):,} files, {self.bytes / 1e6:.1f} MB ({what})"

    def holds(self, path: str) -> bool:
        """Whether a path relative to the root is a file that is sent, or a folder with some."""
        name = Path(path).as_posix()
        return any(file == name or file.startswith(f"{name}/") for file in self.files)


def collect(root: Path) -> Package:
    """Find the files of the project at `root`.

    Raises `UsageError` if they are too large, naming the largest, or if a link leads out of the root.
    """
    names = git(root, "ls-files", "-z")
    tracked = [name for name in (names or "").split("\0") if name]
    commit = None
    if tracked and (head := git(root, "rev-parse", "HEAD")):
        changed = git(root, "status", "--porcelain", "--untracked-files=no", "--", ".")
        commit = head.strip() + ("-dirty" if changed else "")
    # A file that git tracks and that was removed is not sent, nor is what stands in the place of a submodule.
    found = sorted(name for name in tracked or untracked_files(root) if (root / name).is_file())
    for name in found:
        if not (root / name).resolve().is_relative_to(root.resolve()):
            raise UsageError(
                f"{root / name}: a link out of {root}; what is sent must lie inside: put the file itself there"
            )
    sizes = {name: (root / name).stat().st_size for name in found}
    total = sum(sizes.values())
    if total > MAX_MEGABYTES * 1e6:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:SHOWN_FILES]
        shown = ", ".join(f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in largest)
        raise UsageError(
            f"{root}: {len(found):,} files of {total / 1e6:.1f} MB would be sent, at most {MAX_MEGABYTES} MB are; the largest: {shown}."
            " Put data and models into object storage, and take them out of git"
        )
    return Package(root, tuple(found), total, commit)


def git(root: Path, *arguments: str) -> str | None:
    """What a git command says about `root`; None if there is no git, or `root` is not in a checkout."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def untracked_files(root: Path) -> Iterator[str]:
    """Files of the project's own folders, without what Python and editors leave there."""
    for folder in FOLDERS:
        for path in (root / folder).rglob("*"):
            name = path.relative_to(root)
            if not any(part.startswith(".") or part == "__pycache__" for part in name.parts):
                yield name.as_posix()


def write_zip(package: Package, target: Path) -> None:
    """Write the files as one archive: the same bytes for the same names and contents."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in package.files:
            source = package.root / name
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o100755 if source.stat().st_mode & 0o100 else 0o100644) << 16
            archive.writestr(entry, source.read_bytes())


def sent_name(package: Package, config: str) -> str:
    """A --config file's path as the job will find it. Raises `UsageError` if it is not sent."""
    path = Path(config).resolve()
    inside = path.is_relative_to(package.root.resolve())
    name = path.relative_to(package.root.resolve()).as_posix() if inside else config
    if not inside or not package.holds(name):
        why = (
            "git does not track it: git add it"
            if inside and package.commit
            else f"put it into {package.root}/jobs/configs"
        )
        raise UsageError(
            f"--config {config}: not among the files that are sent to the cluster ({why}), or give its keys with --set"
        )
    return name


def check_paths(package: Package, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raise `UsageError` for paths that mean a place on this machine: the job runs elsewhere, in a folder that goes with it.

    `arguments` are the job's own, by their names.
    """
    for key, value in [*leaves(config), *((f"--{name}", value) for name, value in arguments.items())]:
        if not isinstance(value, str) or "://" in value or value.startswith(("/", "package:")):
            continue
        if key in OUTPUT_KEYS:
            raise UsageError(
                f"{key} = {value!r}: relative to the job's own folder, which is removed with it; expected a URL such as"
                " s3://bucket/folder, or an absolute path that all nodes see"
            )
        is_run = key == "drift.baseline" and ("/" in value or value.endswith(".json"))
        if (is_run or {key, key.rpartition(".")[2]} & INPUT_KEYS) and not package.holds(value):
            raise UsageError(
                f"{key} = {value!r}: not among the files that are sent to the cluster; expected a URL such as"
                " s3://bucket/folder, an absolute path that all nodes see, or a file that git tracks"
            )


def leaves(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a configuration by its key."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield above + name, value
