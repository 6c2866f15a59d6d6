"""What lies below an output folder: every version and run, and moving the pointer back or deleting a version without harm.

Nothing here scores. The pointer is only ever swapped against what was read before a decision.
"""

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.errors import ExitCode, IncompleteError, UsageError, nearest
from lib.publishing import (
    ARCHIVE_NAME,
    DELETING,
    POINTER_NAME,
    Pointer,
    clock_difference,
    now,
    parse_pointer,
    refuse_deleted,
    stamp,
    totals,
)
from lib.storage import Store

VERSION = re.compile(r"[0-9a-f]{16}")

READERS = 16
"""Threads that read small files."""

DELETE_BATCH = 10_000
"""Files deleted between two lines of progress."""

State = Literal[
    "published", "success", "over_limit", "incomplete", "stopped", "over_budget", "failed", "no_record", "deleting"
]

STATES: dict[int, State] = {
    ExitCode.DONE: "success",
    ExitCode.OVER_LIMIT: "over_limit",
    ExitCode.INCOMPLETE: "incomplete",
    ExitCode.STOPPED: "stopped",
    ExitCode.OVER_BUDGET: "over_budget",
}

OnProgress = Callable[[int, int], None]
"""Told how many of how many are done."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run, as `jobs.publish list` shows it."""

    version: str
    run: str | None
    """None: a version in which no run has ended"""
    state: State
    """`published`: the pointer names it; `no_record`: it was killed, or is still going"""
    planned_at: str | None
    exit_code: int | None
    rows: int | None
    shards: int | None
    errors: int | None
    bytes: int | None
    message: str


def read_pointer(output: Store) -> Pointer | None:
    """Read the pointer alone."""
    return parse_pointer(output, output.read(POINTER_NAME))


def list_runs(output: Store) -> list[RunSummary]:
    """Describe every run of every version, by the time it was planned. Reads one or two small files for each run, no predictions."""
    pointer = read_pointer(output)
    versions = [name for name in output.folders() if VERSION.fullmatch(name)]
    with ThreadPoolExecutor(READERS) as pool:
        listings = list(pool.map(lambda name: output.list(f"{name}/_runs")["path"].to_pylist(), versions))
        archives = list(pool.map(lambda name: output.read(f"{name}/{ARCHIVE_NAME}"), versions))
        todo = []
        for version, paths, archive in zip(versions, listings, archives, strict=True):
            files: dict[str | None, set[str]] = {}
            for path in paths:
                run, _, name = path.removeprefix(f"{version}/_runs/").partition("/")
                files.setdefault(run, set()).add(name)
            deleting = archive is not None and DELETING in json.loads(archive)
            todo += [(version, run, names, deleting) for run, names in (files or {None: set()}).items()]
        found = list(pool.map(lambda one: summarise(output, pointer, *one), todo))
    return sorted(found, key=lambda one: (one.planned_at or "", one.version, one.run or ""))


def summarise(
    output: Store, pointer: Pointer | None, version: str, run: str | None, names: set[str], deleting: bool
) -> RunSummary:
    """Describe one run from its own small files; one that was killed before it wrote them has none."""
    folder = output.at(f"{version}/_runs/{run}")
    record = read_json(folder, "run.json") if "run.json" in names else {}
    mark = read_json(folder, "_SUCCESS") if "_SUCCESS" in names and not record else {}
    exit_code = record.get("exit_code")
    is_published = pointer is not None and (pointer.version, pointer.run) == (version, run)
    state: State = "no_record" if exit_code is None else STATES.get(exit_code, "failed")
    if "_SUCCESS" in names:
        state = "success"
    if is_published or deleting:
        state = "published" if is_published else "deleting"
    counts = record.get("published_total") or (totals(read_manifest(output, Pointer(**mark))) if mark else {})
    return RunSummary(
        version=version,
        run=run,
        state=state,
        planned_at=record.get("started_at") or mark.get("planned_at"),
        exit_code=exit_code,
        message=record.get("message", "" if run else "no run of this version has ended"),
        **{name: counts.get(name) for name in ("rows", "shards", "errors", "bytes")},
    )


def read_json(folder: Store, name: str) -> dict[str, Any]:
    """Read a small JSON file; one that is gone or unreadable is empty, for a list is no place to fail in."""
    try:
        found = json.loads(folder.read(name) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_manifest(output: Store, pointer: Pointer) -> pa.Table:
    """Read the manifest of a successful run."""
    raw = output.read(pointer.manifest)
    if raw is None:
        raise IncompleteError(f"{output.url}/{pointer.manifest}: the manifest of run {pointer.run} is gone")
    return pq.read_table(pa.BufferReader(raw))


def find_success(output: Store, run: str | None, version: str | None) -> Pointer:
    """What a successful run could publish; without `run`, what is published. Raises `UsageError` if there is none."""
    if run is None:
        pointer = read_pointer(output)
        if pointer is None:
            raise UsageError(f"{output.url}: nothing is published ({POINTER_NAME} is not there)")
        return pointer
    versions = [name for name in output.folders() if VERSION.fullmatch(name)] if version is None else [version]
    with ThreadPoolExecutor(READERS) as pool:
        marks = list(pool.map(lambda name: output.read(f"{name}/_runs/{run}/_SUCCESS"), versions))
    found = [Pointer.model_validate_json(raw) for raw in marks if raw]
    if len(found) > 1:
        raise UsageError(
            f"--run {run}: a run of this name succeeded in {len(found)} versions ({', '.join(one.version for one in found)});"
            " name one of them with --version"
        )
    if found:
        return found[0]
    known = {one.run: one.state for one in list_runs(output) if one.run and version in (None, one.version)}
    if run in known:
        raise UsageError(
            f"--run {run}: this run is no success ({known[run]}: it has no _SUCCESS), only a successful one can be read or published"
        )
    good = [name for name, state in known.items() if state in ("success", "published")]
    raise UsageError(
        f"--run {run}: no such run below {output.url}{f'/{version}' if version else ''}{nearest(run, known)}"
        f" (successful, latest last: {', '.join(good[-5:]) or 'none'})"
    )


def find_lost(output: Store, manifest: pa.Table, version: str) -> list[str]:
    """The manifest's objects that a listing does not show, or shows with another size."""
    listed = output.list(version).select(["path", "size"])
    joined = manifest.select(["path", "bytes"]).join(listed, "path", join_type="left outer")
    kept = pc.fill_null(pc.equal(joined["bytes"], joined["size"]), False)
    return sorted(joined.filter(pc.invert(kept))["path"].to_pylist())


def roll_back(output: Store, run: str, version: str | None, *, single_writer: bool) -> tuple[Pointer | None, Pointer]:
    """Move the pointer to a successful run whose objects are all there; returns the pointer before and after.

    The pointer's plan is dated now: no run that was planned before undoes this, the next one that is planned publishes again.
    """
    raw = output.read(POINTER_NAME)
    before = parse_pointer(output, raw)
    target = find_success(output, run, version)
    if before and (before.version, before.run, before.manifest) == (target.version, target.run, target.manifest):
        return before, before
    refuse_deleted(output.at(target.version))
    manifest = read_manifest(output, target)
    if lost := find_lost(output, manifest, target.version):
        raise UsageError(
            f"--run {run}: {len(lost):,} of its {manifest.num_rows:,} objects are gone or have another size (first: {lost[0]});"
            " choose another run; nothing was changed"
        )
    moment = stamp(now() + clock_difference(output))
    after = target.model_copy(update={"planned_at": moment, "turn_planned_at": moment})
    data = after.model_dump_json(indent=2).encode()
    if single_writer:
        output.replace(POINTER_NAME, data)
    elif not output.swap(POINTER_NAME, raw, data):
        raise IncompleteError(
            f"{output.url}/{POINTER_NAME} was changed by another run meanwhile; nothing was rolled back; look at the list and decide again"
        )
    return before, after


def find_deletable(output: Store, version: str) -> pa.Table:
    """List a version that may be deleted (columns path, size, ...). Raises `UsageError` for the published one and for what is none."""
    if not VERSION.fullmatch(version):
        raise UsageError(f"--version {version!r}: expected 16 hex digits, as jobs.publish list shows them")
    try:
        refuse_published(output, version)
    except UsageError:
        if DELETING in read_json(
            output.at(version), ARCHIVE_NAME
        ):  # a deletion was killed before it saw the publication
            mark_deleting(output.at(version), False)
        raise
    listing = output.at(version).list()
    if not listing.num_rows:
        raise UsageError(f"--version {version}: no such version below {output.url}{nearest(version, output.folders())}")
    return listing


def refuse_published(output: Store, version: str) -> bytes | None:
    """Raise `UsageError` if the pointer names this version; returns the pointer's bytes."""
    raw = output.read(POINTER_NAME)
    pointer = parse_pointer(output, raw)
    if pointer and pointer.version == version:
        raise UsageError(
            f"--version {version} is published (run {pointer.run}): readers use it; publish or roll back to another version first"
        )
    return raw


def delete_version(output: Store, version: str, on_progress: OnProgress, *, single_writer: bool) -> int:
    """Delete a version's folder; returns the number of files. It may be interrupted at any time, and run again.

    1. `_archive.json` says that the version is being deleted: no run of it starts any more, and none publishes.
    2. The pointer is changed without moving it: a publication that looked before step 1 loses its swap, and looks again.
    3. The marks of success go, so that nobody can roll back to a run of it; then the runs, then everything else.
    4. `_archive.json` goes last: until then a half-deleted version is never taken for a complete one.
    """
    folder = output.at(version)
    find_deletable(output, version)
    mark_deleting(folder, True)
    try:
        hold_pointer(output, version, single_writer=single_writer)
    except UsageError:
        mark_deleting(folder, False)
        raise
    paths = folder.list()["path"].to_pylist()
    paths = sorted((path for path in paths if path != ARCHIVE_NAME), key=deletion_order)
    for start in range(0, len(paths), DELETE_BATCH):
        folder.delete_all(paths[start : start + DELETE_BATCH])
        on_progress(min(len(paths), start + DELETE_BATCH), len(paths))
    left: Sequence[str] = [path for path in folder.list()["path"].to_pylist() if path != ARCHIVE_NAME]
    if left:
        raise IncompleteError(
            f"{folder.url}: {len(left):,} files appeared while it was deleted (first: {left[0]}): a run of this version is still"
            " writing; stop it and run the same command again"
        )
    folder.delete(ARCHIVE_NAME)
    folder.remove_folder()
    return len(paths) + 1


def mark_deleting(folder: Store, deleting: bool) -> None:
    """Say in `_archive.json` that the version is being deleted, or that it is not; what else it says stays."""
    record = {key: value for key, value in read_json(folder, ARCHIVE_NAME).items() if key != DELETING}
    folder.replace(ARCHIVE_NAME, json.dumps(record | ({DELETING: stamp(now())} if deleting else {}), indent=2).encode())


def deletion_order(path: str) -> tuple[int, str]:
    """Marks of success first, then the other files of runs, then everything else."""
    return (0 if path.endswith("/_SUCCESS") else 1 if path.startswith("_runs/") else 2), path


def hold_pointer(output: Store, version: str, *, single_writer: bool) -> None:
    """Change the pointer without moving it. Raises `UsageError` if it has come to name this version."""
    for _ in range(20):
        raw = refuse_published(output, version)
        pointer = parse_pointer(output, raw)
        if pointer is None or single_writer:
            return
        held = pointer.model_copy(update={"guard": f"{version} deleted {stamp(now())}"})
        if output.swap(POINTER_NAME, raw, held.model_dump_json(indent=2).encode()):
            return
    raise IncompleteError(f"{output.url}/{POINTER_NAME} is changed all the time by others; run the same command again")
