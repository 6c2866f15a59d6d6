"""Texts without labels: from Parquet to rows of token ids, packed or one text a row, in files that every training worker maps.

Letters: N texts, R rows.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from lib import sources
from lib.archive import Columns, check_columns, open_parquet
from lib.batching import IntArray
from lib.checkpoint import fetch
from lib.errors import UsageError
from lib.planning import Chunk
from lib.pretrain_config import PretrainConfig
from lib.reading import Rows
from lib.sources import (
    INDEX_NAME,
    Source,
    fingerprint_of,
    hash_texts,
    items_of,
    read_block,
    read_index,
    share,
    tokenize_all,
    unreadable,
    write_batches,
)
from lib.storage import Store
from lib.tokenization import WHOLE, Tokenizer, Tokens, load_tokenizer


class CorpusIndex(BaseModel):
    """What the tokenized sets hold; small, kept as JSON beside the data."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    files: dict[str, list[str]]
    """Arrow files of each set, in row order, relative to the data's folder"""
    texts: dict[str, int]
    rows: dict[str, int]
    tokens: dict[str, int]
    """special ones included"""
    dropped: dict[str, dict[str, int]]
    """texts left out of each file set that is read, by reason"""


def find_corpus(config: PretrainConfig) -> list[Source]:
    """List the sets and check every shard's columns. Raises `UsageError`; reads footers only."""
    text = config.train.text_column
    names = (text,) if isinstance(text, str) else text

    def columns_of(store: Store, shard: str) -> Columns:
        columns = Columns(text=names, keys=pa.schema([]))
        parquet, watched = open_parquet(store, shard)
        check_columns(parquet.schema_arrow, shard, columns)
        watched.close()
        return columns

    paths = {"train": config.train.path, "valid": config.valid.path}
    return [sources.find_source(name, path, columns_of) for name, path in paths.items() if path is not None]


def prepare_corpus(
    config: PretrainConfig, sets: Sequence[Source], base: str, max_length: int, folder: Store
) -> CorpusIndex:
    """Tokenize all sets into `folder`, or take what an earlier attempt of this run left there.

    Raises `UsageError` if there is nothing to learn from or to validate on, or if the files have changed since.
    """
    fingerprint = fingerprint_of(sets)
    kept = read_index(folder, fingerprint)
    if kept is not None:
        return CorpusIndex.model_validate_json(kept)
    named = {source.name: source for source in sets}
    trust, room = config.model.trust, WHOLE if config.mlm.packing else max_length

    def load() -> tuple[Tokenizer]:
        return (load_tokenizer(fetch(base, trust), room, trust.code),)

    around = load()[0].find_around()
    tokenizers = share(load)
    reports = tokenize_all(
        items_of(sets),
        lambda item: tokenize_block(item, named[item["set"]], *tokenizers(), around, config, max_length, folder),
    )
    names = ("train", "valid")
    parts = [(name, report["parts"][name]) for name in names for report in reports if name in report["parts"]]
    dropped: dict[str, Counter[str]] = {name: Counter() for name in named}
    for report in reports:
        kept_texts = sum(one["texts"] for one in report["parts"].values())
        assert kept_texts + sum(report["dropped"].values()) == report["read"], f"texts lost in {report}"
        dropped[report["set"]].update(report["dropped"])
    index = CorpusIndex(
        fingerprint=fingerprint,
        files={name: [one["file"] for owner, one in parts if owner == name] for name in names},
        texts={name: sum(one["texts"] for owner, one in parts if owner == name) for name in names},
        rows={name: sum(one["rows"] for owner, one in parts if owner == name) for name in names},
        tokens={name: sum(one["tokens"] for owner, one in parts if owner == name) for name in names},
        dropped={name: dict(found) for name, found in dropped.items()},
    )
    for name in names:
        if not index.rows[name]:
            aside = name == "valid" and config.valid.path is None
            raise UsageError(
                f"valid.fraction = {config.valid.fraction}: of {index.texts['train']:,} texts none was set aside; raise it, or give"
                " valid.path"
                if aside
                else f"{name}.path: no row with a text is left (dropped: {index.dropped[name]})"
            )
    folder.replace(INDEX_NAME, index.model_dump_json().encode())
    return index


def tokenize_block(
    item: dict[str, Any],
    source: Source,
    tokenizer: Tokenizer,
    around: tuple[int, int],
    config: PretrainConfig,
    max_length: int,
    folder: Store,
) -> dict[str, Any]:
    """Read and tokenize one block of chunks into an Arrow file for each set; running it again writes the same files.

    `around`: how many special tokens the tokenizer puts before and behind a text.
    """
    dropped: Counter[str] = Counter()
    found: dict[str, list[Tokens]] = {}
    chunks = [Chunk(**chunk) for chunk in json.loads(item["chunks"])]
    for _, _, rows in read_block(source, chunks):
        texts = usable_texts(rows, dropped)
        if source.name == "train" and config.valid.path is None:
            aside = is_aside(texts, config.valid.fraction, config.optim.seed)
            sides = {"train": texts.filter(pa.array(~aside)), "valid": texts.filter(pa.array(aside))}
        else:
            sides = {source.name: texts}
        for name, some in sides.items():
            if len(some):
                found.setdefault(name, []).append(tokenizer.encode(some))
    parts = {}
    for name, several in found.items():
        num_texts = sum(int((one.lengths > sum(around)).sum()) for one in several)
        if tokenless := sum(len(one.lengths) for one in several) - num_texts:
            dropped["text without a token"] += tokenless
        ids, lengths = rows_of(several, around, max_length, config.mlm.packing)
        if len(lengths):
            file = f"{source.name}-{item['number']:05d}-{name}.arrow"
            lists = pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]).astype(np.int32)), pa.array(ids))
            write_batches(folder, file, [pa.RecordBatch.from_pydict({"ids": lists})])
            parts[name] = {"file": file, "texts": num_texts, "rows": len(lengths), "tokens": int(lengths.sum())}
    return {
        "set": source.name,
        "number": item["number"],
        "parts": parts,
        "read": sum(chunk.rows for chunk in chunks) * len(source.columns.text),
        "dropped": dropped,
    }


def usable_texts(rows: Rows, dropped: Counter[str]) -> pa.LargeStringArray:
    """The texts of rows without an error, those of two columns by turns; those of the others are counted by reason."""
    for reason, count in unreadable(rows).items():
        dropped[reason] += count * len(rows.texts)
    order = np.arange(sum(map(len, rows.texts))).reshape(len(rows.texts), -1).T.ravel()
    return pa.concat_arrays(
        [one.combine_chunks() if isinstance(one, pa.ChunkedArray) else one for one in rows.texts]
    ).take(pa.array(order))


def is_aside(texts: pa.Array, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which texts (N,) are for validation, decided by each alone: equal texts are never on both sides."""
    mixed = hash_texts([texts]) ^ np.random.default_rng(seed).integers(0, 2**64, dtype=np.uint64)
    for shift in (30, 27, 31):  # the text's hash is mixed with the seed once more, bit by bit
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(11)) / 2.0**53 < fraction


def rows_of(
    several: Sequence[Tokens], around: tuple[int, int], max_length: int, packing: bool
) -> tuple[npt.NDArray[np.integer], IntArray]:
    """Rows of at most `max_length` ids, one after the other, and the length of each (R,)."""
    ids, lengths = (np.concatenate(some) for some in zip(*((one.ids, one.lengths) for one in several), strict=True))
    full = lengths > sum(around)
    if packing:
        return pack(ids, lengths, around, max_length)
    return ids[np.repeat(full, lengths)], lengths[full].astype(np.int64)


def pack(
    ids: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer], around: tuple[int, int], max_length: int
) -> tuple[npt.NDArray[np.integer], IntArray]:
    """Lay texts one behind the other, the first special token behind each as a separator, and cut that into rows of `max_length`.

    Texts are given with their special tokens, `around`: so many before and behind each. Each row has these, too; a separator at
    its end or beginning is not there twice. A text goes on in the next row. The last row may be shorter.
    """
    before, behind = around
    place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    left = np.repeat(lengths, lengths) - place
    full = np.repeat(lengths > before + behind, lengths)
    stream = ids[full & (place >= before) & (left > behind - (behind > 0))]
    is_separator = (left == behind)[full & (place >= before) & (left > behind - (behind > 0))] & (behind > 0)
    head, tail = ids[:before], ids[len(ids) - behind :]
    room = max_length - before - behind
    rows = []
    for start in range(0, len(stream), room):
        keep = slice(start, start + room)
        row, ends = stream[keep], is_separator[keep]
        row = row[int(ends[0]) : len(row) - int(ends[-1])]
        if len(row):
            rows.append(np.concatenate([head, row, tail]))
    return np.concatenate([ids[:0], *rows]), np.array([len(row) for row in rows], np.int64)
