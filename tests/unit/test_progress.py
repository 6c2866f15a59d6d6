"""The progress actor without its process: what it counts, by a clock that only the test moves, and which metrics it keeps."""

import json
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray

from lib import blocks, progress, tasks, telemetry
from lib.blocks import CHUNKS_KEY
from lib.planning import Chunk
from lib.telemetry import Kind, Metric


@dataclass
class Board:
    """In the place of Ray's metrics: the sum of each counter, the last value of each gauge."""

    now: float = 100.0
    values: dict[tuple[str, ...], float] = field(default_factory=dict)

    def instrument(self, metric: Metric) -> Any:
        def take(value: float, tags: dict[str, str]) -> None:
            assert set(tags) == set(metric.labels)
            assert tags["version"] == "v"
            key = (metric.name, *(text for name, text in tags.items() if name != "version"))
            self.values[key] = value + (self.values.get(key, 0.0) if metric.kind is Kind.COUNTER else 0.0)

        return SimpleNamespace(set=take, inc=take)

    def of(self, metric: Metric) -> dict[tuple[str, ...], float]:
        """A metric by its other labels."""
        return {key[1:]: value for key, value in self.values.items() if key[0] == metric.name}


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    found = Board()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: found.now))
    monkeypatch.setattr(telemetry, "instrument", found.instrument)
    return found


def counting() -> Any:
    """The class that Ray would make an actor of."""
    return progress.Progress.__ray_metadata__.modified_class("v")  # type: ignore[attr-defined]


def test_the_time_of_actors_goes_to_the_states_they_were_in(board: Board) -> None:
    one = counting()
    for actor in ("a", "b"):
        one.enlist(actor, None)
    board.now += 3
    one.ready("a", 512)
    board.now += 2
    one.begin("a", None, ["s"])
    one.begin("b", None, ["s"])  # begins a block before its message of being ready came
    board.now += 4
    one.end("b")
    board.now += 1
    counts = one.read()
    assert counts.actor_seconds == {"starting": 2 * 3 + 2, "idle": 2 + 1, "busy": 2 * 4 + 1}
    assert board.of(telemetry.ACTOR_SECONDS) == {("starting",): 8, ("idle",): 3, ("busy",): 9}
    assert board.of(telemetry.ACTORS) == {("starting",): 0, ("idle",): 1, ("busy",): 1}
    assert (counts.num_actors, counts.num_busy, counts.busy) == (2, 1, ("s",))
    board.now += 5
    one.dismiss()
    assert one.read().actor_seconds == {"starting": 8, "idle": 3 + 5, "busy": 9 + 5}
    board.now += 7
    assert one.read().actor_seconds == {"starting": 8, "idle": 8, "busy": 14}, "nobody is there any more"
    assert board.of(telemetry.ACTORS) == {("starting",): 0, ("idle",): 0, ("busy",): 0}


def test_blocks_wait_from_their_reading_to_their_actor(board: Board) -> None:
    one = counting()
    waiting = []
    for step in (lambda: one.queue("x"), lambda: one.queue("y"), lambda: one.begin("a", None, ["s"], "x"), one.dismiss):
        step()
        one.read()
        waiting.append(board.of(telemetry.WAITING)[()])
    assert waiting == [1, 2, 1, 0]


def test_a_block_that_was_read_waits_under_the_name_that_its_actor_begins_with(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = Chunk(shard="a.parquet", identity="0", index=0, count=1, start=0, rows=1, text_bytes=1)
    table = pa.table({"row": [0]}).replace_schema_metadata({CHUNKS_KEY: json.dumps([asdict(chunk)]).encode()})
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(tasks, "get_tokenizer", lambda *_: None)
    monkeypatch.setattr(blocks, "read_block", lambda *_: [table])
    queued: list[str] = []
    methods = {"count_read": lambda _: 1, "queue": queued.append, "note": queued.append}
    said = SimpleNamespace(**{name: SimpleNamespace(remote=one) for name, one in methods.items()})
    assert tasks.read_counted(None, (chunk,), None, said) == [table]  # type: ignore[arg-type]
    assert queued == [chunk.name]


def test_the_smallest_budget_of_all_actors_is_shown(board: Board) -> None:
    one = counting()
    one.read()
    assert board.of(telemetry.BUDGET) == {}
    one.ready("a", 4_096)
    one.ready("b", 2_048)
    one.read()
    assert board.of(telemetry.BUDGET) == {(): 2_048}
    one.end("b", budget=8_192)
    one.read()
    assert board.of(telemetry.BUDGET) == {(): 4_096}


def test_failures_are_counted_by_kind_and_the_most_frequent_are_named(board: Board) -> None:
    one = counting()
    for reason, is_mistake, is_bug in (
        ("slow", False, False),
        ("slow", False, False),
        ("x", True, False),
        ("y", False, True),
    ):
        one.fail(reason, is_mistake, is_bug)
    one.note("changed")
    assert board.of(telemetry.FAILURES) == {("trouble",): 2, ("mistake",): 1, ("bug",): 1}
    counts = one.read()
    assert (counts.failures[0], counts.num_failures, counts.mistake, counts.has_bug) == ("slow (2x)", 4, "x", True)
    assert [one.count_read("x") for _ in range(3)] == [1, 2, 3]


def test_an_actor_hangs_if_no_micro_batch_is_heard_of_for_too_long(board: Board) -> None:
    one = counting()
    one.begin("a", "handle of a", ["s"])
    one.begin("b", "handle of b", ["t"])
    board.now += 8
    one.add("b", 1, 10, 1)
    board.now += 3
    assert one.take_hung(10) == [("handle of a", ["s"])]
    assert one.take_hung(10) == [], "each is given once"
    assert (one.read().rows, one.read().tokens, one.read().batches) == (1, 10, 1)
