"""The archive: its shards, their footers and columns, with everything that a bad file can do caught here.

A shard that cannot be read at all is a `BadShardError`. Storage that fails is none: it raises as it is.
"""

import contextlib
import fnmatch
import glob
import io
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.errors import UsageError, nearest
from lib.listing import FileInfo, split_pattern, to_listing
from lib.planning import RowGroup
from lib.storage import Store, explained, open_store, path_below

SHARD_ENDINGS = (".parquet", ".pq")

TABLE_MARK = r"^(_delta_log/|\.hoodie/|metadata/[^/]+\.metadata\.json$)"
"""What only tables of Delta Lake, Hudi and Iceberg have below their root."""

RAY_TYPES = ("arrow_pickled_object", "arrow_tensor", "arrow_tensor_v2", "arrow_variable_shaped_tensor")
"""Extension types of Ray Data: a file that names one has Ray's Python code read its metadata, which was once a pickle (CVE-2026-41486)."""

BAD_FILE = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, AttributeError)
"""What a bad file raises: PyArrow's own errors, and what extension types make of metadata that they did not write (Ray's: TypeError)."""

BAD_TEXT = "__bad_text"
"""The column in which texts of rows with an error travel."""

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
    bad_texts: bool = False
    """whether the texts of rows with an error come along, as the column `BAD_TEXT` behind the keys"""

    @property
    def carried(self) -> pa.Schema:
        """What comes along beside the texts."""
        return self.keys.append(pa.field(BAD_TEXT, pa.string())) if self.bad_texts else self.keys


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


def find_root(path: str) -> tuple[Store, str]:
    """An archive's root folder, and the pattern of the shards below it: '' for all of them.

    A folder may be named like a file, `reviews.parquet`: Spark and Dask write such ones.
    """
    root, pattern = split_pattern(path)
    if pattern and not glob.has_magic(pattern) and (folder := open_store(path)).is_folder():
        return folder, ""
    return open_store(root), pattern


def list_shards(path: str, key: str = "input.path") -> tuple[Store, pa.Table]:
    """List an archive: its root, and its shards as a listing sorted by path.

    Names that start with `_` or `.` are not part of it; in a folder, shards are the files that end in .parquet or .pq.
    `key` is the configuration's name for the path. Raises `UsageError` if there are none, or for a table with a log of its own.
    """
    store, pattern = find_root(path)
    if pattern and not glob.has_magic(pattern):
        one = store.info(pattern)
        listing = to_listing([] if one is None else [one])
    else:
        listing = store.list()
        if not pattern:
            refuse_table(listing, path, key)
    keep = [[is_shard(name.as_py(), pattern) for name in chunk] for chunk in listing["path"].chunks]
    shards = listing.filter(pa.chunked_array(keep, pa.bool_()))
    if not shards.num_rows:
        sample = ", ".join(listing["path"].slice(0, 3).to_pylist()) or "nothing at all"
        raise UsageError(
            f"{key} {path}: no Parquet file matches; found {listing.num_rows} files below {store.url} ({sample})"
        )
    return store, shards


def refuse_table(listing: pa.Table, path: str, key: str) -> None:
    """Raise `UsageError` if the folder is a table of a format whose folders also hold rows that were deleted or replaced."""
    marks = pc.match_substring_regex(listing["path"], TABLE_MARK)
    if pc.any(marks).as_py():
        raise UsageError(
            f"{key} {path}: holds {listing.filter(marks)['path'][0]}, so it is a table of Delta Lake, Iceberg or Hudi, whose files also hold"
            " rows that were deleted or replaced; write its current rows as plain Parquet, or, if every file in it is current, name"
            f" the files: {path.rstrip('/')}/**/*.parquet"
        )


def refuse_output_inside(path: str, output: Store) -> None:
    """Raise `UsageError` if predictions written to `output` would be taken for shards of the archive by the next run."""
    root, pattern = find_root(path)
    below = path_below(root, output)
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


def open_parquet(store: Store, path: str, step_bytes: int | None = None) -> tuple[pq.ParquetFile, WatchedFile]:
    """Open one shard. Raises `BadShardError` if its footer cannot be read, storage errors as they are.

    A bad footer is asked for once more, since bytes can change on their way. `step_bytes`: read so much of a column at a time, as
    rows are asked for; without, all that a row group has of it.
    """
    for name in RAY_TYPES:
        with contextlib.suppress(pa.ArrowKeyError):  # not registered: Ray Data is not imported, or it was done before
            pa.unregister_extension_type(f"ray.data.{name}")
    try:
        return open_footer(store, path, step_bytes)
    except BadShardError:
        return open_footer(store, path, step_bytes)


def open_footer(store: Store, path: str, step_bytes: int | None) -> tuple[pq.ParquetFile, WatchedFile]:
    """Open one shard as `open_parquet` does, by one look at its footer."""
    watched = WatchedFile(*store.open_described(path))
    try:
        options = {"pre_buffer": True} if step_bytes is None else {"pre_buffer": False, "buffer_size": step_bytes}
        parquet = pq.ParquetFile(watched, page_checksum_verification=True, **options)
    except BAD_FILE as error:
        if watched.failure is not None:
            raise watched.failure from watched.failure.__cause__  # which says what S3 answered
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
    check_name(path)
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


def check_name(path: str) -> None:
    """Raise `BadShardError` unless a file can be called so on any storage: keys of S3 can be `a//b` or hold a NUL.

    Names with `.` and `..` as folders are no part of an archive, as all that start with a dot.
    """
    if "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise BadShardError(f"{path!r} cannot be the name of a file: rename it, or choose an input.path below it")


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
