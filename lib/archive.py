"""The archive: its shards, their footers, and the rows of a chunk, with everything a bad file can do caught here.

A row that cannot be scored keeps its place with a `RowError`. A shard that cannot be read at all is a `BadShardError`.
Storage that fails is neither: it raises as it is.
"""

import errno
import fnmatch
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.errors import UsageError, nearest
from lib.planning import Chunk, RowGroup, identity
from lib.schema import RowError
from lib.storage import FileInfo, Store, explained, open_store, path_below, split_pattern, to_listing

READ_BATCH_ROWS = 8_192
"""Rows handed on at a time; the text of no more than these is in memory beside its tokens."""

READ_BATCH_BYTES = 2 * 2**20
"""Text handed on at a time, if it has more than one row: tokenizers were seen to take 470 times a text's size."""

DECODE_ROWS = 256
"""Rows decoded at a time: a footer does not say how long the texts behind a dictionary are. A million rows in 0.1 s."""

BLANK = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u200c\u200d\u2060\ufeff"
"""White space, and the characters of no width: a text of these alone says nothing."""

SHARD_ENDINGS = (".parquet", ".pq")

SIGNATURE_BYTES = 28
"""Nonce and tag behind a plain footer of encrypted columns (Parquet Modular Encryption, 5.5)."""


class BadShardError(Exception):
    """A shard that cannot be scored as a whole; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a shard are read."""

    text: tuple[str, ...]
    """one name, or two for sentence pairs"""
    keys: pa.Schema
    """key columns in the types they are written in"""


@dataclass(frozen=True)
class Rows:
    """Some rows of a chunk, in order."""

    texts: tuple[list[str], ...]
    """for each text column, the texts of the rows without an error"""
    errors: npt.NDArray[np.uint8]
    """(N,), a `RowError` for each row"""
    keys: pa.Table
    """key columns; N rows"""

    @property
    def size(self) -> int:
        """Characters of all texts."""
        return sum(sum(map(len, texts)) for texts in self.texts)


class ChangedShardError(Exception):
    """A shard that is not the one that was planned: another content, or gone."""


class WatchedFile(io.RawIOBase):
    """A file that remembers whether reading its bytes failed: then a decoding error is the storage's, not the file's."""

    def __init__(self, handle: BinaryIO, info: FileInfo) -> None:
        self.handle = handle
        self.info = info
        self.failure: Exception | None = None
        self.last_bytes = b""
        """the end of the file, once it was read: 4 bytes of the footer's length and `PAR1`"""

    def read(self, size: int = -1) -> bytes:
        try:
            found = self.handle.read(size)
        except Exception as error:
            self.failure = error
            raise
        if found and self.handle.tell() == self.info.size:
            self.last_bytes = found[-8:]
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.handle.seek(offset, whence)

    def tell(self) -> int:
        return self.handle.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.handle.close()
        super().close()


def list_shards(path: str, key: str = "input.path") -> tuple[Store, pa.Table]:
    """List an archive: its root, and its shards as a listing sorted by path.

    Names that start with `_` or `.` are not part of it; in a folder, shards are the files that end in .parquet or .pq.
    `key` is the configuration's name for the path. Raises `UsageError` if there are none.
    """
    root, pattern = split_pattern(path)
    store = open_store(root)
    if pattern and not any(letter in pattern for letter in "*?["):
        one = store.info(pattern)
        listing = to_listing([] if one is None else [one])
    else:
        listing = store.list()
    paths = listing["path"].to_pylist()
    keep = [is_shard(name, pattern) for name in paths]
    shards = listing.filter(pa.array(keep, pa.bool_()))
    if not shards.num_rows:
        sample = ", ".join(paths[:3]) or "nothing at all"
        raise UsageError(
            f"{key} {path}: no Parquet file matches; found {len(paths)} files below {store.url} ({sample})"
        )
    return store, shards


def refuse_output_inside(path: str, output: Store) -> None:
    """Raise `UsageError` if predictions written to `output` would be taken for shards of the archive by the next run."""
    root, pattern = split_pattern(path)
    below = path_below(open_store(root), output)
    if below is not None and is_shard("/".join(filter(None, [below, "version", "prediction.parquet"])), pattern):
        raise UsageError(
            f"output.path {output.url} lies in the archive {path}: predictions would be scored as shards; choose another folder"
        )


def is_shard(path: str, pattern: str) -> bool:
    """Whether a file below the root belongs to the archive. `*` does not cross a slash, `**` does."""
    parts = path.split("/")
    if any(part.startswith(("_", ".")) for part in parts):
        return False
    if not pattern:
        return path.lower().endswith(SHARD_ENDINGS)
    return matches(parts, pattern.split("/"))


def matches(parts: list[str], pattern: list[str]) -> bool:
    """Match a path against a glob, part by part."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def open_parquet(store: Store, path: str) -> tuple[pq.ParquetFile, WatchedFile]:
    """Open one shard. Raises `BadShardError` if its footer cannot be read, storage errors as they are."""
    watched = WatchedFile(*store.open_described(path))
    try:
        parquet = pq.ParquetFile(watched, pre_buffer=True, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        if watched.failure is not None:
            raise watched.failure from error
        raise BadShardError(f"not a readable Parquet file: {first_line(error)}") from error
    if is_signed(parquet.metadata, watched.last_bytes):
        raise BadShardError("its columns are encrypted: write it without encryption")
    return parquet, watched


def is_signed(footer: pq.FileMetaData, last_bytes: bytes) -> bool:
    """Whether a signature follows the footer: its columns are encrypted, and PyArrow ends the process when asked for their sizes."""
    return int.from_bytes(last_bytes[:4], "little") - footer.serialized_size == SIGNATURE_BYTES


def first_line(error: BaseException) -> str:
    """An exception's message, short enough for a report."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def read_row_groups(store: Store, path: str, columns: Columns) -> list[RowGroup]:
    """Read a shard's footer and check its columns. Raises `BadShardError`."""
    parquet, watched = open_parquet(store, path)
    with watched:
        check_columns(parquet.schema_arrow, path, columns)
        footer = parquet.metadata
        wanted = [
            index for index in range(footer.num_columns) if is_below(footer.schema.column(index).path, columns.text)
        ]
        counts = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
        if min(counts, default=0) < 0 or sum(counts) != footer.num_rows:
            raise BadShardError(f"its footer says {footer.num_rows} rows, its row groups add up to {sum(counts)}")
        return [
            RowGroup(group.num_rows, sum(max(0, group.column(index).total_uncompressed_size) for index in wanted))
            for group in map(footer.row_group, range(footer.num_row_groups))
        ]


def is_below(path: str, names: tuple[str, ...]) -> bool:
    """Whether a Parquet leaf (a.b.list.element) belongs to one of the columns."""
    return any(path == name or path.startswith(f"{name}.") for name in names)


def check_columns(schema: pa.Schema, path: str, columns: Columns) -> None:
    """Raise `BadShardError` unless the shard has the text and key columns in types that can be read."""
    for name in columns.text:
        found = find_type(schema, name)
        if not is_text(found):
            raise BadShardError(f"column {name!r} is {found}, expected text (string, or binary that holds UTF-8)")
    for field in columns.keys:
        if schema.names.count(field.name) > 1:
            raise BadShardError(f"key column {field.name!r} is there {schema.names.count(field.name)} times")
        if field.name not in schema.names and field.name not in partition_values(path):
            raise BadShardError(
                f"key column {field.name!r} is missing{nearest(field.name, schema.names)} (there are: {', '.join(schema.names)})"
            )
        if field.name in schema.names and not is_castable(schema.field(field.name).type, field.type):
            found = schema.field(field.name).type
            raise BadShardError(
                f"key column {field.name!r} is {found}, expected {field.type} as in the archive's first run"
            )


def is_castable(found: pa.DataType, target: pa.DataType) -> bool:
    """Whether every value of one type fits another, by type alone: equal in plain form, or a wider number."""
    if key_type(found) == target or pa.types.is_null(found):
        return True
    numeric = all(pa.types.is_integer(one) or pa.types.is_floating(one) for one in (found, target))
    return numeric and bool(np.can_cast(found.to_pandas_dtype(), target.to_pandas_dtype(), "safe"))


def find_type(schema: pa.Schema, name: str) -> pa.DataType:
    """The type of a column or of a nested field `a.b`. Raises `BadShardError` that lists what there is."""
    if schema.names.count(name) > 1:
        raise BadShardError(f"column {name!r} is there {schema.names.count(name)} times")
    if name in schema.names:
        return schema.field(name).type
    head, _, rest = name.partition(".")
    if rest and schema.names.count(head) == 1 and pa.types.is_struct(schema.field(head).type):
        return find_type(pa.schema(list(schema.field(head).type)), rest)
    raise BadShardError(
        f"column {name!r} is missing{nearest(name, schema.names)} (there are: {', '.join(schema.names)})"
    )


def is_text(found: pa.DataType) -> bool:
    """Whether a column of this type can hold text; an all-null column can."""
    if pa.types.is_dictionary(found):
        return is_text(found.value_type)
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
    )
    return any(test(found) for test in (*tests, pa.types.is_binary_view, pa.types.is_null))


def partition_values(path: str) -> dict[str, str]:
    """Hive partition columns of a shard's path: `dt=2026-11-20/part-0.parquet` gives dt."""
    return dict(part.split("=", 1) for part in path.split("/")[:-1] if "=" in part)


def key_type(found: pa.DataType) -> pa.DataType:
    """The type that a key column is written in: the plain form of what the first shard has."""
    if pa.types.is_dictionary(found):
        return key_type(found.value_type)
    if pa.types.is_large_string(found) or pa.types.is_string_view(found) or pa.types.is_null(found):
        return pa.string()
    return found


def resolve_columns(
    store: Store, paths: list[str], text_column: str | tuple[str, ...], key_columns: tuple[str, ...]
) -> Columns:
    """Look at the first readable shard: are the columns there, is the text text, which types have the keys?

    Raises `UsageError` that names the columns there are; nothing has been loaded by then.
    """
    text = (text_column,) if isinstance(text_column, str) else tuple(text_column)
    reasons = []
    for path in paths[:20]:
        try:
            with explained(f"{store.url}/{path}", "read"):
                parquet, watched = open_parquet(store, path)
        except BadShardError as error:
            reasons.append(f"{path}: {error}")
            continue
        schema = parquet.schema_arrow
        watched.close()
        from_path = partition_values(path)
        keys = pa.schema([(name, key_type(schema.field(name).type)) for name in key_columns if name in schema.names])
        missing = [name for name in key_columns if name not in schema.names and name not in from_path]
        try:
            if missing:
                raise BadShardError(
                    f"key column {missing[0]!r} is missing{nearest(missing[0], schema.names)} (there are: {', '.join(schema.names)})"
                )
            columns = Columns(text=text, keys=keys)
            check_columns(schema, path, columns)
        except BadShardError as error:
            raise UsageError(f"{store.url}/{path}: {error}; set input.text_column or input.key_columns") from None
        return columns
    raise UsageError(f"{store.url}: none of the first {len(reasons)} shards is a readable Parquet file ({reasons[0]})")


def read_rows(
    store: Store, chunks: Sequence[Chunk], columns: Columns, chunk_bytes: int
) -> Iterator[tuple[Chunk, Rows]]:
    """Read chunks of one shard, a batch of rows at a time, in order. Exactly `chunk.rows` rows come for each chunk.

    Rows whose pages cannot be decoded come as `UNREADABLE` with null keys. Raises `ChangedShardError` if the shard is not
    the one that was planned, or not any more at the end: rows that came before it are then not to be used. Storage that
    fails raises as it is.
    """
    path, planned = chunks[0].shard, chunks[0].identity
    try:
        parquet, watched = open_parquet(store, path)
    except FileNotFoundError as error:
        raise ChangedShardError(f"{path}: it was there when the archive was listed, and is gone") from error
    with watched:
        info = watched.info
        if identity(info.size, info.etag, info.mtime_ns, chunk_bytes) != planned:
            raise ChangedShardError(f"{path}: its content is not the one that was listed ({info.size} bytes now)")
        groups = [parquet.metadata.row_group(index).num_rows for index in range(parquet.metadata.num_row_groups)]
        bounds = [0, *itertools.accumulate(groups)]
        try:
            for chunk in chunks:
                row_bytes = max(1, chunk.text_bytes // max(1, chunk.rows))
                for index, (first, last) in enumerate(itertools.pairwise(bounds)):
                    start, stop = max(chunk.start, first), min(chunk.start + chunk.rows, last)
                    if start < stop:
                        parts = read_group(parquet, watched, index, start - first, stop - start, row_bytes, columns)
                        for rows in collect(parts):
                            yield chunk, rows
        except OSError as error:
            if error is watched.failure and is_expired(error):
                raise ChangedShardError(f"{path}: it was changed or removed while it was read") from error
            raise
    if not store.is_s3 and store.info(path) != info:  # S3 is asked for the ETag with every range
        raise ChangedShardError(f"{path}: it was changed or removed while it was read")


def is_expired(error: OSError) -> bool:
    """Whether storage refused to go on because the object is another one by now (s3fs: EBUSY), or gone."""
    return isinstance(error, FileNotFoundError) or error.errno == errno.EBUSY


def collect(parts: Iterable[Rows]) -> Iterator[Rows]:
    """Put neighbouring rows together, up to `READ_BATCH_ROWS` and `READ_BATCH_BYTES`."""
    batch: list[Rows] = []
    rows = size = 0
    for part in itertools.chain.from_iterable(map(split, parts)):
        if batch and (rows + len(part.errors) > READ_BATCH_ROWS or size + part.size > READ_BATCH_BYTES):
            yield join(batch)
            batch, rows, size = [], 0, 0
        batch.append(part)
        rows, size = rows + len(part.errors), size + part.size
    if batch:
        yield join(batch)


def split(rows: Rows) -> Iterator[Rows]:
    """Rows in parts of at most `READ_BATCH_BYTES`, or of one row."""
    half = len(rows.errors) // 2
    if not half or rows.size <= READ_BATCH_BYTES:
        yield rows
        return
    good = np.count_nonzero(rows.errors[:half] == RowError.NONE)
    yield from split(Rows(tuple(texts[:good] for texts in rows.texts), rows.errors[:half], rows.keys.slice(0, half)))
    yield from split(Rows(tuple(texts[good:] for texts in rows.texts), rows.errors[half:], rows.keys.slice(half)))


def join(parts: Sequence[Rows]) -> Rows:
    """Several parts as one, in order."""
    texts = tuple([text for one in side for text in one] for side in zip(*(part.texts for part in parts), strict=True))
    errors = np.concatenate([part.errors for part in parts])
    return Rows(texts, errors, pa.concat_tables([part.keys for part in parts]))


def read_group(
    parquet: pq.ParquetFile, watched: WatchedFile, index: int, skip: int, count: int, row_bytes: int, columns: Columns
) -> Iterator[Rows]:
    """Read `count` rows of one row group after `skip`, few at a time; what cannot be decoded comes as `UNREADABLE` rows.

    `row_bytes` is the text of one row on average, by the footer.
    """
    names = [*columns.text, *(name for name in columns.keys.names if name in parquet.schema_arrow.names)]
    left = count
    batch_rows = max(1, min(DECODE_ROWS, READ_BATCH_ROWS, READ_BATCH_BYTES // row_bytes))
    try:
        for batch in parquet.iter_batches(batch_rows, row_groups=[index], columns=names, use_threads=False):
            part = batch.slice(min(skip, batch.num_rows), left)
            skip -= min(skip, batch.num_rows)
            if part.num_rows:
                rows = decode(part, columns)
                left -= part.num_rows
                yield rows
            if not left:
                return
    except (pa.ArrowException, OSError, ValueError) as error:
        if watched.failure is not None:
            raise watched.failure from error
    if left:
        yield unreadable_rows(left, columns)


def unreadable_rows(count: int, columns: Columns) -> Rows:
    """Rows that keep their places though nothing of them can be read."""
    keys = pa.table([pa.nulls(count, field.type) for field in columns.keys], schema=columns.keys)
    return Rows(tuple([] for _ in columns.text), np.full(count, RowError.UNREADABLE, np.uint8), keys)


def decode(batch: pa.RecordBatch, columns: Columns) -> Rows:
    """Turn a record batch into texts, errors and keys."""
    checked = [check_texts(pick(batch, name)) for name in columns.text]
    errors = np.maximum.reduce([found for _, found in checked])
    good = pa.array(errors == RowError.NONE)
    texts = tuple(values.filter(good).to_pylist() for values, _ in checked)
    keys = [
        pick(batch, field.name).cast(field.type)
        if field.name in batch.schema.names
        else pa.nulls(batch.num_rows, field.type)
        for field in columns.keys
    ]
    return Rows(texts, errors, pa.table(keys, schema=columns.keys))


def pick(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column, or a nested field `a.b`, of a record batch."""
    if name in batch.schema.names:
        return batch.column(name)
    head, *rest = name.split(".")
    return pc.struct_field(batch.column(head), rest)


def check_texts(column: pa.Array) -> tuple[pa.Array, npt.NDArray[np.uint8]]:
    """Return a column as large_string (null where it has an error) and a `RowError` for each row."""
    raw = (
        column.cast(pa.large_binary())
        if not pa.types.is_dictionary(column.type)
        else column.dictionary_decode().cast(pa.large_binary())
    )
    errors = np.where(raw.is_null().to_numpy(zero_copy_only=False), RowError.NULL, RowError.NONE).astype(np.uint8)
    try:
        texts = raw.cast(pa.large_string())
    except pa.ArrowInvalid:
        decoded = [decode_or_none(value) for value in raw.to_pylist()]
        texts = pa.array(decoded, pa.large_string())
        errors[texts.is_null().to_numpy(zero_copy_only=False) & (errors == RowError.NONE)] = RowError.UNDECODABLE
    blank = pc.fill_null(pc.equal(pc.binary_length(pc.utf8_trim(texts, BLANK)), 0), False)
    errors[blank.to_numpy(zero_copy_only=False) & (errors == RowError.NONE)] = RowError.EMPTY
    return texts, errors


def decode_or_none(value: bytes | None) -> str | None:
    """Decode UTF-8, strictly."""
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None
