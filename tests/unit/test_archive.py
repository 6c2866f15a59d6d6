"""The archive: bad rows keep their places, bad files are told apart from bad storage, names and types are checked early."""

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.parquet.encryption import CryptoFactory, EncryptionConfiguration, KmsClient, KmsConnectionConfig

from jobs.demo_store import LoopbackS3
from lib import reading
from lib.archive import (
    BadShardError,
    Columns,
    find_root,
    is_shard,
    list_shards,
    read_row_groups,
    refuse_output_inside,
    resolve_columns,
)
from lib.errors import UsageError
from lib.planning import Chunk, chunks_of, identity
from lib.reading import ChangedShardError, Rows, check_texts, read_rows
from lib.s3 import code_of
from lib.schema import RowError
from lib.storage import Store, open_store
from tests.fakes import to_parquet, write_archive
from tests.proxy import Fault, FaultyProxy

MB = 2**20
NO_KEYS = pa.schema([])
NO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"
TEXT = Columns(text=("text",), keys=NO_KEYS)

GOOD, NULL, EMPTY, UNDECODABLE, UNREADABLE = (
    RowError.NONE,
    RowError.NULL,
    RowError.EMPTY,
    RowError.UNDECODABLE,
    RowError.UNREADABLE,
)


def plan(store: Store, path: str, columns: Columns, chunk_bytes: int = MB) -> list[Chunk]:
    info = store.info(path)
    assert info
    name = identity(info.size, info.etag, info.mtime_ns, chunk_bytes)
    return chunks_of(path, name, read_row_groups(store, path, columns), chunk_bytes)


def read_all(store: Store, path: str, columns: Columns = TEXT, chunk_bytes: int = MB) -> Rows:
    """Plan and read a whole shard, texts as lists, and check that every chunk has the rows that were planned."""
    chunks = plan(store, path, columns, chunk_bytes)
    found = list(read_rows(store, chunks, columns, chunk_bytes))
    for chunk in chunks:
        assert sum(len(rows.errors) for of, rows in found if of == chunk) == chunk.rows
    parts = [rows for _, rows in found]
    assert all(part.keys.num_rows == len(part.errors) or not columns.keys for part in parts)
    assert all(len(texts) == np.count_nonzero(part.errors == GOOD) for part in parts for texts in part.texts)
    texts = tuple(
        [text for part in parts for text in part.texts[side].to_pylist()] for side in range(len(columns.text))
    )
    return Rows(texts, np.concatenate([part.errors for part in parts]), pa.concat_tables([part.keys for part in parts]))


def one_shard(folder: Path, table: pa.Table | bytes, **options: object) -> Store:
    write_archive(str(folder), {"x.parquet": table if isinstance(table, bytes) else to_parquet(table, **options)})  # type: ignore[arg-type]
    return open_store(str(folder))


# rows


def test_every_kind_of_bad_row_keeps_its_place(tmp_path: Path) -> None:
    texts = pa.array([b"first", None, b"", b" \t\n\xc2\xa0", b"\xff\xfe", b"\xed\xa0\x80", b"caf\xc3\xa9", b"\x00"])
    rows = read_all(one_shard(tmp_path, pa.table({"text": texts})), "x.parquet")
    assert rows.errors.tolist() == [GOOD, NULL, EMPTY, EMPTY, UNDECODABLE, UNDECODABLE, GOOD, GOOD]
    assert rows.texts == (["first", "café", "\x00"],)


def test_white_space_and_letters_without_width_are_empty(tmp_path: Path) -> None:
    blank = ["\u00a0", "\u3000 \u2003", "\u200b", "\ufeff", "\u200d\u2060 \u200c", "\u2028\u2029\x85", "\x1c\x1d"]
    others = ["\u200bx", "\u00ad", "\x00", "\u2800", "."]
    rows = read_all(one_shard(tmp_path, pa.table({"text": blank + others})), "x.parquet")
    assert rows.errors.tolist() == [EMPTY] * len(blank) + [GOOD] * len(others)
    assert rows.texts == (others,), "texts are handed on as they are"


def test_ten_megabytes_of_one_letter_are_one_row_of_many(tmp_path: Path) -> None:
    texts = ["first", "x" * 10_000_000, "\u3000" * 3_333_333, "last"]
    rows = read_all(one_shard(tmp_path, pa.table({"text": texts})), "x.parquet")
    assert rows.errors.tolist() == [GOOD, GOOD, EMPTY, GOOD]
    assert rows.texts == ([texts[0], texts[1], texts[3]],)


@pytest.mark.parametrize(
    ("bad", "error"),
    [(b"\xff", UNDECODABLE), (b"\xed\xa0\x80", UNDECODABLE), (b"\xc2\xa0", EMPTY), (None, NULL)],
    ids=["no UTF-8", "surrogate", "white space", "null"],
)
def test_one_bad_row_of_a_million_costs_one_row(bad: bytes | None, error: RowError, tmp_path: Path) -> None:
    texts: list[bytes | None] = [b"text %d" % number for number in range(1_000_000)]
    texts[777_777] = bad
    table = pa.table({"text": pa.array(texts, pa.binary()).view(pa.string())})
    rows = read_all(one_shard(tmp_path, table, row_group_size=1_000_000), "x.parquet", chunk_bytes=64 * MB)
    assert np.flatnonzero(rows.errors).tolist() == [777_777]
    assert rows.errors[777_777] == error
    assert rows.texts[0] == [f"text {number}" for number in range(1_000_000) if number != 777_777]


def test_a_batch_of_texts_stays_small_whatever_the_footer_says(tmp_path: Path) -> None:
    # One text of 400,000 letters behind a dictionary: 0.4 GB of text, of which the footer counts 0.4 MB.
    table = pa.table({"text": [*["z" * 400_000] * 1_000, "end"], "id": range(1_001)})
    store = one_shard(tmp_path, table)
    columns = Columns(text=("text",), keys=pa.schema([("id", pa.int64())]))
    batches = [rows for _, rows in read_rows(store, plan(store, "x.parquet", columns), columns, MB)]
    assert max(rows.size for rows in batches) <= reading.READ_BATCH_BYTES
    assert [key for rows in batches for key in rows.keys["id"].to_pylist()] == list(range(1_001))
    assert [len(text) for rows in batches for text in rows.texts[0].to_pylist()] == [400_000] * 1_000 + [3]


def test_invalid_utf8_in_a_column_that_claims_to_be_text(tmp_path: Path) -> None:
    # Other writers do not check: a string column can hold any bytes.
    texts = pa.array([b"good", b"\xff", b"cut \xe2\x82"]).view(pa.string())
    rows = read_all(one_shard(tmp_path, pa.table({"text": texts})), "x.parquet")
    assert rows.errors.tolist() == [GOOD, UNDECODABLE, UNDECODABLE]
    assert rows.texts == (["good"],)


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_text_of_every_type_is_read(kind: pa.DataType, tmp_path: Path) -> None:
    plain = pa.array(["one", None, "", "two", "one"])
    texts = plain.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else plain.cast(kind)
    rows = read_all(one_shard(tmp_path, pa.table({"text": texts})), "x.parquet")
    assert rows.errors.tolist() == [GOOD, NULL, EMPTY, GOOD, GOOD]
    assert rows.texts == (["one", "two", "one"],)


def test_a_column_of_nulls_without_a_type_is_all_null_rows(tmp_path: Path) -> None:
    rows = read_all(one_shard(tmp_path, pa.table({"text": pa.nulls(3)})), "x.parquet")
    assert rows.errors.tolist() == [NULL] * 3


def test_a_nested_column_is_read_by_its_path(tmp_path: Path) -> None:
    posts = [{"body": "one", "votes": 1}, None, {"body": None, "votes": 2}, {"body": "two", "votes": 3}]
    store = one_shard(tmp_path, pa.table({"post": posts, "text": [1, 2, 3, 4]}))
    rows = read_all(store, "x.parquet", Columns(text=("post.body",), keys=NO_KEYS))
    assert rows.errors.tolist() == [GOOD, NULL, NULL, GOOD]
    assert rows.texts == (["one", "two"],)


def test_a_column_with_a_dot_in_its_name_is_read(tmp_path: Path) -> None:
    rows = read_all(one_shard(tmp_path, pa.table({"a.b": ["one"]})), "x.parquet", Columns(text=("a.b",), keys=NO_KEYS))
    assert rows.texts == (["one"],)


def test_pairs_need_both_texts_and_tell_the_worse_error(tmp_path: Path) -> None:
    table = pa.table({"first": ["a", None, "c", ""], "second": ["A", "B", "", None]})
    rows = read_all(one_shard(tmp_path, table), "x.parquet", Columns(text=("first", "second"), keys=NO_KEYS))
    assert rows.errors.tolist() == [GOOD, NULL, EMPTY, EMPTY]
    assert rows.texts == (["a"], ["A"])


def test_keys_stay_beside_their_rows_in_the_fixed_types(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", None, "c"], "id": pa.array([1, 2, None], pa.int32()), "day": ["x", "y", "z"]})
    columns = Columns(text=("text",), keys=pa.schema([("day", pa.string()), ("id", pa.int64())]))
    rows = read_all(one_shard(tmp_path, table), "x.parquet", columns)
    assert rows.keys.schema == columns.keys
    assert rows.keys.to_pylist() == [{"day": "x", "id": 1}, {"day": "y", "id": 2}, {"day": "z", "id": None}]


def test_the_text_itself_can_be_a_key(tmp_path: Path) -> None:
    columns = Columns(text=("text",), keys=pa.schema([("text", pa.string())]))
    rows = read_all(one_shard(tmp_path, pa.table({"text": ["a", None]})), "x.parquet", columns)
    assert rows.keys.to_pylist() == [{"text": "a"}, {"text": None}]


@given(st.lists(st.one_of(st.none(), st.binary(max_size=8), st.text(max_size=5).map(str.encode)), max_size=30))
def test_texts_and_errors_agree_with_a_naive_loop(values: list[bytes | None]) -> None:
    texts, errors = check_texts(pa.array(values, pa.binary()))
    for value, text, error in zip(values, texts.to_pylist(), errors, strict=True):
        if value is None:
            assert error == NULL
            continue
        try:
            expected = value.decode()
        except UnicodeDecodeError:
            assert error == UNDECODABLE
            continue
        assert text == expected
        assert error == (EMPTY if all(letter.isspace() or letter in NO_WIDTH for letter in expected) else GOOD)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 12))
def test_chunks_of_any_layout_read_back_every_row_once(
    tmp_path_factory: pytest.TempPathFactory, groups: list[int], batch_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("layout")
    total = sum(groups)
    texts = [f"row {number} {'x' * 200}" for number in range(total)]
    sink = pa.BufferOutputStream()
    with pa.parquet.ParquetWriter(sink, pa.schema([("text", pa.string())])) as writer:
        for end, rows in zip(np.cumsum(groups), groups, strict=True):
            writer.write_table(pa.table({"text": pa.array(texts[end - rows : end], pa.string())}))
    store = one_shard(folder, sink.getvalue().to_pybytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "READ_BATCH_ROWS", batch_rows)
        chunks = plan(store, "x.parquet", TEXT, chunk_bytes=400)
        found = [text for _, rows in read_rows(store, chunks, TEXT, 400) for text in rows.texts[0].to_pylist()]
    assert found == texts
    assert sum(chunk.rows for chunk in chunks) == total


# damaged files


def damaged(rows: int = 400, groups: int = 4) -> tuple[bytes, list[str]]:
    """A shard whose third of four row groups has a flipped bit in the middle of its text."""
    texts = [f"text number {number:06d}" for number in range(rows)]
    keys = list(range(rows))
    content = bytearray(
        to_parquet(
            pa.table({"text": texts, "id": keys}),
            row_group_size=rows // groups,
            compression="none",
            use_dictionary=False,
            write_page_checksum=True,
        )
    )
    middle = content.index(f"number {rows * 5 // 8:06d}".encode())
    content[middle] ^= 1
    return bytes(content), texts


def test_a_damaged_page_costs_the_rows_of_its_row_group_only(tmp_path: Path) -> None:
    content, texts = damaged()
    columns = Columns(text=("text",), keys=pa.schema([("id", pa.int64())]))
    rows = read_all(one_shard(tmp_path, content), "x.parquet", columns)
    assert rows.errors.tolist() == [GOOD] * 200 + [UNREADABLE] * 100 + [GOOD] * 100
    assert rows.texts == (texts[:200] + texts[300:],)
    assert rows.keys["id"].to_pylist() == [*range(200), *[None] * 100, *range(300, 400)]


def test_rows_before_the_damage_in_a_row_group_are_kept_if_they_can_be_read(tmp_path: Path) -> None:
    texts = [f"text number {number:06d}" for number in range(60_000)]
    table = pa.table({"text": texts})
    content = bytearray(
        to_parquet(table, compression="none", use_dictionary=False, write_page_checksum=True, data_page_size=20_000)
    )
    content[content.index(b"number 050000")] ^= 1
    rows = read_all(one_shard(tmp_path, bytes(content)), "x.parquet", chunk_bytes=64 * MB)
    good = int(np.count_nonzero(rows.errors == GOOD))
    assert 40_000 < good < 50_000
    assert (rows.errors[:good] == GOOD).all()
    assert (rows.errors[good:] == UNREADABLE).all()
    assert rows.texts[0] == texts[:good]


@pytest.mark.parametrize(
    "content",
    [b"", b"PAR1", b"not Parquet at all", damaged()[0][:-20], damaged()[0][: len(damaged()[0]) // 2]],
    ids=["empty", "magic only", "other", "footer cut", "half"],
)
def test_a_file_without_a_readable_footer_is_a_bad_shard(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(BadShardError, match="not a readable Parquet file"):
        read_row_groups(one_shard(tmp_path, content), "x.parquet", TEXT)


def test_bytes_missing_in_the_middle_are_unreadable_rows(tmp_path: Path) -> None:
    content, _ = damaged()
    hole = bytearray(content)
    start = hole.index(b"number 000120")
    hole[start : start + 500] = bytes(500)
    rows = read_all(one_shard(tmp_path, bytes(hole)), "x.parquet")
    assert (rows.errors[100:200] == UNREADABLE).all()
    assert (rows.errors[:100] == GOOD).all()


def test_an_answer_whose_bytes_changed_on_their_way_is_asked_for_again(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    """Each answer in turn, footers and pages alike: bytes that are right in the storage give no bad row and no bad shard."""
    # Larger than what is read for a footer: S3 sends its own checksum with a whole object alone.
    table = pa.table({"text": [f"number {row} " * 30 for row in range(600)]})
    store = open_store(s3.bucket())
    content = to_parquet(table, row_group_size=200, write_page_checksum=True, use_dictionary=False, compression="none")
    write_archive(store.url, {"x.parquet": content})
    gets = turn = flips = 0

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault:
        nonlocal gets, flips
        if method != "GET" or "range" not in headers:
            return Fault.NONE
        gets += 1
        flips += gets == turn
        return Fault.FLIPPED if gets == turn else Fault.NONE

    proxy.rule = rule
    while turn == flips:
        gets, turn = 0, turn + 1
        rows = read_all(store, "x.parquet")
        assert rows.texts[0] == table["text"].to_pylist(), turn
        assert (rows.errors == GOOD).all()
    assert flips >= 5, "two looks at the footer, three row groups"


def encrypted(plaintext_footer: bool) -> bytes:
    """A shard whose text column is encrypted."""

    class Keys(KmsClient):
        def wrap_key(self, key_bytes: bytes, _: str) -> bytes:
            return base64.b64encode(key_bytes)

    configuration = EncryptionConfiguration(
        footer_key="one", column_keys={"two": ["text"]}, plaintext_footer=plaintext_footer
    )
    factory = CryptoFactory(lambda _: Keys())
    options = factory.file_encryption_properties(KmsConnectionConfig(), configuration)
    return to_parquet(pa.table({"text": ["secret"], "id": [1]}), encryption_properties=options)


@pytest.mark.parametrize(
    ("plaintext_footer", "message"),
    [(False, "not a readable Parquet file: .*encrypt"), (True, "columns are encrypted")],
)
def test_an_encrypted_shard_is_a_bad_shard(plaintext_footer: bool, message: str, tmp_path: Path) -> None:
    # With a plain footer PyArrow 26 ends the process when it is asked for the size of an encrypted column.
    with pytest.raises(BadShardError, match=message):
        read_row_groups(one_shard(tmp_path, encrypted(plaintext_footer)), "x.parquet", TEXT)


def test_a_footer_that_contradicts_itself_is_a_bad_shard(tmp_path: Path) -> None:
    content = to_parquet(pa.table({"text": ["a"] * 99}), store_schema=False)
    where = content.rindex(b"\x16\xc6\x01")  # 99 as the last of Thrift's numbers is the row group's count
    with pytest.raises(BadShardError, match=r"its footer says 99 rows, its row groups add up to 98"):
        read_row_groups(
            one_shard(tmp_path, content[:where] + b"\x16\xc4\x01" + content[where + 3 :]), "x.parquet", TEXT
        )


@pytest.mark.parametrize(
    "texts",
    [[1, 2], [{"a": "b"}], [["a"]], [1.5], [True], pa.array([b"four"], pa.binary(4)), pa.array(['"a"'], pa.json_())],
    ids=["int", "struct", "list", "float", "bool", "fixed binary", "json"],
)
def test_a_column_that_holds_no_text_is_a_bad_shard(texts: object, tmp_path: Path) -> None:
    with pytest.raises(BadShardError, match=r"column 'text' is .*, expected text"):
        read_row_groups(one_shard(tmp_path, pa.table({"text": texts})), "x.parquet", TEXT)


def test_columns_beside_the_text_are_not_read(tmp_path: Path) -> None:
    table = pa.table(
        {
            "nested": [{"text": "x", "more": [1, 2]}, None],
            "text": ["one", "two"],
            "lists": [[["deep"]], []],
            "map": pa.array([[("key", 1)], None], pa.map_(pa.string(), pa.int64())),
            "text.x": ["other", "other"],
            "twice": [1, 2],
        }
    )
    table = table.append_column("twice", pa.array([3, 4]))
    rows = read_all(one_shard(tmp_path, table), "x.parquet")
    assert rows.texts == (["one", "two"],)


def test_damage_in_a_column_beside_the_text_costs_nothing(tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two"], "beside": ["damage here", "x"]})
    plain: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    content = bytearray(to_parquet(table, write_page_checksum=True, **plain))
    content[content.index(b"damage")] ^= 1
    rows = read_all(one_shard(tmp_path, bytes(content)), "x.parquet")
    assert rows.texts == (["one", "two"],)


@pytest.mark.parametrize("groups", [0, 1], ids=["no row group", "one without rows"])
def test_a_shard_without_rows_has_one_empty_chunk(groups: int, tmp_path: Path) -> None:
    sink = pa.BufferOutputStream()
    with pa.parquet.ParquetWriter(sink, pa.schema([("text", pa.string())])) as writer:
        for _ in range(groups):
            writer.write_table(pa.table({"text": pa.array([], pa.string())}))
    store = one_shard(tmp_path, sink.getvalue().to_pybytes())
    chunks = plan(store, "x.parquet", TEXT)
    assert [chunk.rows for chunk in chunks] == [0]
    assert list(read_rows(store, chunks, TEXT, MB)) == []


def test_a_row_group_of_two_million_rows_is_read_in_parts(tmp_path: Path) -> None:
    texts = [f"{number}" for number in range(2_000_000)]
    store = one_shard(tmp_path, pa.table({"text": texts}), row_group_size=2_000_000)
    chunks = plan(store, "x.parquet", TEXT, 64 * MB)
    assert len(chunks) == 8
    assert read_all(store, "x.parquet", chunk_bytes=64 * MB).texts == (texts,)


# storage that fails


def deny_reads(proxy: FaultyProxy) -> None:
    proxy.rule = lambda method, path, headers: (
        Fault.DENIED if method == "GET" and "list-type" not in path else Fault.NONE
    )


def test_storage_that_fails_at_the_footer_makes_no_bad_shard(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    url = s3.bucket()
    write_archive(url, {"x.parquet": pa.table({"text": ["a"]})})
    deny_reads(proxy)
    with pytest.raises(PermissionError) as refused:
        read_row_groups(open_store(url), "x.parquet", TEXT)
    assert code_of(refused.value) == "AccessDenied"


def test_storage_that_fails_at_the_rows_makes_no_bad_rows(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    url = s3.bucket()
    content = to_parquet(pa.table({"text": [f"{number:0100d}" for number in range(20_000)]}), 5_000, compression="none")
    write_archive(url, {"x.parquet": content})
    store = open_store(url)
    chunks = plan(store, "x.parquet", TEXT)
    found: list[Rows] = []
    with pytest.raises(PermissionError) as refused:
        for _, rows in read_rows(store, chunks, TEXT, MB):
            found.append(rows)
            deny_reads(proxy)
    assert code_of(refused.value) == "AccessDenied"
    assert found
    assert all((rows.errors == GOOD).all() for rows in found)


# changed shards


def test_a_shard_with_another_content_is_changed(any_url: str) -> None:
    write_archive(any_url, {"x.parquet": pa.table({"text": ["a"]})})
    store = open_store(any_url)
    chunks = plan(store, "x.parquet", TEXT)
    write_archive(any_url, {"x.parquet": pa.table({"text": ["b", "c"]})})
    with pytest.raises(ChangedShardError, match=r"x\.parquet: its content is not the one that was listed"):
        list(read_rows(store, chunks, TEXT, MB))


def test_a_shard_that_is_gone_is_changed(any_url: str) -> None:
    write_archive(any_url, {"x.parquet": pa.table({"text": ["a"]})})
    store = open_store(any_url)
    chunks = plan(store, "x.parquet", TEXT)
    store.delete("x.parquet")
    with pytest.raises(ChangedShardError, match="is gone"):
        list(read_rows(store, chunks, TEXT, MB))


def growing(url: str) -> tuple[Store, list[Chunk], bytes]:
    """A shard of several row groups, its chunks, and what it will be rewritten with: as long, another text."""
    contents = [
        to_parquet(
            pa.table({"text": [f"{letter}{number:099d}" for number in range(20_000)]}), 5_000, compression="none"
        )
        for letter in "ab"
    ]
    write_archive(url, {"x.parquet": contents[0]})
    store = open_store(url)
    assert len(contents[0]) == len(contents[1])
    return store, plan(store, "x.parquet", TEXT), contents[1]


def rewrite(store: Store, content: bytes) -> None:
    """Write over the file in place, as a program does that does not know better; on S3 there is only one way."""
    if store.is_local:
        Path(store.full("x.parquet")).write_bytes(content)
    else:
        store.replace("x.parquet", content)


@pytest.mark.parametrize("change", ["other text", "grown", "cut", "gone", "replaced"])
def test_a_shard_that_changes_while_it_is_read_is_changed_and_never_mixed(change: str, any_url: str) -> None:
    store, chunks, other = growing(any_url)
    found: list[Rows] = []
    with pytest.raises(ChangedShardError, match=r"x\.parquet: it was changed or removed while it was read"):
        for _, rows in read_rows(store, chunks, TEXT, MB):
            if not found:
                if change == "gone":
                    store.delete("x.parquet")
                elif change == "replaced":
                    store.replace("x.parquet", other)
                else:
                    rewrite(store, {"other text": other, "grown": other + other, "cut": other[:600_000]}[change])
            found.append(rows)
    assert found, "the change must hit a shard that is being read"


# names

NAMES = [
    "a.parquet",
    "b.PARQUET",
    "c.pq",
    "d.txt",
    "_e.parquet",
    ".f.parquet",
    "_tmp/g.parquet",
    "dt=2026-11-20/h.parquet",
    "dt=2026-11-21/.x/i.parquet",
    "deep/er/j.parquet",
    "noending",
]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a.parquet", "b.PARQUET", "c.pq", "deep/er/j.parquet", "dt=2026-11-20/h.parquet"]),
        ("*.parquet", ["a.parquet"]),
        ("*", ["a.parquet", "b.PARQUET", "c.pq", "d.txt", "noending"]),
        ("**/*.parquet", ["a.parquet", "deep/er/j.parquet", "dt=2026-11-20/h.parquet"]),
        ("dt=*/*.parquet", ["dt=2026-11-20/h.parquet"]),
        ("[ab].*", ["a.parquet", "b.PARQUET"]),
        ("?.pq", ["c.pq"]),
        ("de*/**", ["deep/er/j.parquet"]),
    ],
)
def test_what_belongs_to_the_archive(pattern: str, expected: list[str], any_url: str) -> None:
    store = open_store(any_url)
    for name in NAMES:
        store.create(name, b"x")
    root, shards = list_shards(f"{any_url}/{pattern}" if pattern else any_url)
    assert root.url == store.url
    assert shards["path"].to_pylist() == expected
    assert shards["path"].to_pylist() == sorted(name for name in NAMES if is_shard(name, pattern))


def test_one_file_is_an_archive(any_url: str) -> None:
    write_archive(any_url, {"sub/x.parquet": pa.table({"text": ["a"]}), "sub/y.parquet": pa.table({"text": ["a"]})})
    root, shards = list_shards(f"{any_url}/sub/x.parquet")
    assert (root.url, shards["path"].to_pylist()) == (open_store(f"{any_url}/sub").url, ["x.parquet"])


def test_a_folder_that_is_named_like_a_file_is_a_whole_archive(any_url: str) -> None:
    folder = f"{any_url}/reviews.parquet"
    write_archive(folder, {"part-1.parquet": pa.table({"text": ["a"]}), "part-0.parquet": pa.table({"text": ["a"]})})
    open_store(folder).create("_SUCCESS", b"")
    root, shards = list_shards(f"{folder}/")
    assert (root.url, shards["path"].to_pylist()) == (open_store(folder).url, ["part-0.parquet", "part-1.parquet"])
    assert find_root(folder)[1] == ""
    assert open_store(any_url).info("reviews.parquet") is None
    with pytest.raises(UsageError, match="predictions would be scored as shards"):
        refuse_output_inside(folder, open_store(f"{folder}/scores"))


@pytest.mark.parametrize("mark", ["_delta_log/0.json", ".hoodie/hoodie.properties", "metadata/v1.metadata.json"])
def test_a_table_whose_folder_holds_old_rows_too_is_refused(mark: str, any_url: str) -> None:
    write_archive(any_url, {"data/part-0.parquet": pa.table({"text": ["a"]})})
    open_store(any_url).create(mark, b"{}")
    with pytest.raises(UsageError, match=rf"{re.escape(mark)}.* name the files: .*/\*\*/\*\.parquet"):
        list_shards(any_url)
    assert list_shards(f"{any_url}/**/*.parquet")[1]["path"].to_pylist() == ["data/part-0.parquet"]


def test_an_archive_without_shards_says_what_is_there(any_url: str) -> None:
    open_store(any_url).create("readme.md", b"")
    with pytest.raises(UsageError, match=r"input\.path .*no Parquet file matches; found 1 files .*readme\.md"):
        list_shards(any_url)
    with pytest.raises(UsageError, match="nothing at all"):
        list_shards(f"{any_url}/missing")


@pytest.mark.parametrize(
    ("path", "output", "refused"),
    [
        ("s3://b/archive", "s3://b/archive/out", True),
        ("s3://b/archive", "s3://b/archive", True),
        ("s3://b", "s3://b/out", True),
        ("s3://b/archive", "s3://b/archive-scores", False),
        ("s3://b/archive", "s3://b/archive/_scores", False),
        ("s3://b/archive/*.parquet", "s3://b/archive/out", False),
        ("s3://b/archive/**/*.parquet", "s3://b/archive/out", True),
        ("s3://b/archive", "s3://c/archive/out", False),
        ("/b/archive", "s3://b/archive/out", False),
    ],
)
def test_an_output_that_would_be_scored_next_time_is_refused(path: str, output: str, refused: bool) -> None:
    if not refused:
        refuse_output_inside(path, open_store(output))
        return
    with pytest.raises(UsageError, match="predictions would be scored as shards"):
        refuse_output_inside(path, open_store(output))


# columns


def resolve(folder: Path, table: pa.Table, text: str | tuple[str, str], *keys: str, name: str = "x.parquet") -> Columns:
    write_archive(str(folder), {name: table})
    return resolve_columns(open_store(str(folder)), [name], text, keys)


TABLE = pa.table({"text": ["a"], "id": [1], "tag": pa.array(["x"]).dictionary_encode(), "post": [{"body": "b"}]})


def test_key_types_are_fixed_in_plain_form(tmp_path: Path) -> None:
    columns = resolve(tmp_path, TABLE, "text", "tag", "id")
    assert columns.keys == pa.schema([("tag", pa.string()), ("id", pa.int64())])


def test_a_partition_column_is_a_key_that_is_not_written(tmp_path: Path) -> None:
    columns = resolve(tmp_path, TABLE, "text", "dt", "id", name="dt=2026-11-20/x.parquet")
    assert columns.keys.names == ["id"]


@pytest.mark.parametrize(
    ("text", "keys", "message"),
    [
        ("txt", (), r"column 'txt' is missing, did you mean 'text'\? \(there are: text, id, tag, post\)"),
        ("id", (), "column 'id' is int64, expected text"),
        ("post", (), "column 'post' is struct"),
        ("post.bdy", (), r"column 'bdy' is missing, did you mean 'body'\?"),
        (("text", "other"), (), "column 'other' is missing"),
        ("text", ("idd",), r"key column 'idd' is missing, did you mean 'id'\?"),
    ],
)
def test_wrong_columns_are_named_before_anything_is_loaded(
    text: str | tuple[str, str], keys: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(tmp_path, TABLE, text, *keys)


def test_the_first_readable_shard_decides(tmp_path: Path) -> None:
    write_archive(str(tmp_path), {"a.parquet": b"broken", "b.parquet": TABLE})
    store = open_store(str(tmp_path))
    assert resolve_columns(store, ["a.parquet", "b.parquet"], "text", ()).text == ("text",)
    with pytest.raises(UsageError, match=r"none of the first 1 shards .*a\.parquet: not a readable Parquet file"):
        resolve_columns(store, ["a.parquet"], "text", ())


@pytest.mark.parametrize(
    ("found", "fixed", "fits"),
    [
        (pa.int32(), pa.int64(), True),
        (pa.int64(), pa.int32(), False),
        (pa.float32(), pa.float64(), True),
        (pa.int64(), pa.string(), False),
        (pa.large_string(), pa.string(), True),
        (pa.null(), pa.int64(), True),
        (pa.uint32(), pa.int64(), True),
        (pa.uint64(), pa.int64(), False),
        (pa.timestamp("us"), pa.timestamp("us"), True),
        (pa.timestamp("us"), pa.string(), False),
    ],
    ids=str,
)
def test_a_shard_with_another_key_type_is_cast_if_every_value_fits(
    found: pa.DataType, fixed: pa.DataType, fits: bool, tmp_path: Path
) -> None:
    store = one_shard(tmp_path, pa.table({"text": ["a"], "id": pa.nulls(1, found)}))
    columns = Columns(text=("text",), keys=pa.schema([("id", fixed)]))
    if fits:
        assert read_all(store, "x.parquet", columns).keys.schema == columns.keys
    else:
        with pytest.raises(BadShardError, match=f"key column 'id' is .*, expected {fixed}"):
            read_row_groups(store, "x.parquet", columns)


def test_a_column_that_is_there_twice_is_a_bad_shard(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(BadShardError, match="is there 2 times"):
        read_row_groups(one_shard(tmp_path, table), "x.parquet", TEXT)


def test_a_key_column_that_is_there_twice_is_a_bad_shard(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "id": [1]}).append_column("id", pa.array([2]))
    columns = Columns(text=("text",), keys=pa.schema([("id", pa.int64())]))
    with pytest.raises(BadShardError, match="key column 'id' is there 2 times"):
        read_row_groups(one_shard(tmp_path, table), "x.parquet", columns)


def test_the_footer_gives_rows_and_text_bytes_of_the_text_alone(tmp_path: Path) -> None:
    table = pa.table({"text": [f"{number:0100d}" for number in range(1000)], "other": ["x" * 1000] * 1000})
    groups = read_row_groups(one_shard(tmp_path, table, row_group_size=250, use_dictionary=False), "x.parquet", TEXT)
    assert [group.rows for group in groups] == [250] * 4
    assert all(250 * 100 < group.text_bytes < 250 * 110 for group in groups)
