"""Rows of a chunk: texts, errors and keys, a few at a time, with everything that a bad row or a bad page can do caught here.

A row that cannot be scored keeps its place with a `RowError`. A shard that changes meanwhile is a `ChangedShardError`.
Storage that fails is neither: it raises as it is.
"""

import errno
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.archive import BAD_FILE, Columns, WatchedFile, open_parquet
from lib.planning import Chunk, identity
from lib.schema import RowError
from lib.storage import Store

READ_BATCH_ROWS = 8_192
"""Rows handed on at a time; the text of no more than these is in memory beside its tokens."""

READ_BATCH_BYTES = 2 * 2**20
"""Text handed on at a time, if it has more than one row: tokenizers were seen to take 470 times a text's size."""

DECODE_ROWS = 256
"""Rows decoded at a time: a footer does not say how long the texts behind a dictionary are. A million rows in 0.1 s."""

BLANK = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u200c\u200d\u2060\ufeff"
"""White space, and the characters of no width: a text of these alone says nothing."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a chunk, in order."""

    texts: tuple[pa.LargeStringArray, ...]
    """for each text column, the texts of the rows without an error"""
    errors: npt.NDArray[np.uint8]
    """(N,), a `RowError` for each row"""
    keys: pa.Table
    """key columns, and `BAD_TEXT` if it was asked for; N rows"""

    @property
    def size(self) -> int:
        """Bytes of all texts."""
        return sum(pc.sum(pc.binary_length(texts)).as_py() or 0 for texts in self.texts)


class ChangedShardError(Exception):
    """A shard that is not the one that was planned: another content, or gone."""


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
    texts = tuple(pa.concat_arrays(side) for side in zip(*(part.texts for part in parts), strict=True))
    errors = np.concatenate([part.errors for part in parts])
    return Rows(texts, errors, pa.concat_tables([part.keys for part in parts]))


def read_group(
    parquet: pq.ParquetFile, watched: WatchedFile, index: int, skip: int, count: int, row_bytes: int, columns: Columns
) -> Iterator[Rows]:
    """Read `count` rows of one row group after `skip`, few at a time; what cannot be decoded comes as `UNREADABLE` rows.

    What cannot be decoded is asked for once more, since bytes can change on their way: what storage has is what counts.
    `row_bytes` is the text of one row on average, by the footer.
    """
    done = 0
    for _ in range(2):
        try:
            for rows in decode_group(parquet, index, skip + done, count - done, row_bytes, columns):
                done += len(rows.errors)
                yield rows
        except BAD_FILE:
            if watched.failure is not None:
                raise watched.failure from watched.failure.__cause__  # which says what S3 answered
        if done == count:
            return
    yield unreadable_rows(count - done, columns)


def decode_group(
    parquet: pq.ParquetFile, index: int, skip: int, count: int, row_bytes: int, columns: Columns
) -> Iterator[Rows]:
    """Decode `count` rows of one row group after `skip`. Raises one of `BAD_FILE`; fewer rows come if there are no more."""
    names = [*columns.text, *(name for name in columns.keys.names if name in parquet.schema_arrow.names)]
    batch_rows = max(1, min(DECODE_ROWS, READ_BATCH_ROWS, READ_BATCH_BYTES // row_bytes))
    for batch in parquet.iter_batches(batch_rows, row_groups=[index], columns=names, use_threads=False):
        part = batch.slice(min(skip, batch.num_rows), count)
        skip -= min(skip, batch.num_rows)
        if part.num_rows:
            yield decode(part, columns)
            count -= part.num_rows
        if not count:
            return


def unreadable_rows(count: int, columns: Columns) -> Rows:
    """Rows that keep their places though nothing of them can be read."""
    keys = pa.table([pa.nulls(count, field.type) for field in columns.carried], schema=columns.carried)
    return Rows(
        tuple(pa.array([], pa.large_string()) for _ in columns.text),
        np.full(count, RowError.UNREADABLE, np.uint8),
        keys,
    )


def decode(batch: pa.RecordBatch, columns: Columns) -> Rows:
    """Turn a record batch into texts, errors and keys."""
    checked = [check_texts(pick(batch, name)) for name in columns.text]
    errors = np.maximum.reduce([found for _, found in checked])
    good = pa.array(errors == RowError.NONE)
    texts = tuple(values.filter(good) for values, _ in checked)
    keys = [
        pick(batch, field.name).cast(field.type)
        if field.name in batch.schema.names
        else pa.nulls(batch.num_rows, field.type)
        for field in columns.keys
    ]
    if columns.bad_texts:
        keys.append(pa.array(bad_texts([pick(batch, name) for name in columns.text], errors), pa.string()))
    return Rows(texts, errors, pa.table(keys, schema=columns.carried))


def bad_texts(sides: Sequence[pa.Array], errors: npt.NDArray[np.uint8]) -> list[str | None]:
    """The texts of rows with an error, None for the others; bytes that are not UTF-8 as `\\xff`."""
    found: list[str | None] = [None] * len(errors)
    for row in np.flatnonzero(errors):
        raw = [as_binary(side.slice(row, 1))[0].as_py() for side in sides]
        known = [value.decode(errors="backslashreplace") for value in raw if value is not None]
        found[row] = "\n".join(known) if known else None
    return found


def pick(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column, or a nested field `a.b`, of a record batch."""
    if name in batch.schema.names:
        return batch.column(name)
    head, *rest = name.split(".")
    return pc.struct_field(batch.column(head), rest)


def as_binary(column: pa.Array) -> pa.Array:
    """A column of any type of text as large_binary."""
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    return plain.cast(pa.large_binary())


def check_texts(column: pa.Array) -> tuple[pa.Array, npt.NDArray[np.uint8]]:
    """Return a column as large_string (null where it has an error) and a `RowError` for each row."""
    raw = as_binary(column)
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
