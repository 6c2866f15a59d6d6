"""How a scoring run ends: what was done, whether readers get to see it, its report, and what nobody needs any more."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lib import drift, publishing
from lib.archive import find_root, list_shards
from lib.atomicity import remove_unfinished
from lib.cost import Meter, Usage, budget_spent
from lib.errors import ExitCode, IncompleteError, OverLimitError, StoppedError, TextsweepError, say
from lib.history import with_counts
from lib.outcome import Outcome
from lib.planning import find_kept, find_stale, over_limit, parse_objects, split_finished, with_identities, with_names
from lib.report import RunFacts, run_record, write_report
from lib.schema import DEAD_LETTER_SCHEMA
from lib.scoring import Run

SHOWN_BAD_SHARDS = 5

REPORT_SECONDS = 10.0
"""For the report of a run that is broken off; a stopped job has 40 s in all."""


def find_current(run: Run, objects: pa.Table, finished: pa.Table) -> pa.Table:
    """The objects that readers should see: those of every finished shard, and of deleted ones if they are kept."""
    keep = finished.select(["path", "identity"]).rename_columns(["shard", "identity"])
    current = objects.join(keep, ["shard", "identity"], join_type="inner")
    if run.config.input.deleted == "remove" or run.last is None:
        return current
    return pa.concat_tables([current, find_kept(run.last.shards, run.shards, objects).select(current.column_names)])


def reconcile(run: Run, outcome: Outcome) -> pa.Table:
    """List the output again and make the manifest of all that is complete now."""
    objects = parse_objects(run.job.output.list()["path"])
    finished, _ = split_finished(run.shards, objects)
    current = find_current(run, objects, finished)
    return publishing.build_manifest(
        run.job.version, run.run_id, with_names(current), outcome.written(), run.before, run.output, outcome.found.count
    )


def judge(run: Run, outcome: Outcome, manifest: pa.Table) -> TextsweepError | None:
    """Whether the run may be published: every planned row accounted for, and bad rows and shards within the limits."""
    if outcome.over_budget is not None:
        left = find_left(run, outcome, manifest)
        if left.num_rows or outcome.finished_rows != outcome.planned_rows:
            made = manifest.join(run.before.select(["path"]), "path", join_type="left anti")
            return budget_spent(outcome.over_budget, run.unfinished.num_rows, left, made.num_rows)
    problems = []
    if outcome.missing:
        problems.append(
            f"{len(outcome.missing)} objects are missing after two attempts ({', '.join(outcome.missing[:3])})"
        )
    if outcome.changed:
        changed = sorted(outcome.changed)
        problems.append(f"{len(changed)} shards changed while they were scored ({', '.join(changed[:3])})")
    if not problems and outcome.finished_rows != outcome.planned_rows:
        problems.append(f"{outcome.planned_rows:,} rows were planned, {outcome.finished_rows:,} are in objects")
    finished = run.finished.select(["path", "identity"]).rename_columns(["shard", "identity"])
    gone = finished.join(manifest.select(["shard", "identity"]), ["shard", "identity"], join_type="left anti")
    if gone.num_rows:
        problems.append(
            f"{gone.num_rows:,} shards had all their objects when the run began and have not any more (first: {gone['shard'][0]})"
        )
    if problems:
        reported = f"; reported: {'; '.join(outcome.counts.failures)}" if outcome.counts.failures else ""
        return IncompleteError(f"{'; '.join(problems)}{reported}; what is finished is kept, run the same command again")
    limits = run.config.limits
    fresh = manifest.join(run.before.select(["path"]), "path", join_type="left anti")
    counted = fresh.filter(pc.invert(pc.is_in(fresh["identity"], pa.array(limits.accept, pa.string()))))
    rows, bad_rows = (int(pc.sum(column).as_py() or 0) for column in (fresh["rows"], counted["errors"]))
    if over_limit(bad_rows, rows, limits.max_bad_rows):
        worst = counted.group_by(["shard", "identity"]).aggregate([("errors", "sum")])
        worst = worst.sort_by([("errors_sum", "descending"), ("shard", "ascending")]).slice(0, 1).to_pylist()[0]
        return OverLimitError(
            f"{bad_rows:,} of {rows:,} new rows have an error (most: {worst['errors_sum']:,} in {worst['shard']}),"
            f" limits.max_bad_rows = {limits.max_bad_rows}; not published; see {run.job.output.url}/_dead_letter, then repair"
            f' the shards, raise the limit, or accept them (limits.accept = ["{worst["identity"]}"]), and run the same command again'
        )
    bad = find_bad(run, outcome)
    counted_bad = [one for one in bad if one["identity"] not in limits.accept]
    new_shards = pc.count_distinct(fresh["shard"]).as_py() + len(bad)
    if over_limit(len(counted_bad), new_shards, limits.max_bad_shards):
        first = counted_bad[0]
        return OverLimitError(
            f"{len(counted_bad):,} of {new_shards:,} new shards cannot be read (first: {first['shard']}: {first['error']}),"
            f" limits.max_bad_shards = {limits.max_bad_shards}; not published; repair them, raise the limit, or go on without them"
            f' (limits.accept = ["{first["identity"]}"]), and run the same command again'
        )
    return None


def find_left(run: Run, outcome: Outcome, manifest: pa.Table) -> pa.Table:
    """The shards that were to do and still miss an object; bad ones, which never get any, are left out."""
    bad = pa.array(outcome.bad_shards, pa.string())
    made = manifest.select(["shard", "identity"])
    left = run.unfinished.join(made, ["path", "identity"], ["shard", "identity"], join_type="left anti")
    return left.filter(pc.invert(pc.is_in(left["path"], bad)))


def find_bad(run: Run, outcome: Outcome) -> list[dict[str, str]]:
    """The bad shards of a run, sorted: shard, identity, error."""
    names = pa.array(sorted(outcome.bad_shards), pa.string())
    found = run.shards.filter(pc.is_in(run.shards["path"], names)).select(["path", "identity"]).to_pylist()
    return [
        {"shard": one["path"], "identity": one["identity"], "error": outcome.bad_shards[one["path"]]}
        for one in sorted(found, key=lambda one: one["path"])
    ]


def write_letters(run: Run, outcome: Outcome) -> None:
    """Write the dead letters of bad shards, one file each."""
    for one in find_bad(run, outcome):
        letter = pa.Table.from_pylist([{**one, "row": None}], schema=DEAD_LETTER_SCHEMA)
        # Never by its own name: a bad shard may be one because no file can be called so, or because it leads elsewhere.
        letter_name = f"_dead_letter/shard-{sha256(one['shard'].encode()).hexdigest()[:12]}-{one['identity']}.parquet"
        publishing.write_table(run.job.output, letter_name, letter)


def conclude(run: Run, outcome: Outcome, manifest: pa.Table, cluster: str, meter: Meter | None = None) -> None:
    """Write the run's report and manifest, publish it if it may be, and say where everything is. Raises what `judge` found."""
    new, allowed = outcome.plus(outcome.found), run.config.drift.max_psi
    shifts = drift.compare(new.record(), run.baseline.counts, run.job.schema.heads)
    problem = judge(run, outcome, manifest)
    problem = problem or drift.judge(shifts, allowed, run.baseline, new.finished_rows, run.run_id)
    folder = run.job.output.at(f"_runs/{run.run_id}")
    published = False
    write_letters(run, outcome)
    if problem is None:
        name = publishing.write_manifest(folder, with_counts(manifest, run.run_id, new.record(), run.before))
        single = run.config.output.single_writer
        published = publishing.publish(
            run.output, run.job.version, run.run_id, run.planned_at, name, single_writer=single
        )
    if published and run.selection is None and not find_root(run.config.input.path)[1]:
        sweep_quietly(run, manifest, name)
    totals = publishing.totals(manifest)
    scored = (
        f"{totals['rows']:,} rows of {totals['shards']:,} shards are scored, {totals['errors']:,} of them with an error"
    )
    message = str(problem or scored)
    facts = facts_of(
        run,
        outcome,
        cluster,
        meter,
        exit_code=problem.exit_code if problem else ExitCode.DONE,
        message=message,
        published=published,
        totals=totals,
        new_rows=new,
        baseline=run.baseline,
        shifts=shifts,
    )
    write_report(run.job.output, run.run_id, run_record(facts))
    print(f"report: {folder.url}/report.html", flush=True)
    print(drift.remarks(shifts, allowed, run.baseline.why_not), end="", flush=True)
    for shard, why in sorted(outcome.bad_shards.items())[:SHOWN_BAD_SHARDS]:
        print(f"bad shard {shard!r}: {why}; the next run tries it again", flush=True)
    if len(outcome.bad_shards) > SHOWN_BAD_SHARDS:
        print(f"{len(outcome.bad_shards) - SHOWN_BAD_SHARDS:,} more bad shards are in the report", flush=True)
    if problem:
        raise problem
    pointer = "" if published else " (not moved: a run planned later is published)"
    print(
        f"done: {message}\npredictions: {run.job.output.url}\nmanifest: {folder.url}/{name}; pointer: {run.output.url}/{publishing.POINTER_NAME}{pointer}"
    )


def facts_of(run: Run, outcome: Outcome, cluster: str, meter: Meter | None, **how_it_ended: Any) -> RunFacts:
    """What a run's report says, given how the run ended."""
    return RunFacts(
        run_id=run.run_id,
        version=run.job.version,
        config=run.config,
        started_at=run.planned_at,
        model_digest=run.job.model_digest,
        usage=meter.count() if meter else Usage(),
        outcome=outcome,
        cluster=cluster,
        heads=run.job.schema.heads,
        seconds_planning=outcome.course.began - run.begun,
        **how_it_ended,
    )


@contextmanager
def reported(run: Run, outcome: Outcome, cluster: str, meter: Meter | None) -> Iterator[None]:
    """Write the report of a run that is broken off inside, as far as it came: stopped, without its storage or cluster, by a bug.

    That it cannot be written, or not in time, is said and changes nothing.
    """
    try:
        yield
    except (Exception, StoppedError) as error:
        writer = threading.Thread(target=report_broken_off, args=(run, outcome, error, cluster, meter), daemon=True)
        writer.start()
        writer.join(REPORT_SECONDS)
        if writer.is_alive():
            say(f"WARNING: the run has no report: {run.job.output.url} has not taken it in {REPORT_SECONDS:g} s")
        raise


def report_broken_off(run: Run, outcome: Outcome, error: BaseException, cluster: str, meter: Meter | None) -> None:
    """Write the report of a run that ended before its work did, unless a run of that id has succeeded: its report stays."""
    folder = run.job.output.at(f"_runs/{run.run_id}")
    outcome.close_wave()
    facts = facts_of(
        run,
        outcome,
        cluster,
        meter,
        exit_code=getattr(error, "exit_code", ExitCode.BUG),
        message=str(error) if isinstance(error, TextsweepError | StoppedError) else f"{type(error).__name__}: {error}",
        published=False,
        totals={},
        new_rows=outcome.plus(outcome.found),
        baseline=replace(run.baseline, counts=None, why_not="the run did not come to its end"),
        shifts=[],
    )
    try:
        if folder.info("_SUCCESS") is None:
            write_report(run.job.output, run.run_id, run_record(facts))
            say(f"report: {folder.url}/report.html")
    except (TextsweepError, OSError) as problem:
        say(f"WARNING: the run has no report: {problem}")


def sweep_quietly(run: Run, manifest: pa.Table, name: str) -> None:
    """Sweep; what fails here has cost no row and is done by the next run."""
    try:
        print(sweep(run, manifest, name), end="", flush=True)
    except (TextsweepError, OSError) as error:
        print(f"WARNING: stale objects were left for the next run: {error}", flush=True)


def sweep(run: Run, manifest: pa.Table, name: str) -> str:
    """Remove the objects that nobody can need any more, and record the stale ones that stay; says what was removed.

    An object is removed if its shard is changed or removed according to the manifest and to a listing of the archive made
    now, since `output.keep_stale_hours` at least, and if it is older than this run's plan. The time is the storage's own.
    """
    folder = run.job.output.at(f"_runs/{run.run_id}")
    written = folder.info(name)
    assert written is not None
    assert written.mtime_ns is not None
    now_ns = written.mtime_ns
    remove_unfinished(run.output, now_ns)
    _, listing = list_shards(run.config.input.path)
    listed = (
        with_identities(listing, run.job.chunk_bytes).select(["path", "identity"]).rename_columns(["shard", "identity"])
    )
    planned = run.shards.select(["path", "identity"]).rename_columns(["shard", "identity"])
    current = pa.concat_tables([manifest.select(["shard", "identity"]), listed, planned])
    objects = run.job.output.list()
    stale = find_stale(objects, current, publishing.read_stale(run.output, run.published, run.job.version), now_ns)
    old = objects.filter(
        pc.less(objects["mtime_ns"], now_ns - int((datetime.now(UTC) - run.planned_at).total_seconds() * 1e9))
    )
    due = pc.and_(
        pc.less_equal(stale["since_ns"], now_ns - int(run.config.output.keep_stale_hours * 3_600e9)),
        pc.is_in(stale["path"], old["path"].combine_chunks()),
    )
    removed = stale.filter(due)["path"].to_pylist()
    shown = publishing.read_published(run.output)
    if shown is None or shown.pointer.manifest != f"{run.job.version}/_runs/{run.run_id}/{name}":
        return "stale objects were left: readers were moved to another run meanwhile\n"
    run.job.output.delete_all(removed)
    left = stale.filter(pc.invert(due)).group_by(["shard", "identity"]).aggregate([("since_ns", "min")])
    if left.num_rows:
        publishing.write_table(folder, publishing.STALE_NAME, left.rename_columns(["shard", "identity", "since_ns"]))
    return f"removed {len(removed):,} stale objects of changed or deleted shards\n" if removed else ""
