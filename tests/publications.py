"""Runs that wrote real objects through `lib.blocks`, without Ray and without a model: publishing only looks at what is there."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from lib import publishing
from lib.archive import Columns
from lib.blocks import ScoreJob, write_chunk
from lib.config import Trust
from lib.planning import Chunk
from lib.publishing import MANIFEST_SCHEMA
from lib.schema import Head, PredictionSchema, Task
from lib.storage import Store

OLD, NEW = "0" * 15 + "1", "0" * 15 + "2"
"""Two versions."""

START = datetime(2026, 11, 20, 2, tzinfo=UTC)

CHUNK_ROWS = 50


def night(number: int) -> datetime:
    """When the run of a night was planned."""
    return START + timedelta(days=number)


def write_objects(output: Store, version: str, shards: Mapping[str, int], bad_rows: int = 0) -> pa.Table:
    """Write the predictions of shards with so many chunks each, and return their manifest."""
    schema = PredictionSchema(
        heads=(Head(task=Task.MULTI_CLASS, labels=("a", "b")),), prefix="", probabilities=False, keys=pa.schema([])
    )
    job = ScoreJob(
        archive=output.at("no-archive"),
        output=output.at(version),
        version=version,
        columns=Columns(text=("text",), keys=pa.schema([])),
        schema=schema,
        model_url="no-model",
        model_digest="",
        max_length=8,
        precision="fp32",
        engine="torch",
        embedding_pooling=None,
        windows=None,
        prompt=None,
        truncation="head",
        token_budget=None,
        chunk_bytes=1,
        trust=Trust(),
    )
    publishing.fix_archive(job.output, job.archive.url, pa.schema([]))
    rows = []
    for shard, count in shards.items():
        for index in range(count):
            chunk = Chunk(shard, "ab" * 6, index, count, index * CHUNK_ROWS, CHUNK_ROWS, 1)
            record = write_chunk(job, chunk, predictions(schema, chunk, bad_rows))
            names = ("shard", "identity", "chunk", "chunks", "start", "rows", "bytes", "version")
            path, errors = f"{version}/{chunk.name}", sum(record["errors"].values())
            rows.append({name: record[name] for name in names} | {"errors": errors, "run": "", "path": path})
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def predictions(schema: PredictionSchema, chunk: Chunk, bad_rows: int) -> pa.Table:
    """Scores that differ from row to row and chunk to chunk."""
    scores = [(chunk.start + row + 0.5) / 10_000 for row in range(chunk.rows)]
    errors = ["empty" if row < bad_rows else None for row in range(chunk.rows)]
    return pa.table(
        {
            "label": [None if error else "a" for error in errors],
            "score": [None if error else score for score, error in zip(scores, errors, strict=True)],
            "num_tokens": [3] * chunk.rows,
            "truncated": [False] * chunk.rows,
            "error": pa.array(errors, pa.string()),
        },
        schema=schema.results,
    )


def publish_run(
    output: Store, version: str, run: str, planned_at: datetime, manifest: pa.Table, *, single_writer: bool = False
) -> bool:
    """What `conclusion.conclude` does with a run that succeeded."""
    folder = output.at(f"{version}/_runs/{run}")
    name = publishing.write_manifest(folder, manifest)
    moved = publishing.publish(output, version, run, planned_at, name, single_writer=single_writer)
    record_run(output, version, run, planned_at, 0, f"{manifest.num_rows} objects", publishing.totals(manifest))
    return moved


def record_run(
    output: Store, version: str, run: str, planned_at: datetime, exit_code: int, message: str, totals: dict[str, int]
) -> None:
    """The part of `run.json` that lists of runs show."""
    record = {
        "exit_code": exit_code,
        "message": message,
        "started_at": planned_at.isoformat(),
        "published_total": totals,
    }
    output.replace(f"{version}/_runs/{run}/run.json", json.dumps(record).encode())
