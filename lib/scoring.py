"""What a scoring run is to do: its plan, from listings alone."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc

from lib import checkpoint, publishing
from lib.archive import Columns, find_root, list_shards, refuse_output_inside, resolve_columns
from lib.atomicity import check_output
from lib.blocks import ScoreJob
from lib.checkpoint import Card
from lib.errors import UsageError, say
from lib.history import Baseline, find_baseline
from lib.planning import (
    names_exactly,
    parse_objects,
    split_finished,
    with_identities,
)
from lib.schema import PredictionSchema
from lib.score_config import ScoreConfig
from lib.selection import Selection, read_selection
from lib.storage import Store, open_store


@dataclass(frozen=True, kw_only=True)
class Run:
    """A planned run."""

    config: ScoreConfig
    run_id: str
    begun: float
    """when the archive was about to be listed, on a clock that nobody sets (`time.monotonic`)"""
    output: Store
    """the folder of all versions"""
    job: ScoreJob
    shards: pa.Table
    """the archive as listed: path, size, etag, mtime_ns, identity"""
    unfinished: pa.Table
    """those shards that miss an object"""
    finished: pa.Table
    """the others"""
    objects: pa.Table
    """of this version, as they were listed: shard, identity, chunk, chunks"""
    published: publishing.Published | None
    last: publishing.Published | None
    """this version's latest successful run"""
    baseline: Baseline
    """what new rows are compared with"""
    selection: Selection | None
    """the rows to score, if not all"""

    @property
    def before(self) -> pa.Table:
        """The manifest of this version's latest successful run; not asked for while a run is planned, for it is large."""
        return self.last.manifest if self.last else publishing.MANIFEST_SCHEMA.empty_table()

    @property
    def planned_at(self) -> datetime:
        """When the archive was about to be listed, by the clock as it goes now: it may have been set since."""
        return datetime.now(UTC) - timedelta(seconds=time.monotonic() - self.begun)

    @property
    def is_published(self) -> bool:
        """Whether readers already see exactly what this run could give them."""
        if self.unfinished.num_rows or self.published is None or self.published.pointer.version != self.job.version:
            return False
        keep = self.config.input.deleted == "keep"
        return names_exactly(self.published.shards_in_parts(), self.finished, self.shards, self.objects, keep)

    def plan(self) -> str:
        """What there is to do, in one line."""
        rows = ""
        if self.selection is not None:
            outdated = (
                f" ({self.selection.outdated:,} more are of shards that have changed since)"
                if self.selection.outdated
                else ""
            )
            rows = f", {self.selection.num_rows:,} rows of input.rows{outdated}"
        size = int(pc.sum(self.unfinished["size"]).as_py() or 0) / 1e6
        return (
            f"{self.job.archive.url}: {self.shards.num_rows:,} shards, {self.finished.num_rows:,} finished,"
            f" {self.unfinished.num_rows:,} to do ({size:,.1f} MB){rows}; version {self.job.version}, run {self.run_id}"
        )

    def nothing_to_do(self) -> str:
        """Say where the results are."""
        assert self.published
        pointer = self.published.pointer
        return f"nothing to do: run {pointer.run} published exactly these shards; manifest: {self.output.url}/{pointer.manifest}"

    def start(self) -> None:
        """Make the first writes: is the output writable, and does this version belong to this archive?"""
        check_output(self.output, single_writer=self.config.output.single_writer)
        publishing.fix_archive(self.job.output, self.job.archive.url, self.job.columns.keys)


def prepare(config: ScoreConfig, run_id: str) -> Run:
    """Plan a run from listings alone: no finished object is opened, nothing is written, no weights are loaded.

    Raises `UsageError` for everything that a user can get wrong.
    """
    begun = time.monotonic()
    output = open_store(config.output.path)
    refuse_output_inside(config.input.path, output)
    if config.input.deleted == "remove" and find_root(config.input.path)[1]:
        raise UsageError(
            f'input.path {config.input.path}: input.deleted = "remove" needs the whole archive listed; give its root folder, without a'
            ' pattern, or leave input.deleted = "keep"'
        )
    if config.input.rows is not None and config.input.key_columns:
        raise UsageError("input.rows: rows are named by shard and row, so set input.key_columns = []")
    with ThreadPoolExecutor(2) as pool:  # torch, which a model's description needs, takes seconds to import
        wants_vector = config.output.embedding is not None
        loading = pool.submit(
            checkpoint.load, config.model.path, config.model.max_length, config.model.trust, wants_vector
        )
        listed = None
        if config.input.rows is None:
            listed = pool.submit(lambda: output.at(checkpoint.version_of(loading.result(), config)).list())
        archive, listing = list_shards(config.input.path)
    shards = with_identities(listing, chunk_bytes := int(config.planning.chunk_mb * 2**20))
    columns = resolve_columns(
        archive, listing["path"].slice(0, 20).to_pylist(), config.input.text_column, config.input.key_columns
    )
    model = loading.result()
    if len(columns.text) == 1 and was_trained_on_pairs(model.card):
        say(
            "WARNING: model.path was trained on pairs of texts, and input.text_column names one column; expected two, as in training"
        )
    if len(columns.text) > 1 and (model.card.windows is not None or model.card.truncation == "head_tail"):
        trained = "on windows" if model.card.windows is not None else "to keep the head and the tail"
        raise UsageError(f"input.text_column names two columns, but model.path was trained {trained} of single texts")
    if len(columns.text) > 1 and model.facts.prompt is not None:
        raise UsageError("input.text_column names two columns, but model.path has a template around single texts")
    selection = None if config.input.rows is None else read_selection(config.input.rows, shards)
    version = checkpoint.version_of(model, config, selection.digest if selection else "")
    if selection is not None:
        shards = shards.filter(pc.is_in(shards["path"], pa.array(selection.rows, pa.string())))
    keys = publishing.read_archive(output.at(version), archive.url, columns.keys)
    schema = PredictionSchema(
        heads=model.card.heads,
        prefix=config.output.prefix,
        probabilities=config.output.probabilities,
        keys=columns.keys if keys is None else keys,
        embedding=checkpoint.vector_type(config, model),
    )
    if schema.clashes():
        raise UsageError(
            f"{', '.join(schema.clashes())}: a key column and a column that scoring adds; set output.prefix, for example output.prefix=pred_"
        )
    objects = parse_objects((listed.result() if listed else output.at(version).list())["path"])
    finished, unfinished = split_finished(shards, objects)
    published = publishing.read_published(output)
    last = publishing.latest_success(output, version, published)
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
        truncation=model.card.truncation,
        windows=model.card.windows,
        prompt=model.facts.prompt,
        precision=config.model.precision,
        engine=config.model.engine,
        embedding_pooling=config.output.embedding_pooling,
        token_budget=config.resources.token_budget,
        chunk_bytes=chunk_bytes,
    )
    return Run(
        config=config,
        run_id=run_id,
        begun=begun,
        output=output,
        job=job,
        shards=shards,
        unfinished=unfinished,
        finished=finished,
        objects=objects,
        published=published,
        last=last,
        baseline=find_baseline(output.at(version), config.drift.baseline, last),
        selection=selection,
    )


def was_trained_on_pairs(card: Card) -> bool:
    """Whether every labelled set behind a checkpoint had two text columns."""
    config = card.trained.get("config", {})
    sets = [one for one in config.get("tasks", {}).values() if one] or [config.get("train", {})]
    return all(isinstance(one.get("text_column"), list) for one in sets)
