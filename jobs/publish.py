"""Look at what was published, check it, move readers back to an earlier run, delete a version.

    list                                every version and run: what readers see, when it was planned, how it ended, what it holds
    verify   [--run RUN]                reopen every object of the published manifest, or of another successful run's
    rollback --run RUN                  move the pointer to another successful run whose objects are all there
    delete   --version VERSION --yes    delete a whole version that is not published; without --yes say what would go

Reads   <output.path>/_published.json and <output.path>/<version>/; verify reads every prediction.
Writes  rollback: the pointer, by compare-and-swap. delete: removes <output.path>/<version>/. Nothing else.

    python -m jobs.publish list --set output.path=s3://bucket/scores
    python -m jobs.publish verify --set output.path=s3://bucket/scores --json
    python -m jobs.publish rollback --run 2026-11-19 --set output.path=s3://bucket/scores

A rollback holds against every run that was planned before it, also one that is still going. The next run of jobs.score that
is planned after it publishes again, as always: stop the schedule, or repair what was wrong, before its next night. To go
forward again, roll "back" to the later run.

A deletion that was interrupted is finished by the same command; until then the version is neither scored nor published.

Exit codes: 0 done; 2 the command is wrong, or what it asks for is refused; 4 storage failed, or verify found something that is
not as the manifest says: objects were lost or damaged after they were published (delete the damaged ones, run jobs.score again,
and it writes the same scores); 5 stopped on request; 1 a bug.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow.compute as pc

from lib import publishing, versions
from lib.config import parse_command
from lib.errors import IncompleteError, UsageError, run_job, stop_on_signals
from lib.score_config import PublishConfig
from lib.storage import Store, open_store
from lib.verification import verify

TAKES = {"list": set(), "verify": {"run", "version"}, "rollback": {"run", "version"}, "delete": {"version"}}
NEEDS = {"list": set(), "verify": set(), "rollback": {"run"}, "delete": {"version"}}
"""Which of --run and --version an action takes, and which it needs."""

PROGRESS_SECONDS = 5

MESSAGE_LETTERS = 80
"""Of a run's message in the table; all of it is in --json."""


def main(argv: Sequence[str]) -> None:
    """Do one thing to what was published."""
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument(
        "action", choices=list(TAKES), metavar="ACTION", help="list, verify, rollback or delete, see above"
    )
    extra.add_argument("--run", metavar="RUN", help="verify, rollback: the name of a successful run, as list shows it")
    extra.add_argument(
        "--version", metavar="VERSION", help="delete: the version; with --run: needed if several versions have that run"
    )
    extra.add_argument("--yes", action="store_true", help="delete: really")
    extra.add_argument("--json", action="store_true", help="list, verify: one JSON object on standard output")
    command = parse_command(PublishConfig, argv, prog="jobs.publish", description=__doc__ or "", extra=extra)
    arguments, config = command.arguments, command.config.output
    check_arguments(arguments)
    stop_on_signals()

    output = open_store(config.path)
    if arguments.action == "list":
        show_list(output, arguments.json)
    elif arguments.action == "verify":
        verify_run(output, arguments.run, arguments.version, arguments.json)
    elif arguments.action == "rollback":
        before, after = versions.roll_back(output, arguments.run, arguments.version, single_writer=config.single_writer)
        print(
            f"before: {describe(before)}\nafter:  {describe(after)}{' (nothing was changed)' if before == after else ''}"
        )
    else:
        delete(output, arguments.version, arguments.yes, single_writer=config.single_writer)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise `UsageError` for options that an action does not take, or needs."""
    action = arguments.action
    given = {name for name in ("run", "version") if getattr(arguments, name) is not None}
    if missing := NEEDS[action] - given:
        raise UsageError(f"{action} needs --{missing.pop()}; `list` shows the names")
    if unknown := given - TAKES[action]:
        raise UsageError(f"{action} does not take --{unknown.pop()}")
    if arguments.yes and action != "delete":
        raise UsageError(f"{action} does not take --yes")


def describe(pointer: publishing.Pointer | None) -> str:
    """What readers see, in one line."""
    return f"run {pointer.run} of version {pointer.version}, {pointer.manifest}" if pointer else "nothing was published"


def show_list(output: Store, as_json: bool) -> None:
    """Print every run as a table, or as JSON."""
    runs = versions.list_runs(output)
    pointer = versions.read_pointer(output)
    if as_json:
        shown = pointer.model_dump() if pointer else None
        print(json.dumps({"output": output.url, "pointer": shown, "runs": [asdict(one) for one in runs]}, indent=2))
        return
    header = ("", "version", "run", "planned (UTC)", "state", "code", "rows", "shards", "errors", "MB", "message")
    lines = [header, *(table_line(one) for one in runs)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = (
            cell.rjust(width) if 5 <= column <= 9 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
    print(f"{len(runs):,} runs below {output.url}; * is what readers see: {describe(pointer)}")


def table_line(one: versions.RunSummary) -> tuple[str, ...]:
    """One run's cells."""
    numbers = [one.rows, one.shards, one.errors, None if one.bytes is None else round(one.bytes / 1e6)]
    message = one.message if len(one.message) <= MESSAGE_LETTERS else f"{one.message[: MESSAGE_LETTERS - 1]}…"
    return (
        "*" if one.state == "published" else "",
        one.version,
        one.run or "-",
        (one.planned_at or "-")[:19].replace("T", " "),
        one.state,
        "-" if one.exit_code is None else str(one.exit_code),
        *("-" if number is None else f"{number:,}" for number in numbers),
        message.replace("\n", " "),
    )


def verify_run(output: Store, run: str | None, version: str | None, as_json: bool) -> None:
    """Reopen a manifest's objects; raises `IncompleteError` if anything is not as it says."""
    pointer = versions.find_success(output, run, version)
    manifest = versions.read_manifest(output, pointer)
    started = shown = time.monotonic()

    def show(done: int, total: int, violations: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= PROGRESS_SECONDS and done < total:
            shown = now
            left = (now - started) / done * (total - done)
            print(
                f"verifying: {done:,} of {total:,} objects, {violations:,} violations, about {left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    violations = verify(output, manifest, show)
    totals: dict[str, Any] = publishing.totals(manifest)
    if as_json:
        result = {"output": output.url, "version": pointer.version, "run": pointer.run, "manifest": pointer.manifest}
        print(json.dumps({**result, **totals, "violations": [asdict(one) for one in violations]}, indent=2))
    else:
        for one in violations:
            print(f"{one.path}: {one.problem}")
    if violations:
        guilty = len({one.path for one in violations})
        raise IncompleteError(
            f"{output.url}/{pointer.manifest}: {len(violations):,} violations in {guilty:,} of {manifest.num_rows:,} objects; delete"
            " the damaged ones and run jobs.score again, or roll back to a run that verifies"
        )
    if not as_json:
        print(
            f"verified: run {pointer.run} of version {pointer.version}: {totals['objects']:,} objects, {totals['rows']:,} rows,"
            f" {totals['bytes'] / 1e6:,.1f} MB, no violation"
        )


def delete(output: Store, version: str, yes: bool, *, single_writer: bool) -> None:
    """Delete a version, or say what would go."""
    listing = versions.find_deletable(output, version)
    what = f"{listing.num_rows:,} files, {(pc.sum(listing['size']).as_py() or 0) / 1e6:,.1f} MB"
    if not yes:
        raise UsageError(f"{output.url}/{version}: {what} would be deleted for good; nothing was; add --yes to do it")
    shown = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= PROGRESS_SECONDS and done < total:
            shown = time.monotonic()
            print(f"deleting: {done:,} of {total:,} files", file=sys.stderr, flush=True)

    number = versions.delete_version(output, version, show, single_writer=single_writer)
    print(f"deleted: {output.url}/{version}, {number:,} files ({what} when it was listed)")


if __name__ == "__main__":
    sys.exit(run_job(main))
