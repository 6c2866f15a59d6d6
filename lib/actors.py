"""The actors of a scoring run: one predicts blocks in the pipeline, one does a whole chunk alone when something is wrong with it."""

import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from lib import blocks as work
from lib import checkpoint as checkpoints
from lib.blocks import CHUNKS_KEY, ERROR, IDS, TRUNCATED, TYPE_IDS, ScoreJob
from lib.errors import UsageError
from lib.planning import Chunk
from lib.progress import Reporter, reported
from lib.schema import to_results
from lib.throughput import Throughput

MEASURED_ROWS = 262_144
"""Scored at a time when speed is measured, at most."""


class PredictBlock:
    """The actor: a model loaded once, then blocks of token ids in, blocks of predictions out."""

    def __init__(self, job: ScoreJob, threads: int, progress: Any) -> None:
        self.job, self.progress = job, progress
        self.report = Reporter(progress)
        with reported(progress):
            # Brings torch, which the driver does without: it only names this class.
            from lib.predictor import Predictor, Vector

            vector = None if job.schema.embedding is None else Vector(job.embedding_pooling)
            loaded = checkpoints.load(job.model_url, job.max_length, job.trust, encoder=vector is not None)
            if loaded.digest != job.model_digest:
                raise UsageError(
                    f"model.path {job.model_url}: on this node it is not the model that the run was planned with;"
                    " give every node the same folder, and do not change a model in place"
                )
            self.predictor = Predictor(loaded, job.precision, job.engine, job.token_budget, threads, vector)
        self.report.ready(self.predictor.token_budget, self.predictor.describe())

    def __call__(self, table: pa.Table) -> pa.Table:
        """Score a block: key columns and the columns that scoring adds, rows in the order they came."""
        with reported(self.progress):
            chunks = [Chunk(**record) for record in json.loads(table.schema.metadata[CHUNKS_KEY])]
            self.report.begin([str(chunk) for chunk in chunks], chunks[0].name)
            begun, padding = time.perf_counter(), self.predictor.padding
            scored = self.score(table)
            tokens = pc.sum(pc.list_value_length(table[IDS])).as_py() or 0
            self.report.end(tokens, self.predictor.padding - padding, self.predictor.token_budget)
        return work.timed(scored, "predict", time.perf_counter() - begun)

    def score(self, table: pa.Table) -> pa.Table:
        """Predict a block's rows."""
        ids = table[IDS].combine_chunks()
        errors = table[ERROR].to_numpy()
        offsets = ids.offsets.to_numpy()
        type_ids = table[TYPE_IDS].combine_chunks().values.to_numpy() if TYPE_IDS in table.column_names else None
        found = self.predictor.predict(ids.values.to_numpy(), offsets, type_ids, self.report)
        scores, vectors = np.split(found, [self.predictor.num_classes], axis=1)
        results = to_results(self.job.schema, scores, np.diff(offsets), table[TRUNCATED].to_numpy(), errors, vectors)
        carried = self.job.columns.carried.names
        keys = [table[name].combine_chunks() for name in carried]
        named = pa.table(
            [*keys, *(column.combine_chunks() for column in results.columns)],
            names=[*carried, *results.column_names],
        )
        return named.replace_schema_metadata(table.schema.metadata)


@ray.remote(max_restarts=0, max_task_retries=0)
class LoneWorker:
    """Reads, scores and writes one chunk at a time in one process: if it dies, it is known which rows it was at."""

    def __init__(self, job: ScoreJob, threads: int, progress: Any) -> None:
        self.job, self.progress = job, progress
        self.predict = PredictBlock(job, threads, progress)
        self.tokenizer = checkpoints.tokenizer_of(self.predict.predictor.checkpoint)

    def ready(self) -> None:
        """Return when the model is loaded."""

    def measure(self, table: pa.Table, seconds: float) -> Throughput:
        """Predict rows of token ids again, twice as many each time, until that takes so long: how fast is it?"""
        predictor = self.predict.predictor
        took = 0.0
        while took < seconds and table.num_rows <= MEASURED_ROWS:
            ids = table[IDS].combine_chunks()
            type_ids = table[TYPE_IDS].combine_chunks().values.to_numpy() if TYPE_IDS in table.column_names else None
            begun = time.perf_counter()
            predictor.predict(ids.values.to_numpy(), ids.offsets.to_numpy(), type_ids)
            took = time.perf_counter() - begun
            table = pa.concat_tables([table, table])
        return Throughput(device=predictor.describe(), lives=1, tokens=len(ids.values), seconds=took, busy_seconds=took)

    def score(self, chunk: Chunk) -> dict[str, Any] | None:
        """Make a chunk's object; returns what it says of itself, or None if it is there or its shard changed."""
        with reported(self.progress):
            tables = work.read_block(self.job, (chunk,), self.tokenizer, self.progress.note.remote)
            if not tables:
                return None
            written = work.write_block(self.job, self.predict(tables[0]))
        result: dict[str, Any] = json.loads(written["result"][0].as_py())
        return result

    def probe(self, chunk: Chunk, first: int, last: int) -> None:
        """Score rows `first` to `last` of a chunk (counted in the shard), the others left out, and throw the scores away."""
        others = ((chunk.start, first), (last, chunk.start + chunk.rows))
        for table in work.read_chunks(self.job, [replace(chunk, excluded=others)], self.tokenizer):
            self.predict(table)
