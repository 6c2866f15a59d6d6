"""How much memory and time planning takes: a million shards, most of them finished, from a synthetic listing.

    python -m tests.benchmarks.planning [--shards 1000000] [--finished 0.99]

Prints one JSON object. The listing is made here, so no storage is timed; footers are not part of it (Ray tasks read them wave
by wave). Memory is the growth of this process's resident set from before the listing is made to its largest value.
"""

import argparse
import hashlib
import json
import threading
import time

import psutil
import pyarrow as pa

from lib.listing import LISTING_SCHEMA
from lib.planning import parse_objects, split_finished, with_identities

MB = 2**20
CHUNK_BYTES = 64 * MB
PAGE = 1_000
"""Keys of one page of an S3 listing."""


def make_listing(shards: int) -> pa.Table:
    """A listing as `Store.list` gives it, page by page."""
    pages = []
    for start in range(0, shards, PAGE):
        numbers = range(start, min(shards, start + PAGE))
        pages.append(
            pa.table(
                [
                    pa.array(
                        [f"dt=2026-{number // 100_000 + 1:02d}-01/part-{number:08d}.parquet" for number in numbers]
                    ),
                    pa.array([40 * MB + number for number in numbers], pa.int64()),
                    pa.array(
                        [hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest() for number in numbers]
                    ),
                    pa.array([1_790_000_000_000_000_000 + number for number in numbers], pa.int64()),
                ],
                schema=LISTING_SCHEMA,
            )
        )
    return pa.concat_tables(pages)


def make_objects(shards: pa.Table, finished: float) -> pa.ChunkedArray:
    """Names of the objects of the finished shards."""
    names = []
    for part in shards.slice(0, int(shards.num_rows * finished)).to_batches(max_chunksize=65_536):
        rows = zip(part["path"].to_pylist(), part["identity"].to_pylist(), strict=True)
        names.append(pa.array([f"{path}-{identity}-00000-of-00001.parquet" for path, identity in rows]))
    return pa.chunked_array(names, pa.string())


class Peak(threading.Thread):
    """Samples the resident set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process()
        self.base = self.highest = self.process.memory_info().rss

    def run(self) -> None:
        while True:
            self.highest = max(self.highest, self.process.memory_info().rss)
            time.sleep(0.01)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--finished", type=float, default=0.99)
    arguments = parser.parse_args()
    warm = make_listing(PAGE)
    split_finished(
        with_identities(warm, CHUNK_BYTES), parse_objects(make_objects(with_identities(warm, CHUNK_BYTES), 0.5))
    )
    peak = Peak()
    peak.start()
    listing = make_listing(arguments.shards)
    begun = time.perf_counter()
    shards = with_identities(listing, CHUNK_BYTES)
    identified = time.perf_counter()
    del listing
    names = make_objects(shards, arguments.finished)
    made = time.perf_counter()
    objects = parse_objects(names)
    del names
    finished, unfinished = split_finished(shards, objects)
    split = time.perf_counter()
    expected = int(arguments.shards * arguments.finished)
    assert (finished.num_rows, unfinished.num_rows) == (expected, arguments.shards - expected)
    print(
        json.dumps(
            {
                "shards": arguments.shards,
                "finished": finished.num_rows,
                "seconds": round(identified - begun + split - made, 2),
                "peak_mb": round((peak.highest - peak.base) / MB),
                "kept_mb": round((finished.nbytes + unfinished.nbytes + shards.nbytes) / MB),
            }
        )
    )


if __name__ == "__main__":
    main()
