"""Texts that kill, hang or break the process that scores them: found, narrowed to the guilty rows, and nobody else pays."""

import json
from typing import Any

import psutil
import pyarrow as pa
import pytest

from jobs.demo_store import LoopbackS3
from lib import checkpoint
from lib.storage import open_store
from lib.tokenization import load_tokenizer
from tests import fakes
from tests.faults.conftest import make_shards
from tests.faults.harness import (
    ROWS,
    Bench,
    assert_alike,
    check_nothing_lost,
    check_unpublished,
    scoring,
    without_shards,
)
from tests.waiting import wait_until

POISON = "qxjzq vwkxz"

TRIAL = pytest.mark.trial
"""Every suspect costs a process and a model to load, so only the shortest searches run with every test run."""


@pytest.fixture
def poison_tokens(classifier: str) -> list[int]:
    """The token ids that only the poisoned texts hold."""
    loaded = checkpoint.load(classifier)
    ids: list[int] = load_tokenizer(loaded.folder, loaded.card.max_length).encode([POISON]).ids[1:-1].tolist()
    return ids


def poisoned_archive(url: str, rows: dict[str, list[int]]) -> str:
    """The usual archive, with poison at the start of some rows."""
    shards = make_shards()
    for name, numbers in rows.items():
        texts = shards[name]["text"].to_pylist()
        shards[name] = pa.table(
            {"text": [f"{POISON} {text}" if row in numbers else text for row, text in enumerate(texts)]}
        )
    fakes.write_archive(f"{url}/archive", shards)
    return f"{url}/archive"


def without(rows: pa.Table, guilty: dict[str, list[int]]) -> pa.Table:
    keep = [row["row"] not in guilty.get(row["shard"], []) for row in rows.select(["shard", "row"]).to_pylist()]
    return rows.filter(pa.array(keep))


@pytest.mark.parametrize(
    ("action", "guilty"),
    [
        ("kill", {"part-003.parquet": [17]}),
        pytest.param("kill", {"part-003.parquet": [17, 63], "part-007.parquet": [ROWS - 1]}, marks=TRIAL),
        pytest.param("hang", {"part-007.parquet": [5]}, marks=TRIAL),
    ],
)
def test_rows_that_kill_or_hang_the_process_are_found_and_cost_only_themselves(
    action: str,
    guilty: dict[str, list[int]],
    bench: Bench,
    s3: LoopbackS3,
    classifier: str,
    undamaged: pa.Table,
    poison_tokens: list[int],
) -> None:
    url = s3.bucket()
    archive, output = poisoned_archive(url, guilty), f"{url}/scores"
    bench.plant(predict={"tokens": poison_tokens, "do": action})
    settings = ["limits.max_bad_rows=3", *(["limits.hang_seconds=4"] if action == "hang" else [])]
    with scoring(bench, archive, classifier, output, *settings, run_id=action) as job:
        assert job.wait(400) == 0, job.text
    rows = check_nothing_lost(archive, output, faults=len(bench.events), exit_code=0, run_id=action)
    assert POISON not in job.text, "texts are never logged"
    if action == "hang":
        assert "(limits.hang_seconds) at part-007.parquet rows 0 to 99: " in job.text
    crashed = [(row["shard"], row["row"]) for row in rows.to_pylist() if row["error"] == "crash"]
    assert sorted(crashed) == sorted((shard, row) for shard, numbers in guilty.items() for row in numbers)
    assert_alike(without(rows, guilty), without(undamaged, guilty))
    for shard, numbers in guilty.items():
        for number in numbers:
            assert f"{shard}: row {number} kills the process" in job.text
    version = json.loads(open_store(output).read("_published.json") or b"{}")["version"]
    record = json.loads(open_store(output).read(f"{version}/_runs/{action}/run.json") or b"{}")
    assert record["crashing_rows"] == guilty
    letters = [path for path in open_store(output).list()["path"].to_pylist() if "/_dead_letter/" in path]
    assert len(letters) == len(guilty)


def test_a_node_that_is_lost_with_a_process_that_tries_rows_blames_none_of_them(
    bench: Bench, s3: LoopbackS3, classifier: str, undamaged: pa.Table, poison_tokens: list[int]
) -> None:
    """The process that is started when a chunk is missing goes with its node, as its model is loaded or later."""
    url, guilty = s3.bucket(), {"part-003.parquet": [17]}
    archive, output = poisoned_archive(url, guilty), f"{url}/scores"
    bench.plant(predict={"tokens": poison_tokens, "do": "kill"})
    with scoring(bench, archive, classifier, output, "limits.max_bad_rows=1", run_id="lost") as job:
        trying: list[psutil.Process] = []

        def is_there() -> bool:
            assert job.process.poll() is None, job.text
            trying.extend(bench.workers("LoneWorker"))
            return bool(trying)

        wait_until(is_there, "a process that tries rows", 240)
        bench.lose_node_of(trying[0])
        assert job.wait(400) == 0, job.text
    assert "a node was lost, and with it a process that tried rows alone" in job.text
    rows = check_nothing_lost(archive, output, faults=len(bench.events), exit_code=0, run_id="lost")
    assert [(row["shard"], row["row"]) for row in rows.to_pylist() if row["error"] == "crash"] == [
        ("part-003.parquet", 17)
    ]
    assert_alike(without(rows, guilty), without(undamaged, guilty))


@TRIAL
def test_a_search_for_guilty_rows_ends_at_its_limit(
    bench: Bench, s3: LoopbackS3, classifier: str, poison_tokens: list[int]
) -> None:
    url = s3.bucket()
    archive, output = poisoned_archive(url, {"part-003.parquet": [17]}), f"{url}/scores"
    bench.plant(predict={"tokens": poison_tokens, "do": "kill"})
    with scoring(bench, archive, classifier, output, "limits.max_probes=3", run_id="limited") as job:
        assert job.wait(400) == 4, job.text
    assert "which of them was not found with limits.max_probes = 3" in job.text
    assert bench.events
    check_unpublished(output, "limited")


def test_an_error_in_the_forward_pass_ends_the_run_as_a_bug_with_its_traceback(
    bench: Bench, s3: LoopbackS3, classifier: str, poison_tokens: list[int]
) -> None:
    url = s3.bucket()
    archive, output = poisoned_archive(url, {"part-003.parquet": [17]}), f"{url}/scores"
    bench.plant(predict={"tokens": poison_tokens, "do": "raise"})
    with scoring(bench, archive, classifier, output, run_id="raises") as job:
        assert job.wait() == 1, job.text
    assert "MemoryError" in job.text
    assert bench.events
    check_unpublished(output, "raises")
    assert POISON not in job.text, "texts are never logged"


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"read": {"shard": "part-005.parquet", "do": "kill"}}, marks=TRIAL, id="rows"),
        pytest.param({"footer": "part-005.parquet"}, id="footer"),
    ],
)
def test_a_shard_that_kills_its_reader_is_a_bad_shard(
    fault: dict[str, Any], bench: Bench, s3: LoopbackS3, classifier: str, archive: str, undamaged: pa.Table
) -> None:
    output = f"{s3.bucket()}/scores"
    bench.plant(**fault)
    with scoring(bench, archive, classifier, output, "limits.max_bad_shards=1", run_id="reader") as job:
        assert job.wait(400) == 0, job.text
    assert bench.events
    assert "part-005.parquet" in job.text
    open_store(archive).delete("part-005.parquet")  # the rest must be whole
    rows = check_nothing_lost(archive, output, faults=len(bench.events), exit_code=0, run_id="reader")
    assert_alike(rows, without_shards(undamaged, ["part-005.parquet"]))
