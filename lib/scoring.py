"""A scoring run around the pipeline: what is to do, what was done, and whether readers get to see it."""

from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from lib import checkpoint, publishing
from lib.archive import Columns, list_shards, refuse_output_inside, resolve_columns
from lib.blocks import ScoreJob
from lib.config import ScoreConfig
from lib.errors import ExitCode, IncompleteError, OverLimitError, TextsweepError, UsageError
from lib.pipeline import Outcome
from lib.planning import over_limit, parse_objects, split_finished, with_identities
from lib.report import RunFacts, run_record, write_report
from lib.schema import PredictionSchema
from lib.storage import Store, open_store


@dataclass(frozen=True, kw_only=True)
class Run:
    """A planned run."""

    config: ScoreConfig
    run_id: str
    planned_at: datetime
    output: Store
    """the folder of all versions"""
    job: ScoreJob
    shards: pa.Table
    """the archive as listed: path, size, etag, mtime_ns, identity"""
    unfinished: pa.Table
    """those shards that miss an object"""
    finished: pa.Table
    """the others, with their number of chunks"""
    published: publishing.Published | None

    @property
    def is_published(self) -> bool:
        """Whether readers already see exactly what this run could give them."""
        return (
            not self.unfinished.num_rows
            and self.published is not None
            and self.published.covers(self.job.version, self.finished)
        )

    def plan(self) -> str:
        """What there is to do, in one line."""
        size = int(pc.sum(self.unfinished["size"]).as_py() or 0) / 1e6
        return (
            f"{self.job.archive.url}: {self.shards.num_rows:,} shards, {self.finished.num_rows:,} finished,"
            f" {self.unfinished.num_rows:,} to do ({size:,.1f} MB); version {self.job.version}, run {self.run_id}"
        )

    def nothing_to_do(self) -> str:
        """Say where the results are."""
        assert self.published
        pointer = self.published.pointer
        return f"nothing to do: run {pointer.run} published exactly these shards; manifest: {self.output.url}/{pointer.manifest}"

    def start(self) -> None:
        """Make the first writes: is the output writable, and does this version belong to this archive?"""
        self.output.check_writable()
        publishing.fix_archive(self.job.output, self.job.archive.url, self.job.columns.keys)


def prepare(config: ScoreConfig, run_id: str) -> Run:
    """Plan a run from listings alone: no finished object is opened, nothing is written, no weights are loaded.

    Raises `UsageError` for everything that a user can get wrong.
    """
    planned_at = datetime.now(UTC)
    output = open_store(config.output.path)
    refuse_output_inside(config.input.path, output)
    archive, listing = list_shards(config.input.path)
    columns = resolve_columns(archive, listing["path"].to_pylist(), config.input.text_column, config.input.key_columns)
    model = checkpoint.load(config.model.path, config.model.max_length, config.model.trust)
    version = checkpoint.version_of(model, config)
    keys = publishing.read_archive(output.at(version), archive.url, columns.keys)
    schema = PredictionSchema(
        task=model.facts.task,
        labels=model.card.labels,
        prefix=config.output.prefix,
        probabilities=config.output.probabilities,
        keys=columns.keys if keys is None else keys,
    )
    if schema.clashes():
        raise UsageError(
            f"{', '.join(schema.clashes())}: a key column and a column that scoring adds; set output.prefix, for example output.prefix=pred_"
        )
    shards = with_identities(listing, chunk_bytes := int(config.planning.chunk_mb * 2**20))
    finished, unfinished = split_finished(shards, parse_objects(output.at(version).list()["path"]))
    job = ScoreJob(
        archive=archive,
        output=output.at(version),
        version=version,
        columns=Columns(text=columns.text, keys=schema.keys, bad_texts=config.output.dead_letter_text),
        schema=schema,
        model_url=config.model.path,
        model_digest=model.digest,
        trust=model.trust,
        max_length=model.card.max_length,
        thresholds=model.card.thresholds,
        precision=config.model.precision,
        token_budget=config.resources.token_budget,
        chunk_bytes=chunk_bytes,
    )
    return Run(
        config=config,
        run_id=run_id,
        planned_at=planned_at,
        output=output,
        job=job,
        shards=shards,
        unfinished=unfinished,
        finished=finished,
        published=publishing.read_published(output),
    )


def reconcile(run: Run, outcome: Outcome) -> pa.Table:
    """List the output again and make the manifest of every shard that is complete now."""
    objects = parse_objects(run.job.output.list()["path"])
    finished, _ = split_finished(run.shards, objects)
    return publishing.build_manifest(
        run.job.version, run.run_id, finished, objects, outcome.results, run.published, run.output
    )


def judge(run: Run, outcome: Outcome, manifest: pa.Table) -> TextsweepError | None:
    """Whether the run may be published: every planned row accounted for, and bad rows and shards within the limits."""
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
    if problems:
        reported = f"; reported: {'; '.join(outcome.counts.failures)}" if outcome.counts.failures else ""
        return IncompleteError(f"{'; '.join(problems)}{reported}; what is finished is kept, run the same command again")
    known = set(run.published.manifest["path"].to_pylist()) if run.published else set()
    fresh = [
        row for row in manifest.select(["path", "shard", "rows", "errors"]).to_pylist() if row["path"] not in known
    ]
    rows, bad_rows = sum(row["rows"] for row in fresh), sum(row["errors"] for row in fresh)
    limits = run.config.limits
    if over_limit(bad_rows, rows, limits.max_bad_rows):
        return OverLimitError(
            f"{bad_rows:,} of {rows:,} new rows have an error, limits.max_bad_rows = {limits.max_bad_rows}; not published; see"
            f" {run.job.output.url}/_dead_letter, then raise the limit or repair the shards, and run the same command again"
        )
    new_shards = len({row["shard"] for row in fresh}) + len(outcome.bad_shards)
    if over_limit(len(outcome.bad_shards), new_shards, limits.max_bad_shards):
        name, why = next(iter(outcome.bad_shards.items()))
        return OverLimitError(
            f"{len(outcome.bad_shards):,} of {new_shards:,} new shards cannot be read (first: {name}: {why}), limits.max_bad_shards ="
            f" {limits.max_bad_shards}; not published; repair them or raise the limit, and run the same command again"
        )
    return None


def conclude(run: Run, outcome: Outcome, manifest: pa.Table, cluster: str) -> None:
    """Write the run's report and manifest, publish it if it may be, and say where everything is. Raises what `judge` found."""
    problem = judge(run, outcome, manifest)
    folder = run.job.output.at(f"_runs/{run.run_id}")
    published = False
    publishing.write_manifest(folder, manifest)
    if problem is None:
        published = publishing.publish(run.output, run.job.version, run.run_id, run.planned_at)
    totals = publishing.totals(manifest)
    message = (
        str(problem)
        if problem
        else f"{totals['rows']:,} rows of {totals['shards']:,} shards are scored, {totals['errors']:,} of them with an error"
    )
    facts = RunFacts(
        run_id=run.run_id,
        version=run.job.version,
        config=run.config,
        exit_code=problem.exit_code if problem else ExitCode.DONE,
        message=message,
        published=published,
        started_at=run.planned_at,
        outcome=outcome,
        totals=totals,
        cluster=cluster,
    )
    record = run_record(facts)
    write_report(folder, record)
    print(f"report: {folder.url}/report.html", flush=True)
    if problem:
        raise problem
    pointer = "" if published else " (not moved: a run planned later is published)"
    print(
        f"done: {message}\npredictions: {run.job.output.url}\nmanifest: {folder.url}/manifest.parquet; pointer: {run.output.url}/{publishing.POINTER_NAME}{pointer}"
    )
