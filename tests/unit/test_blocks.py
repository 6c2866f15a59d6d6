"""One block, from Parquet to Parquet in one process."""

import copy
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import blocks, checkpoint, tasks
from lib.actors import PredictBlock
from lib.blocks import ScoreJob
from lib.config import validate
from lib.planning import Block, chunks_of
from lib.predictor import Predictor
from lib.score_config import ScoreConfig
from lib.scoring import prepare
from tests import fakes
from tests.conftest import REPOSITORY
from tests.counting import count_objects


def test_no_object_is_made_for_a_row_or_a_token(classifier: str, tmp_path: Path) -> None:
    """Between one Parquet file and the other Python holds nothing per row, and calls nothing: counted for few rows and for many."""
    texts = [f"the parcel came {'very ' * (index % 5)}late again" for index in range(1_000)]
    (tmp_path / "archive").mkdir()
    for name, times in (("few", 1), ("many", 8)):
        pq.write_table(pa.table({"text": texts * times}), tmp_path / "archive" / f"{name}.parquet")
    values = {
        "input": {"path": str(tmp_path / "archive")},
        "model": {"path": classifier, "precision": "fp32", "engine": "torch"},
        "output": {"path": str(tmp_path / "scores"), "probabilities": True},
    }
    run = prepare(validate(ScoreConfig, values), "run")
    job, identities = run.job, dict(zip(*(run.shards[name].to_pylist() for name in ("path", "identity")), strict=True))
    actor = PredictBlock.__new__(PredictBlock)  # without a run to report to
    actor.job, actor.report = job, lambda *_: None  # type: ignore[assignment]
    actor.predictor = Predictor(checkpoint.load(classifier), "fp32", "torch", token_budget=200_000)
    tokenizer = checkpoint.tokenizer_of(actor.predictor.checkpoint)
    counted = {}
    for name in ("few", "few", "many"):  # the first time everything is loaded
        footer = blocks.read_footer(job.archive, job.columns, f"{name}.parquet")
        block = tuple(chunks_of(footer.shard, identities[footer.shard], footer.row_groups, job.chunk_bytes))
        written: list[pa.Table] = []

        def score(job: ScoreJob = job, block: Block = block, written: list[pa.Table] = written) -> None:
            (table,) = blocks.read_block(job, block, tokenizer, lambda problem: None)
            written.append(blocks.write_block(job, actor.score(table)))

        counted[name] = count_objects(score)
        assert f'"rows": {footer.row_groups[0].rows}' in written[0]["result"][0].as_py()
        job = dataclasses.replace(job, output=job.output.at(f"after-{name}-{len(counted)}"))
    rows = len(texts) * 7
    events, alive = ((many - few) / rows for few, many in zip(counted["few"], counted["many"], strict=True))
    assert events < 1, "calls and returns a row"
    assert alive < 0.1, "objects alive a row"


READER = """
import pickle, sys
import lib.tasks
tokenizer = pickle.loads(sys.stdin.buffer.read())
print(tokenizer.encode(["the harbour was quiet", "never again"]).ids.tolist(), "torch" in sys.modules, "transformers" in sys.modules)
"""


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_a_process_that_reads_or_writes_imports_neither_torch_nor_transformers(family: str, tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, family, ("down", "up"))
    tokenizer = checkpoint.tokenizer_of(checkpoint.load(str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", READER], input=pickle.dumps(tokenizer), capture_output=True, check=True, cwd=REPOSITORY
    )
    ids = tokenizer.encode(["the harbour was quiet", "never again"]).ids.tolist()
    assert done.stdout.decode().split("\n")[0] == f"{ids} False False"


def test_a_job_begins_before_torch_is_imported() -> None:
    """It lists the archive meanwhile."""
    script = "import sys, jobs.score; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=REPOSITORY, text=True)
    assert done.stdout == "False False\n"


def test_a_tokenizer_that_is_written_in_python_is_loaded_by_each_process(classifier: str, tmp_path: Path) -> None:
    """It is the fast one here, with what makes it fast taken out: none of ours is written in Python."""
    (tmp_path / "archive").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "archive" / "x.parquet")
    values = {
        "input": {"path": str(tmp_path / "archive")},
        "model": {"path": classifier},
        "output": {"path": str(tmp_path / "scores")},
    }
    job = prepare(validate(ScoreConfig, values), "run").job
    tokenizer = checkpoint.tokenizer_of(checkpoint.load(classifier))
    slow = copy.copy(tokenizer)
    slow.backend = None
    assert tasks.share_tokenizer(slow) is None
    assert tasks.get_tokenizer(None, job) is tokenizer
