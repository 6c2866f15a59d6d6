"""`jobs.publish` on what real writes left: the list, every kind of damage named, rollbacks, and deletions killed at every step."""

import io
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import publish
from jobs.demo_store import LoopbackS3
from lib import versions
from lib.errors import IncompleteError, UsageError
from lib.publishing import FOOTER_KEY, MANIFEST_SCHEMA, POINTER_NAME, read_archive, read_published
from lib.storage import Store, open_store
from lib.verification import Violation, verify
from tests import fakes
from tests.proxy import Fault, FaultyProxy
from tests.publications import CHUNK_ROWS, NEW, OLD, night, publish_run, record_run, write_objects

SHARDS = {"a": 3, "dt=2026/b": 1}


@pytest.fixture
def output(any_url: str) -> Store:
    """Two versions: two successful runs of the old one, one over its limit, one of the new one, published."""
    output = open_store(any_url)
    publish_run(output, OLD, "monday", night(1), write_objects(output, OLD, {"a": 3}))
    publish_run(output, OLD, "tuesday", night(2), write_objects(output, OLD, SHARDS))
    record_run(
        output,
        OLD,
        "wednesday",
        night(3),
        3,
        "9 of 10 new rows have an error",
        {"rows": 10, "shards": 1, "errors": 9, "bytes": 5},
    )
    output.create(f"{NEW}/_runs/thursday/config.json", b"{}")
    publish_run(output, NEW, "friday", night(5), write_objects(output, NEW, SHARDS, bad_rows=2))
    return output


def run(output: Store, *arguments: str) -> None:
    """Run the job as its command line would."""
    publish.main([*arguments, "--set", f"output.path={output.url}"])


def published_run(output: Store) -> str:
    published = read_published(output)
    assert published is not None
    return published.pointer.run


# list


def test_the_list_shows_every_run_and_what_readers_see(output: Store, capsys: pytest.CaptureFixture[str]) -> None:
    run(output, "list")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:6] for line in lines[1:-1]] == [
        [NEW, "thursday", "-", "no_record", "-", "-"],
        [OLD, "monday", "2026-11-21", "02:00:00", "success", "0"],
        [OLD, "tuesday", "2026-11-22", "02:00:00", "success", "0"],
        [OLD, "wednesday", "2026-11-23", "02:00:00", "over_limit", "3"],
        ["*", NEW, "friday", "2026-11-25", "02:00:00", "published"],
    ]
    assert lines[4][-7:] == ["9", "of", "10", "new", "rows", "have", "an", "error"][-7:]


def test_the_list_for_machines(output: Store, capsys: pytest.CaptureFixture[str]) -> None:
    run(output, "list", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["pointer"]["run"] == "friday"
    friday = found["runs"][-1]
    assert {name: friday[name] for name in ("version", "run", "state", "rows", "shards", "errors")} == {
        "version": NEW, "run": "friday", "state": "published", "rows": 4 * CHUNK_ROWS, "shards": 2, "errors": 8,
    }  # fmt: skip
    assert friday["bytes"] == sum(read_manifest(output)["bytes"].to_pylist())


def test_the_list_reads_small_files_only(s3: LoopbackS3, capsys: pytest.CaptureFixture[str]) -> None:
    output = open_store(f"{s3.bucket()}/scores")
    publish_run(output, OLD, "first", night(0), write_objects(output, OLD, {"a": 30}))
    for number in range(40):
        record_run(output, OLD, f"run-{number}", night(number), 4, "", {})
    before = len(s3.requests())
    run(output, "list")
    requests = s3.requests()[before:]
    assert {method for method, _, _ in requests} == {"GET"}
    assert not [path for _, path, _ in requests if "-of-" in path]
    assert len(requests) == 41 + 5, (
        "run.json of each; the pointer twice, the versions, the version's runs, its _archive.json"
    )


def test_a_run_killed_between_publishing_and_its_report_is_listed(output: Store) -> None:
    output.delete(f"{NEW}/_runs/friday/run.json")
    friday = versions.list_runs(output)[-1]
    assert (friday.run, friday.state, friday.rows, friday.exit_code) == ("friday", "published", 4 * CHUNK_ROWS, None)


def test_nothing_published_is_an_empty_list(any_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(open_store(any_url), "list")
    assert "0 runs below" in capsys.readouterr().out


# verify


def read_manifest(output: Store) -> pa.Table:
    published = read_published(output)
    assert published is not None
    return published.manifest


def write_manifest(output: Store, rows: list[dict[str, Any]]) -> None:
    """Damage the published manifest."""
    published = read_published(output)
    assert published is not None
    output.replace(published.pointer.manifest, fakes.to_parquet(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)))


def test_what_is_whole_verifies(output: Store, capsys: pytest.CaptureFixture[str]) -> None:
    run(output, "verify")
    assert "4 objects, 200 rows" in capsys.readouterr().out
    run(output, "verify", "--run", "monday", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["version"], found["run"], found["objects"], found["violations"]) == (OLD, "monday", 3, [])


def damage_nothing_there(output: Store, rows: list[dict[str, Any]]) -> str:
    output.delete(rows[0]["path"])
    return "it is not there"


def damage_cut_short(output: Store, rows: list[dict[str, Any]]) -> str:
    output.replace(rows[0]["path"], (output.read(rows[0]["path"]) or b"")[:-100])
    return "it cannot be read"


def damage_one_bit(output: Store, rows: list[dict[str, Any]]) -> str:
    data = bytearray(output.read(rows[0]["path"]) or b"")
    column = pq.read_metadata(io.BytesIO(data)).row_group(0).column(3)
    data[column.dictionary_page_offset + column.total_compressed_size - 3] ^= 1
    output.replace(rows[0]["path"], bytes(data))
    return "it cannot be read: .*CRC"


def rewrite(output: Store, row: dict[str, Any], change: Any) -> None:
    """Write an object again, changed, with its size in the manifest kept right."""
    table = change(pq.read_table(io.BytesIO(output.read(row["path"]) or b"")))
    data = fakes.to_parquet(table)
    output.replace(row["path"], data)
    row["bytes"] = len(data)


def damage_rows(output: Store, rows: list[dict[str, Any]]) -> str:
    rewrite(output, rows[0], lambda table: table.slice(1))
    return f"it has {CHUNK_ROWS - 1} rows, the manifest says {CHUNK_ROWS}"


def damage_schema(output: Store, rows: list[dict[str, Any]]) -> str:
    rewrite(output, rows[1], lambda table: table.set_column(3, "score", table["score"].cast(pa.float64())))
    return r"its column 'score' is double, expected float \(as in"


def damage_footer(output: Store, rows: list[dict[str, Any]]) -> str:
    rewrite(output, rows[0], lambda table: table.replace_schema_metadata({}))
    return "its footer has no textsweep record"


def damage_other_chunk(output: Store, rows: list[dict[str, Any]]) -> str:
    output.replace(rows[0]["path"], output.read(rows[1]["path"]) or b"")
    rows[0]["bytes"] = rows[1]["bytes"]
    return "its footer says chunk 1, the manifest 0"


def damage_other_version(output: Store, rows: list[dict[str, Any]]) -> str:
    def change(table: pa.Table) -> pa.Table:
        record = json.loads(table.schema.metadata[FOOTER_KEY]) | {"version": OLD}
        return table.replace_schema_metadata({FOOTER_KEY: json.dumps(record)})

    rewrite(output, rows[0], change)
    return f"its footer says version '{OLD}', the manifest '{NEW}'"


def damage_bytes(output: Store, rows: list[dict[str, Any]]) -> str:
    rows[0]["bytes"] += 1
    return r"it has [\d,]+ bytes, the manifest says"


def damage_errors(output: Store, rows: list[dict[str, Any]]) -> str:
    rows[0]["errors"] = 0
    return "2 of its rows have an error, the manifest says 0"


def damage_name(output: Store, rows: list[dict[str, Any]]) -> str:
    output.create(f"{NEW}/other.parquet", output.read(rows[0]["path"]) or b"")
    rows[0]["path"] = f"{NEW}/other.parquet"
    return "its name does not fit the manifest"


def damage_chunk_missing(output: Store, rows: list[dict[str, Any]]) -> str:
    del rows[1]
    return r"its chunks are \[0, 2\], expected \[0, 1, 2\]"


def damage_chunk_twice(output: Store, rows: list[dict[str, Any]]) -> str:
    rows.append(rows[1])
    return r"its chunks are \[0, 1, 1, 2\], expected \[0, 1, 2\]"


def damage_gap(output: Store, rows: list[dict[str, Any]]) -> str:
    rows[2]["start"] += 5
    return "chunk 2 starts at row 105, expected 100"


def damage_two_identities(output: Store, rows: list[dict[str, Any]]) -> str:
    rows[2]["identity"] = "cd" * 6
    return r"2 identities in one manifest \(abababababab, cdcdcdcdcdcd\)"


DAMAGE = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda value: value.__name__.removeprefix("damage_"))
def test_every_damage_is_named(damage: Any, s3: LoopbackS3, capsys: pytest.CaptureFixture[str]) -> None:
    output = open_store(f"{s3.bucket()}/scores")
    publish_run(output, NEW, "friday", night(5), write_objects(output, NEW, SHARDS, bad_rows=2))
    rows = read_manifest(output).to_pylist()
    message = damage(output, rows)
    write_manifest(output, rows)
    with pytest.raises(
        IncompleteError, match=r"violations in \d of \d objects; delete the damaged ones and run jobs\.score again"
    ):
        run(output, "verify", "--json")
    found = [Violation(**one) for one in json.loads(capsys.readouterr().out)["violations"]]
    assert any(re.search(message, one.problem) for one in found), found
    assert all(one.path == "a" or "/a-" in one.path or "other" in one.path for one in found), "the other shard is whole"


def test_verify_tells_how_far_it_is(output: Store) -> None:
    seen: list[tuple[int, int, int]] = []
    verify(output, read_manifest(output), lambda *numbers: seen.append(numbers))
    assert seen == [(4, 4, 0)]


# roll back


def test_a_rollback_moves_readers_and_says_from_where(output: Store, capsys: pytest.CaptureFixture[str]) -> None:
    run(output, "rollback", "--run", "monday")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"before: run friday of version {NEW}, ")
    assert shown[1].startswith(f"after:  run monday of version {OLD}, {OLD}/_runs/monday/manifest.parquet")
    assert published_run(output) == "monday"
    before = output.read(POINTER_NAME)
    run(output, "rollback", "--run", "monday")
    assert "nothing was changed" in capsys.readouterr().out
    assert output.read(POINTER_NAME) == before


@pytest.mark.parametrize("version", [OLD, NEW])
def test_a_rollback_is_undone_by_what_is_planned_later_only(version: str, output: Store) -> None:
    going = datetime.now(UTC)  # a run that was planned before the rollback, and ends after it
    run(output, "rollback", "--run", "monday")
    manifest = write_objects(output, version, SHARDS)
    assert not publish_run(output, version, "going", going, manifest)
    assert published_run(output) == "monday"
    assert publish_run(output, version, "next", datetime.now(UTC) + timedelta(seconds=1), manifest)
    assert published_run(output) == "next"


def test_a_run_that_did_not_succeed_is_refused(output: Store) -> None:
    before = output.read(POINTER_NAME)
    with pytest.raises(UsageError, match=r"wednesday: this run is no success \(over_limit: it has no _SUCCESS\)"):
        run(output, "rollback", "--run", "wednesday")
    with pytest.raises(
        UsageError,
        match=r"no such run .*, did you mean 'monday'\? \(successful, latest last: monday, tuesday, friday\)",
    ):
        run(output, "rollback", "--run", "munday")
    assert output.read(POINTER_NAME) == before


def test_a_run_whose_objects_are_gone_is_refused_with_their_number(output: Store) -> None:
    manifest = read_manifest(output)
    for path in manifest["path"].to_pylist()[:2]:
        output.delete(path.replace(NEW, OLD))
    output.replace(manifest["path"].to_pylist()[2].replace(NEW, OLD), b"cut short")
    with pytest.raises(
        UsageError, match=rf"tuesday: 3 of its 4 objects are gone or have another size \(first: {OLD}/a-"
    ):
        run(output, "rollback", "--run", "tuesday")
    assert published_run(output) == "friday"


def test_a_run_of_two_versions_needs_its_version(output: Store) -> None:
    publish_run(output, NEW, "monday", night(1), write_objects(output, NEW, SHARDS))
    with pytest.raises(UsageError, match=rf"succeeded in 2 versions \({OLD}, {NEW}\); name one of them with --version"):
        run(output, "rollback", "--run", "monday")
    run(output, "rollback", "--run", "monday", "--version", OLD)
    published = read_published(output)
    assert published is not None
    assert published.pointer.version == OLD


def test_a_rollback_that_lost_a_race_changes_nothing(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    output = open_store(f"{s3.bucket()}/scores")
    manifest = write_objects(output, OLD, {"a": 1})
    publish_run(output, OLD, "monday", night(1), manifest)
    publish_run(output, OLD, "tuesday", night(2), manifest)
    met: list[str] = []

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault:
        if method == "PUT" and path.endswith(POINTER_NAME) and not met:
            met.append(path)
            publish_run(output, OLD, "wednesday", night(3), manifest)
        return Fault.NONE

    proxy.rule = rule
    with pytest.raises(IncompleteError, match="changed by another run meanwhile; nothing was rolled back"):
        run(output, "rollback", "--run", "monday")
    assert met
    assert published_run(output) == "wednesday"


# delete


def test_the_published_version_is_never_deleted(output: Store) -> None:
    before = output.list()
    with pytest.raises(UsageError, match=r"is published \(run friday\): readers use it"):
        run(output, "delete", "--version", NEW, "--yes")
    assert output.list() == before


def test_without_yes_only_the_size_is_told(output: Store) -> None:
    before = output.list()
    size = sum(row["size"] for row in output.at(OLD).list().to_pylist())
    with pytest.raises(
        UsageError, match=rf"12 files, {size / 1e6:.1f} MB would be deleted for good; nothing was; add --yes"
    ):
        run(output, "delete", "--version", OLD)
    assert output.list() == before


def test_a_deleted_version_leaves_nothing_and_nothing_else_is_touched(output: Store) -> None:
    before = [path for path in output.list()["path"].to_pylist() if path.startswith(NEW)]
    run(output, "delete", "--version", OLD, "--yes")
    assert sorted(path for path in output.list()["path"].to_pylist() if path != f"{POINTER_NAME}.lock") == sorted(
        [POINTER_NAME, *before]
    )
    assert list(output.folders()) == [NEW]
    run(output, "verify")


@pytest.mark.parametrize("name", ["", ".", "..", f"../{OLD}", "_runs", f"{OLD}/_runs", OLD[:-1], "archive"])
def test_only_versions_are_deleted(name: str, output: Store) -> None:
    output.create("archive/shard.parquet", b"")
    before = output.list()
    with pytest.raises(UsageError, match="expected 16 hex digits"):
        run(output, "delete", "--version", name, "--yes")
    assert output.list() == before


def test_a_deletion_killed_at_any_step_leaves_nothing_that_looks_whole(
    s3: LoopbackS3, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "DELETE_BATCH", 1)
    steps = 0
    while True:
        output = open_store(f"{s3.bucket()}/scores")
        proxy.rule = lambda method, path, headers: Fault.NONE
        publish_run(output, OLD, "monday", night(1), write_objects(output, OLD, {"a": 2}))
        publish_run(output, NEW, "friday", night(5), write_objects(output, NEW, {"a": 1}))
        files = output.at(OLD).list().num_rows
        writes: list[str] = []

        def rule(
            method: str, path: str, headers: dict[str, str], writes: list[str] = writes, allowed: int = steps
        ) -> Fault:
            if method not in ("PUT", "POST", "DELETE"):
                return Fault.NONE
            writes.append(path)
            return Fault.NONE if len(writes) <= allowed else Fault.DENIED

        proxy.rule = rule
        try:
            run(output, "delete", "--version", OLD, "--yes")
            break
        except UsageError as error:
            assert "not allowed to" in str(error)
        proxy.rule = lambda method, path, headers: Fault.NONE
        root = output.at("no-archive").url
        if steps == 0:
            assert read_archive(output.at(OLD), root, pa.schema([])) is not None, "nothing has happened yet"
        else:
            # A run of this version does not start, one under way does not publish, nobody rolls back to it.
            with pytest.raises(
                UsageError, match=rf"is being deleted since .*jobs\.publish delete --version {OLD} --yes"
            ):
                read_archive(output.at(OLD), root, pa.schema([]))
            with pytest.raises(IncompleteError, match="is being deleted; not published"):
                publish_run(output, OLD, "tuesday", night(9), pa.Table.from_pylist([], schema=MANIFEST_SCHEMA))
            with pytest.raises((UsageError, IncompleteError), match=r"is being deleted|no such run|no success"):
                run(output, "rollback", "--run", "monday")
            assert {one.state for one in versions.list_runs(output) if one.version == OLD} == {"deleting"}
            assert output.read(f"{OLD}/_runs/tuesday/_SUCCESS") is None
        assert published_run(output) == "friday"
        run(output, "delete", "--version", OLD, "--yes")
        assert list(output.folders()) == [NEW]
        steps += 1
    assert steps == files + 2, "the mark, the pointer, every file"


def test_files_that_appear_while_a_version_is_deleted_are_no_silence(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    output = open_store(f"{s3.bucket()}/scores")
    write_objects(output, OLD, {"a": 2})
    met: list[str] = []

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault:
        if method == "POST" and not met:
            met.append(path)
            output.create(f"{OLD}/late", b"from a worker that is still going")
        return Fault.NONE

    proxy.rule = rule
    with pytest.raises(IncompleteError, match=r"1 files appeared while it was deleted \(first: late\)"):
        run(output, "delete", "--version", OLD, "--yes")
    assert met
    run(output, "delete", "--version", OLD, "--yes")
    assert output.list().num_rows == 0


# the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rollback"], "rollback needs --run"),
        (["delete", "--yes"], "delete needs --version"),
        (["list", "--run", "monday"], "list does not take --run"),
        (["verify", "--yes"], "verify does not take --yes"),
        (["delete", "--version", "f" * 16, "--yes"], "no such version"),
        (["verify", "--run", "nobody"], "no such run"),
    ],
)
def test_mistakes_get_one_clear_message(arguments: list[str], message: str, output: Store) -> None:
    with pytest.raises(UsageError, match=message):
        run(output, *arguments)


def test_nothing_to_verify_is_a_mistake(any_url: str) -> None:
    with pytest.raises(UsageError, match="nothing is published"):
        run(open_store(any_url), "verify")
