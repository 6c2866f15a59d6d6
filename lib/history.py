"""Earlier runs of a version, as their `run.json` tells of them: those beside which a run is shown, and the one it is compared with."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lib.errors import UsageError, nearest
from lib.publishing import Pointer
from lib.storage import Store, open_store

LAST = "last"

SHOWN_RUNS = 6
"""Earlier runs in a report."""

READERS = 8
"""Threads that read small files."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The run that new rows are compared with."""

    name: str
    """its id, or the path it was read from"""
    counts: Mapping[str, Any] | None
    """of the rows that were new then, see `Tally.record`; None if there are none to compare with"""
    why_not: str = ""
    """why there are none"""


def find_baseline(version: Store, choice: str, last: Pointer | None) -> Baseline:
    """Read the counts of the run that `drift.baseline` names.

    Raises `UsageError` if a run that was named is not there or has no counts; the last one may well be without.
    """
    if choice == LAST:
        if last is None:
            return Baseline(name=LAST, counts=None, why_not="no run of this version is published yet")
        counts = counts_of(read_run(version.at(f"_runs/{last.run}")))
        why_not = "" if counts else f"run {last.run} has no new rows, or its run.json is gone"
        return Baseline(name=last.run, counts=counts, why_not=why_not)
    if "/" in choice or choice.endswith(".json"):
        folder, _, name = choice.rpartition("/")
        raw = open_store(folder or ".").read(name)
        if raw is None:
            raise UsageError(f"drift.baseline {choice}: there is no such file; expected the run.json of a scoring run")
        record = parse(raw)
    else:
        record = read_run(version.at(f"_runs/{choice}"))
        if record is None:
            known = sorted(version.at("_runs").folders())
            raise UsageError(
                f"drift.baseline {choice}: {version.url}/_runs/{choice}/run.json is not there{nearest(choice, known)} (runs of this"
                f" version: {', '.join(known[-10:]) or 'none'}); name one of them, a path to a run.json, or {LAST}"
            )
    counts = counts_of(record)
    if counts is None:
        raise UsageError(
            f"drift.baseline {choice}: not the run.json of a scoring run with new rows; name a run that scored some"
        )
    return Baseline(name=choice, counts=counts)


def recent_runs(version: Store, but: str) -> list[dict[str, Any]]:
    """The records of the latest runs of a version that had new rows, the latest first; `but` is the run that asks."""
    listed = version.list("_runs").to_pylist()
    found = [one for one in listed if one["path"].endswith("/run.json") and one["path"] != f"_runs/{but}/run.json"]
    found.sort(key=lambda one: (one["mtime_ns"] or 0, one["path"]), reverse=True)
    with ThreadPoolExecutor(READERS) as pool:
        records = list(pool.map(lambda one: parse(version.read(one["path"])), found[: 2 * SHOWN_RUNS]))
    return [one for one in records if one and counts_of(one)][:SHOWN_RUNS]


def read_run(folder: Store) -> dict[str, Any] | None:
    """The record of one run, None if it has none."""
    return parse(folder.read("run.json"))


def parse(raw: bytes | None) -> dict[str, Any] | None:
    """A `run.json`, None if it is none."""
    try:
        record = json.loads(raw or b"null")
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def counts_of(record: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What a run's new rows were like, if it had any; older records have what that run itself wrote."""
    if record is None:
        return None
    counts = record.get("new_rows", record.get("this_run"))
    is_tally = isinstance(counts, dict) and {"rows", "labels", "errors", "score_bins", "abstained"} <= counts.keys()
    return counts if is_tally and counts["rows"] else None
