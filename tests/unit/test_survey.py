"""What a plan finds out about shards and rows, without Ray: which rows are sampled, what becomes of failures, how shards are told apart."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from transformers import AutoTokenizer

from lib import blocks, checkpoint, survey
from lib.blocks import IDS
from lib.errors import IncompleteError, UsageError
from lib.estimate import Draws
from lib.planning import chunks_of, select_rows
from lib.sampling import Sampled, sample_shard
from lib.schema import DEAD_LETTER_SCHEMA
from lib.storage import open_store
from lib.survey import Tally, count_shards, read_sample, tally_chunks, windows_of
from tests import fakes
from tests.stand_in import add, prepared, run_night

WINDOW = Draws(unit=np.array([0]), first=np.array([0]), rows=np.array([4]), weight=np.ones(1), is_census=False)


def test_of_chosen_rows_those_are_sampled_and_not_the_first_of_their_chunk(tmp_path: Path, classifier: str) -> None:
    """Each text is as long as its row's number says; rows 3, 90, 91 and 199 are to be scored again."""
    chosen = (3, 90, 91, 199)
    texts = ["no " * (1 + row % 10) for row in range(200)]
    fakes.write_archive(f"{tmp_path}/archive", {"a.parquet": pa.table({"text": texts})}, row_group_size=100)
    content = prepared(tmp_path, classifier, "x").shards["identity"][0].as_py()
    letters = [{"shard": "a.parquet", "row": row, "identity": content, "error": "null"} for row in chosen]
    fakes.write_archive(f"{tmp_path}/letters", {"x.parquet": pa.Table.from_pylist(letters, DEAD_LETTER_SCHEMA)})
    run = prepared(tmp_path, classifier, "y", input={"path": f"{tmp_path}/archive", "rows": f"{tmp_path}/letters"})
    assert run.selection is not None
    footer = blocks.read_footer(run.job.archive, run.job.columns, "a.parquet")
    chunks = chunks_of("a.parquet", content, footer.row_groups, run.job.chunk_bytes)
    tally = tally_chunks(select_rows(chunks, run.selection.rows["a.parquet"]), frozenset(), run.job.chunk_bytes)
    windows = windows_of(tally, WINDOW)["a.parquet", content]
    assert [window.first for window in windows] == list(chosen)
    tokenizer = checkpoint.tokenizer_of(checkpoint.load(classifier))
    found = sample_shard(run.job, "a.parquet", content, windows, tokenizer, whole=True)
    assert sum(rows for _, rows, _, _ in found.counts) == 4
    plain = AutoTokenizer.from_pretrained(classifier)([texts[row] for row in chosen])
    expected = [len(ids) for ids in plain["input_ids"]]
    assert found.tokens is not None
    assert [len(ids) for ids in found.tokens[IDS].to_pylist()] == expected


FAILURES = [
    (ray.exceptions.GetTimeoutError("no answer in 7 s (limits.stall_seconds)"), IncompleteError),
    (ray.exceptions.OutOfMemoryError("the node has no memory left"), IncompleteError),
    (ray.exceptions.RayTaskError("f", "", UsageError("denied")), UsageError),
    (ray.exceptions.RayTaskError("f", "", ZeroDivisionError()), ray.exceptions.RayTaskError),
]


@pytest.mark.parametrize(
    ("failure", "expected"), FAILURES, ids=lambda one: getattr(one, "__name__", type(one).__name__)
)
def test_what_fails_while_a_sample_is_read_ends_the_plan_as_it_would_a_run(
    failure: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(task: str, seconds: float) -> None:
        assert (task, seconds) == ("task", 7)
        raise failure

    monkeypatch.setattr(survey, "wait", fail)
    with pytest.raises(expected):
        list(sampled(monkeypatch))


def test_a_task_whose_process_was_killed_by_a_page_gives_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([ray.exceptions.WorkerCrashedError(), [Sampled((), None)]])

    def answer(task: str, seconds: float) -> Any:
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(survey, "wait", answer)
    assert list(sampled(monkeypatch, shards=9)) == [Sampled((), None)]


def sampled(monkeypatch: pytest.MonkeyPatch, shards: int = 1) -> Any:
    """Read a sample of a row in each shard with tasks that do nothing."""
    monkeypatch.setattr(survey, "sample_shards", SimpleNamespace(remote=lambda *arguments: "task"))
    running: Any = SimpleNamespace(job=None, tokenizer=None, limits=SimpleNamespace(stall_seconds=7))
    ones = np.ones(shards, np.int64)
    tally = Tally()
    for number in range(shards):
        tally.shards.append((f"{number}.parquet", "0" * 12))
        tally.shard.append(number)
        tally.start.append(0)
    draws = Draws(unit=np.arange(shards), first=0 * ones, rows=ones, weight=ones.astype(float), is_census=True)
    return read_sample(running, tally, draws)


def test_a_shard_that_lost_its_objects_has_not_changed(tmp_path: Path, classifier: str) -> None:
    for name in ("lost", "changed", "same"):
        add(tmp_path, f"{name}.parquet", "down", "up")
    run_night(tmp_path, classifier, "x")
    output = open_store(f"{tmp_path}/scores")
    output.delete_all([path for path in output.list()["path"].to_pylist() if "/lost.parquet-" in path])
    add(tmp_path, "changed.parquet", "same")
    found = count_shards(prepared(tmp_path, classifier, "y"))
    assert (found["finished"], found["to_do"], found["changed"], found["new"], found["begun"]) == (1, 2, 1, 1, 0)
