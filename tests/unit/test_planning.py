"""Planning: chunks cover every row once whatever the layout, names parse back, and only whole shards count as finished."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib import planning
from lib.listing import LISTING_SCHEMA
from lib.planning import Chunk, RowGroup, bundle, chunks_of, cut, identity, over_limit, parse_objects, split_finished

MB = 2**20

row_groups = st.lists(
    st.builds(RowGroup, rows=st.integers(0, 3 * planning.MAX_CHUNK_ROWS), text_bytes=st.integers(0, 2_000 * MB)),
    max_size=12,
)
chunk_sizes = st.sampled_from([MB // 4, MB, 2 * MB, 64 * MB, 512 * MB])
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
awkward_names = st.one_of(
    names,
    st.sampled_from(
        [
            "part-00000-of-00001.parquet",
            "a b/c d.parquet",
            "dt=2026-11-20/x-of-y.parquet",
            "été/文書-0123456789ab-00000-of-00001.parquet",
            "line\nbreak.parquet",
            "-",
            "x-0123456789ab-00000-of-00001.parquet",
        ]
    ),
)


@given(row_groups, chunk_sizes)
def test_chunks_cover_every_row_once_in_order(groups: list[RowGroup], chunk_bytes: int) -> None:
    ranges = cut(groups, chunk_bytes)
    rows = sum(group.rows for group in groups)
    assert ranges[0][0] == 0
    assert all(start + count == following for (start, count, _), (following, _, _) in pairwise(ranges))
    assert ranges[-1][0] + ranges[-1][1] == rows
    if rows:
        assert all(0 < count <= planning.MAX_CHUNK_ROWS for _, count, _ in ranges)
    else:
        assert ranges == [(0, 0, 0)]


@given(row_groups, chunk_sizes)
def test_a_row_group_is_cut_only_if_it_is_far_too_large(groups: list[RowGroup], chunk_bytes: int) -> None:
    starts = {start for start, _, _ in cut(groups, chunk_bytes)}
    first = 0
    for group in groups:
        small = group.text_bytes <= planning.WHOLE_ROW_GROUP_CHUNKS * chunk_bytes
        if small and group.rows <= planning.MAX_CHUNK_ROWS:
            assert not any(first < start < first + group.rows for start in starts)
        first += group.rows


def test_a_footer_that_claims_petabytes_gives_no_more_chunks_than_rows() -> None:
    assert [bounds[:2] for bounds in cut([RowGroup(3, 2**60)], MB)] == [(0, 1), (1, 1), (2, 1)]


def test_a_row_group_without_rows_is_left_out_whatever_its_size() -> None:
    assert cut([RowGroup(0, 2**60), RowGroup(5, 10)], MB) == [(0, 5, 10)]


@given(st.lists(st.builds(RowGroup, rows=st.integers(1, 1000), text_bytes=st.integers(0, MB)), min_size=1, max_size=30))
def test_small_row_groups_are_put_together_up_to_the_chunk_size(groups: list[RowGroup]) -> None:
    ranges = cut(groups, MB)
    assert all(size <= MB for _, _, size in ranges)
    assert sum(size for _, _, size in ranges) == sum(group.text_bytes for group in groups)


@given(awkward_names, st.integers(0, 200_000), st.integers(0, 200_000))
def test_object_names_parse_back(shard: str, index: int, more: int) -> None:
    chunk = Chunk(shard, "0123456789ab", index, index + more + 1, 0, 1, 1)
    table = planning.with_names(parse_objects(pa.chunked_array([[chunk.name]])))
    assert table.to_pylist() == [
        {"shard": shard, "identity": chunk.identity, "chunk": index, "chunks": chunk.count, "path": chunk.name}
    ]


def test_different_chunks_never_share_a_name() -> None:
    shards = ["a.parquet", "a.parquet-0123456789ab", "b/a.parquet", "a.parquet-0123456789ab-00000-of-00001.parquet"]
    chunks = [Chunk(shard, "0123456789ab", index, 3, 0, 1, 1) for shard in shards for index in range(3)]
    assert len({chunk.name for chunk in chunks}) == len(chunks)


@pytest.mark.parametrize(
    "name",
    [
        "_archive.json",
        "a.parquet",
        "_runs/x/manifest.parquet",
        "a-0123456789ab-00000-of-00001.parquet.lock",
        "a-0123456789AB-00000-of-00001.parquet",
        f"a-0123456789ab-00000-of-{'9' * 30}.parquet",
    ],
)
def test_other_names_are_no_objects(name: str) -> None:
    assert parse_objects(pa.chunked_array([[name]])).num_rows == 0


def listing(*shards: str) -> pa.Table:
    rows = [{"path": shard, "size": 10, "etag": shard, "mtime_ns": None} for shard in shards]
    return planning.with_identities(pa.Table.from_pylist(rows, LISTING_SCHEMA), MB)


def objects(*chunks: Chunk) -> pa.Table:
    return parse_objects(pa.chunked_array([[chunk.name for chunk in chunks]], pa.string()))


def test_a_shard_is_finished_only_with_all_of_its_chunks() -> None:
    shards = listing("c.parquet", "a.parquet", "b.parquet")
    identities = dict(zip(*(shards[name].to_pylist() for name in ("path", "identity")), strict=True))
    groups = [RowGroup(10, MB)] * 3
    made = {name: chunks_of(name, identities[name], groups, MB) for name in identities}
    stale = chunks_of("c.parquet", "0" * 12, groups, MB)
    found = objects(*made["a.parquet"], *made["b.parquet"][:2], *stale)
    finished, unfinished = split_finished(shards, found)
    assert finished["path"].to_pylist() == ["a.parquet"]
    assert unfinished["path"].to_pylist() == ["c.parquet", "b.parquet"], "in the order they came"
    assert finished.schema == unfinished.schema == shards.schema


def test_chunks_with_the_same_number_do_not_complete_a_shard() -> None:
    shards = listing("a.parquet")
    chunks = chunks_of("a.parquet", shards["identity"][0].as_py(), [RowGroup(10, MB)] * 2, MB)
    finished, _ = split_finished(shards, objects(chunks[0], chunks[0]))
    assert not finished.num_rows


def test_without_objects_nothing_is_finished() -> None:
    finished, unfinished = split_finished(listing("a.parquet", "b.parquet"), objects())
    assert (finished.num_rows, unfinished.num_rows) == (0, 2)


BASE = {"size": 10, "etag": "abc", "mtime_ns": 5, "chunk_bytes": MB}


@pytest.mark.parametrize("change", [{"size": 11}, {"etag": "abd"}, {"etag": None}, {"chunk_bytes": 2 * MB}], ids=str)
def test_identity_changes_with_what_decides_the_chunks(change: dict[str, object]) -> None:
    assert identity(**(BASE | change)) != identity(**BASE)  # type: ignore[arg-type]


def test_identity_uses_the_time_only_without_an_etag() -> None:
    assert identity(10, "abc", 5, MB) == identity(10, "abc", 6, MB)
    assert identity(10, None, 5, MB) != identity(10, None, 6, MB)


def test_identity_changes_with_the_planning_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(10, "abc", 5, MB)
    monkeypatch.setattr(planning, "PLANNING_REVISION", planning.PLANNING_REVISION + 1)
    assert identity(10, "abc", 5, MB) != before


chunk_lists = st.lists(
    st.builds(
        Chunk,
        shard=st.sampled_from(["a", "b"]),
        identity=st.just("0123456789ab"),
        index=st.integers(0, 9),
        count=st.just(10),
        start=st.just(0),
        rows=st.integers(1, planning.MAX_CHUNK_ROWS),
        text_bytes=st.integers(0, 8 * MB),
    ),
    max_size=60,
)


@given(chunk_lists, chunk_sizes)
def test_blocks_keep_every_chunk_once_in_order_and_are_bounded(chunks: list[Chunk], chunk_bytes: int) -> None:
    blocks = list(bundle(chunks, chunk_bytes))
    assert [chunk for block in blocks for chunk in block] == chunks
    for block in blocks:
        assert block
        assert len(block) == 1 or sum(chunk.text_bytes for chunk in block) <= chunk_bytes
        assert sum(chunk.rows for chunk in block) <= planning.MAX_CHUNK_ROWS
        assert len(block) == 1 or len(block) <= chunk_bytes // planning.OPENING_COST_BYTES


def test_tiny_shards_are_bundled() -> None:
    chunks = [Chunk(f"{number}.parquet", "0123456789ab", 0, 1, 0, 10, 1000) for number in range(1000)]
    assert len(list(bundle(chunks, 64 * MB))) == 4


@pytest.mark.parametrize(
    ("bad", "total", "limit", "expected"),
    [
        (0, 0, 0, False),
        (1, 10, 0, True),
        (1, 10, 1, False),
        (2, 10, 1, True),
        (1, 100, 0.01, False),
        (2, 100, 0.01, True),
        (1, 99, 0.01, True),
        (10, 10, 1.0, False),
        (1, 10, 0.0, True),
    ],
)
def test_limits_are_counts_or_fractions(bad: int, total: int, limit: float, expected: bool) -> None:
    assert over_limit(bad, total, limit) is expected


@given(row_groups, chunk_sizes, st.sets(st.integers(0, 4 * planning.MAX_CHUNK_ROWS), max_size=20))
def test_selected_rows_are_in_the_chunk_that_holds_them(
    groups: list[RowGroup], chunk_bytes: int, wanted: set[int]
) -> None:
    chunks = chunks_of("a.parquet", "0" * 12, groups, chunk_bytes)
    rows = sum(group.rows for group in groups)
    found = planning.select_rows(chunks, np.array(sorted(wanted), np.int64))
    assert [row for chunk in found for row in chunk.only or ()] == sorted(row for row in wanted if row < rows)
    assert all(chunk.start <= row < chunk.start + chunk.rows for chunk in found for row in chunk.only or ())
    assert [(chunk.index, chunk.count) for chunk in found] == [(index, len(found)) for index in range(len(found))]
    assert len(found) >= 1


# what is kept, and what is stale

shard_names = st.sampled_from(["a.parquet", "b/c.parquet", "x-0123456789ab-00000-of-00001.parquet", "y-0123456789ab"])
identities = st.sampled_from(["0" * 12, "1" * 12, "0123456789ab"])
contents = st.lists(st.tuples(shard_names, identities), unique=True, max_size=8)


def named(pairs: list[tuple[str, str]]) -> pa.Table:
    return pa.table(
        {
            name: pa.array([pair[index] for pair in pairs], pa.string())
            for index, name in enumerate(("shard", "identity"))
        }
    )


def objects_of(pairs: list[tuple[str, str]], chunks: int = 2) -> list[str]:
    return [
        f"{shard}-{identity}-{index:05d}-of-{chunks:05d}.parquet"
        for shard, identity in pairs
        for index in range(chunks)
    ]


@given(contents, contents, contents, st.integers(0, 20))
def test_stale_is_what_nothing_current_names_since_it_was_first_seen(
    there: list[tuple[str, str]], current: list[tuple[str, str]], before: list[tuple[str, str]], now: int
) -> None:
    letters = [f"_dead_letter/{name}" for name in objects_of(there)[:3]] + [
        f"_dead_letter/{shard}-{identity}.parquet" for shard, identity in there[:1]
    ]
    paths = [*objects_of(there), *letters, "_archive.json", "_runs/one/manifest.parquet"]
    since = named(before).append_column("since_ns", pa.array([10] * len(before), pa.int64()))
    found = planning.find_stale(
        pa.table({"path": pa.array(paths, pa.string())}), named(current), since, now
    ).to_pylist()
    stale = [pair for pair in there if pair not in current]
    expected = {
        path
        for path in paths
        if any(path.removeprefix("_dead_letter/").startswith(f"{shard}-{identity}") for shard, identity in stale)
    }
    expected -= {
        path
        for path in paths
        if any(
            path.removeprefix("_dead_letter/") in [*objects_of([pair]), f"{pair[0]}-{pair[1]}.parquet"]
            for pair in current
        )
    }
    assert {one["path"] for one in found} == expected
    assert all(one["since_ns"] == (min(10, now) if (one["shard"], one["identity"]) in before else now) for one in found)


@given(contents | st.just("all") | st.just("deleted"), contents, contents, st.booleans(), st.integers(1, 3))
def test_a_manifest_names_exactly_what_is_finished_and_what_is_kept(
    manifest: list[tuple[str, str]] | str,
    archive: list[tuple[str, str]],
    deleted: list[tuple[str, str]],
    keep: bool,
    size: int,
) -> None:
    shards = named(archive).rename_columns(["path", "identity"])
    objects = parse_objects(pa.chunked_array([pa.array(objects_of([*archive, *deleted]), pa.string())]))
    if isinstance(manifest, str):  # what is seldom drawn: the archive, and what was ever there or what is not any more
        manifest = [*archive, *(one for one in deleted if manifest == "all" or one[0] not in dict(archive))]
    expected = {*archive, *(pair for pair in manifest if keep and pair in deleted and pair[0] not in dict(archive))}
    repeated = pa.concat_tables([named(manifest), named(manifest)])
    parts = [repeated.slice(start, size) for start in range(0, repeated.num_rows, size)]
    assert planning.names_exactly(parts, shards, shards, objects, keep) == (set(manifest) == expected)


@given(contents, st.lists(shard_names, unique=True), contents)
def test_kept_are_the_objects_of_shards_that_only_the_manifest_names(
    manifest: list[tuple[str, str]], listed: list[str], there: list[tuple[str, str]]
) -> None:
    objects = parse_objects(pa.chunked_array([pa.array(objects_of(there), pa.string())]))
    kept = planning.find_kept(named(manifest), pa.table({"path": pa.array(listed, pa.string())}), objects)
    expected = [pair for pair in manifest if pair[0] not in listed and pair in there]
    assert sorted(planning.with_names(kept)["path"].to_pylist()) == sorted(objects_of(expected))
