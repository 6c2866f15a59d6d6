"""Runs of `jobs.score` with a stand-in for pipeline and model: planning, objects, judging and publishing are the real ones, without Ray."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lib import blocks, conclusion, scoring
from lib.config import validate
from lib.outcome import Outcome
from lib.planning import Chunk, chunks_of
from lib.publishing import read_published
from lib.score_config import ScoreConfig
from lib.scoring import Run
from lib.storage import open_store
from tests import fakes


def prepared(folder: Path, model: str, run_id: str, **sections: Any) -> Run:
    """Plan a run of `folder/archive` into `folder/scores`."""
    paths = {"input": {"path": f"{folder}/archive"}, "model": {"path": model}, "output": {"path": f"{folder}/scores"}}
    return scoring.prepare(validate(ScoreConfig, paths | sections), run_id)


def score(run: Run) -> Outcome:
    """Write the objects of all unfinished shards: a text is its own label, and has as many tokens as characters."""
    outcome = Outcome()
    run.start()
    for shard, identity in zip(*(run.unfinished[name].to_pylist() for name in ("path", "identity")), strict=True):
        footer = blocks.read_footer(run.job.archive, run.job.columns, shard)
        if footer.problem is not None:
            outcome.bad_shards[shard] = footer.problem
            continue
        for chunk in chunks_of(shard, identity, footer.row_groups, run.job.chunk_bytes):
            outcome.plan(chunk)
            outcome.add(blocks.write_chunk(run.job, chunk, predictions(run, chunk)))
    return outcome


def predictions(run: Run, chunk: Chunk) -> pa.Table:
    """What a model could say of a chunk."""
    table = pq.read_table(f"{run.job.archive.url}/{chunk.shard}")
    texts = table["text"].slice(chunk.start, chunk.rows).to_pylist()
    columns = {
        "label": texts,
        "score": [None if text is None else 0.9 for text in texts],
        "num_tokens": [len(text or "") for text in texts],
        "truncated": [False] * len(texts),
        "error": pa.array(["null" if text is None else None for text in texts], pa.string()),
    }
    return pa.table(columns, schema=run.job.schema.results)


def conclude(run: Run, outcome: Outcome) -> None:
    """The end of a run. Raises what keeps it from being published."""
    conclusion.conclude(run, outcome, conclusion.reconcile(run, outcome), "no cluster")


def run_night(folder: Path, model: str, run_id: str, **sections: Any) -> None:
    """A whole run, unless there is nothing to do."""
    run = prepared(folder, model, run_id, **sections)
    if not run.is_published:
        conclude(run, score(run))


def add(folder: Path, name: str, *texts: str | None) -> None:
    """Put a shard into the archive, over the one that is there."""
    fakes.write_archive(f"{folder}/archive", {name: pa.table({"text": pa.array(texts, pa.string())})})


def published(folder: Path) -> str | None:
    """The run that readers see."""
    found = read_published(open_store(f"{folder}/scores"))
    return found.pointer.run if found else None
