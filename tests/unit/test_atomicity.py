"""The self-test of a store: a good one passes and is left as it was, one that lies is refused with numbers."""

import errno
from pathlib import Path

import pytest

from jobs.demo_store import LoopbackS3
from lib.atomicity import RACERS, UNFINISHED_NS, check_output, remove_unfinished
from lib.errors import IncompleteError, UsageError
from lib.listing import PROBES
from lib.storage import Store, open_store
from tests.proxy import Fault, FaultyProxy, Rule

IGNORED = rf"If-None-Match: {RACERS} of {RACERS} that created one object at once .*expected 1 \(round 1 of 3; the header is ignored\)"
LOST_RACE = rf"If-None-Match: [2-{RACERS}] of {RACERS} that created one object at once .*the header is known, and lost in a race"
WRONG_ACCEPTED = r"If-Match: a write with a wrong ETag was accepted, expected a refusal \(the header is ignored\)"
SWAP_RACE = (
    rf"If-Match: [2-{RACERS}] of {RACERS} that swapped one object at once .*the header is known, and lost in a race"
)


def puts_with(condition: str, fault: Fault) -> Rule:
    """What a store does that treats one condition poorly."""
    return lambda method, path, headers: fault if method == "PUT" and condition in headers else Fault.NONE


def test_a_store_that_keeps_its_word_is_left_as_it_was(any_url: str) -> None:
    store = open_store(any_url)
    store.create("kept", b"")
    check_output(store, single_writer=False)
    assert store.list()["path"].to_pylist() == ["kept"]
    if store.is_local:
        assert [path.name for path in Path(store.root).rglob("*")] == ["kept"]


def test_the_self_test_is_cheap(s3: LoopbackS3) -> None:
    store = open_store(f"{s3.bucket()}/out")
    before = len(s3.requests())
    check_output(store, single_writer=False)
    assert len(s3.requests()) - before == 45


@pytest.mark.parametrize(
    ("condition", "fault", "message"),
    [
        ("if-none-match", Fault.UNCONDITIONAL, IGNORED),
        ("if-none-match", Fault.CHECKED_FIRST, LOST_RACE),
        ("if-match", Fault.UNCONDITIONAL, WRONG_ACCEPTED),
        ("if-match", Fault.CHECKED_FIRST, SWAP_RACE),
        ("if-match", Fault.NOT_IMPLEMENTED, r"If-Match: not known to the store \(NotImplemented\)"),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else None,
)
def test_a_store_that_lies_is_refused_and_left_as_it_was(
    condition: str, fault: Fault, message: str, s3: LoopbackS3, proxy: FaultyProxy
) -> None:
    store = open_store(f"{s3.bucket()}/out")
    proxy.rule = puts_with(condition, fault)
    with pytest.raises(UsageError, match=message) as caught:
        check_output(store, single_writer=False)
    assert "output.single_writer = true" in str(caught.value)
    assert fault in [seen for _, _, seen in proxy.seen], "the fault must have happened"
    assert store.list().num_rows == 0


def test_a_store_that_does_not_know_how_to_create_once_is_no_output(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    proxy.rule = puts_with("if-none-match", Fault.NOT_IMPLEMENTED)
    with pytest.raises(
        UsageError, match=r"does not know how to write it \(NotImplemented\); use one that knows If-None-Match"
    ):
        check_output(open_store(f"{s3.bucket()}/out"), single_writer=True)


def test_one_writer_is_warned_in_place_of_a_test(
    s3: LoopbackS3, proxy: FaultyProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(f"{s3.bucket()}/out")
    proxy.rule = puts_with("if-match", Fault.UNCONDITIONAL)
    check_output(store, single_writer=True)
    assert "WARNING: output.single_writer = true" in capsys.readouterr().out
    assert store.list().num_rows == 0


def test_lost_answers_are_no_lie(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    # Every write is done and its answer lost; tried again it is refused: no racer is told that it won, but one did.
    proxy.rule = lambda method, path, headers: (
        Fault.LOST_ANSWER
        if method == "PUT" and headers["amz-sdk-request"].partition(";")[0] == "attempt=1"
        else Fault.NONE
    )
    store = open_store(f"{s3.bucket()}/out")
    check_output(store, single_writer=False)
    assert [fault for _, _, fault in proxy.seen].count(Fault.LOST_ANSWER) > RACERS
    assert store.list().num_rows == 0


def test_a_store_that_fails_half_way_is_left_as_it_was(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    store: Store = open_store(f"{s3.bucket()}/out")
    proxy.rule = lambda method, path, headers: Fault.DENIED if method == "PUT" and "if-match" in headers else Fault.NONE
    with pytest.raises((UsageError, IncompleteError), match="not allowed to write"):
        check_output(store, single_writer=False)
    assert store.list().num_rows == 0


def test_what_killed_runs_left_is_removed_after_a_day_and_not_before(any_url: str) -> None:
    store = open_store(any_url)
    store.create("kept/a.parquet", b"")
    store.create(f"{PROBES}0123", b"")
    store.create(f"{PROBES}4567/create-0", b"")
    if store.is_local:
        store._write_temporary("kept/b.parquet", b"half")
    written = store.info("kept/a.parquet")
    assert written is not None
    assert written.mtime_ns is not None

    def left() -> list[str]:
        """All that is there, unfinished writes included."""
        if not store.is_local:
            return list(store.list()["path"].to_pylist())
        return sorted(path.name.partition(".")[2] for path in Path(store.root).rglob("*") if path.is_file())

    before = left()
    remove_unfinished(store, written.mtime_ns + UNFINISHED_NS - 60 * 10**9)
    assert left() == before
    remove_unfinished(store, written.mtime_ns + UNFINISHED_NS + 60 * 10**9)
    assert left() == (["parquet"] if store.is_local else ["kept/a.parquet"])
    assert not store.is_local or [path.name for path in Path(store.root).iterdir()] == ["kept"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(IncompleteError, match="No space left on device"):
        open_store(str(tmp_path)).create("x.parquet", b"half")
    assert list(tmp_path.iterdir()) == []
