"""Earlier runs of a version: those beside which a run is shown, by their `run.json`, and the one it is compared with."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lib.errors import UsageError, nearest, say
from lib.publishing import Published
from lib.storage import Store, open_store
from lib.versions import READERS, VERSION, read_json

LAST = "last"

NOTHING_YET = "no run of this version is published yet"

COUNTS_KEY = b"textsweep.new_rows"
"""Key-value metadata of a manifest: a run and what its new rows were like, as JSON. A `run.json` is written anew whenever its
run is executed again, one that was refused too; what the pointer names is written once."""

SHOWN_RUNS = 6
"""Earlier runs in a report."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The run that new rows are compared with."""

    name: str
    """its id, or the path it was read from"""
    counts: Mapping[str, Any] | None
    """of the rows that were new then, see `Tally.record`; None if there are none to compare with"""
    why_not: str = ""
    """why there are none"""


def with_counts(manifest: pa.Table, run_id: str, new: Mapping[str, Any], before: pa.Table) -> pa.Table:
    """A manifest that keeps what the new rows of its run were like; of a run without any, what the manifest before it keeps."""
    kept = (
        json.dumps({"run": run_id, "new_rows": dict(new)}, sort_keys=True).encode()
        if new["rows"]
        else kept_counts(before.schema.metadata)
    )
    return manifest.replace_schema_metadata({COUNTS_KEY: kept} if kept else None)


def kept_counts(metadata: Mapping[bytes, bytes] | None) -> bytes | None:
    """What `with_counts` has put into a manifest's metadata; None in older ones."""
    return (metadata or {}).get(COUNTS_KEY)


def find_baseline(version: Store, choice: str, last: Published | None) -> Baseline:
    """Find the counts of the run that `drift.baseline` names.

    Raises `UsageError` if a run that was named is not there or has no counts; the last one may well be without.
    """
    if choice == LAST:
        return last_baseline(version, last)
    if "/" in choice or choice.endswith(".json"):
        folder, _, name = choice.rpartition("/")
        record = read_json(open_store(folder or "."), name)
        if not record:
            raise UsageError(
                f"drift.baseline {choice}: there is no such file, or nothing in it; expected the run.json of a scoring run"
            )
    else:
        record = read_json(version.at(f"_runs/{choice}"), "run.json")
        if not record:
            known = sorted(version.at("_runs").folders())
            raise UsageError(
                f"drift.baseline {choice}: {version.url}/_runs/{choice}/run.json is not there{nearest(choice, known)} (runs of"
                f" this version: {', '.join(known[-10:]) or 'none'}); name one of them, a path to a run.json, or {LAST}"
            )
    counts = counts_of(record)
    if counts is None:
        raise UsageError(
            f"drift.baseline {choice}: not the run.json of a scoring run with new rows; name a run that scored some"
        )
    return Baseline(name=choice, counts=counts)


def last_baseline(version: Store, last: Published | None) -> Baseline:
    """The latest successful run of a version that had new rows, as the last manifest tells; if that is an old one, as `run.json` does."""
    if last is None:
        return Baseline(name=LAST, counts=None, why_not=NOTHING_YET)
    if (raw := kept_counts(last.metadata)) is not None:
        kept = json.loads(raw)
        return Baseline(name=kept["run"], counts=kept["new_rows"])
    mine = read_json(version.at(f"_runs/{last.pointer.run}"), "run.json")
    for record in (mine, *latest_records(version, 2 * SHOWN_RUNS)):
        if record.get("exit_code") == 0 and (counts := counts_of(record)):
            name = str(record.get("run_id"))
            say(
                f"WARNING: drift: {last.pointer.manifest} keeps no counts, it is an old one; those in run.json of {name} are taken"
            )
            return Baseline(name=name, counts=counts)
    why = f"{last.pointer.manifest} keeps no counts, and no run.json of a successful run with new rows is there"
    return Baseline(name=last.pointer.run, counts=None, why_not=why)


def recent_runs(version: Store, but: str) -> list[dict[str, Any]]:
    """The records of the latest runs of a version that had new rows, the latest first; `but` is the run that asks."""
    found = [one for one in latest_records(version, 2 * SHOWN_RUNS, but) if counts_of(one)]
    return found[:SHOWN_RUNS]


def latest_records(version: Store, most: int, but: str | None = None) -> list[dict[str, Any]]:
    """`run.json` of a version's latest runs, the latest first, but for one."""
    return read_records(version, [path for _, path in list_records(version) if path != f"_runs/{but}/run.json"][:most])


def records_by_version(output: Store, but: str, most: int) -> Iterator[list[dict[str, Any]]]:
    """The same of each version of an output folder but one, the version with the latest run first; read when they are asked for."""
    versions = [output.at(name) for name in output.folders() if VERSION.fullmatch(name) and name != but]
    with ThreadPoolExecutor(READERS) as pool:
        listed = zip(pool.map(list_records, versions), versions, strict=True)
    for records, version in sorted(
        ((found, one) for found, one in listed if found), key=lambda one: one[0][0], reverse=True
    ):
        yield read_records(version, [path for _, path in records[:most]])


def read_records(version: Store, paths: Sequence[str]) -> list[dict[str, Any]]:
    """Some of a version's small JSON files, in order."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda path: read_json(version, path), paths))


def list_records(version: Store) -> list[tuple[int, str]]:
    """When each `run.json` of a version was written, in nanoseconds, and its path, the latest first."""
    listed = version.list("_runs").to_pylist()
    return sorted(
        ((one["mtime_ns"] or 0, one["path"]) for one in listed if one["path"].endswith("/run.json")), reverse=True
    )


def counts_of(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a run's new rows were like, if it had any; older records have what that run itself wrote."""
    counts = record.get("new_rows", record.get("this_run"))
    is_tally = isinstance(counts, dict) and {"rows", "labels", "errors", "score_bins", "abstained"} <= counts.keys()
    return counts if is_tally and counts["rows"] else None
