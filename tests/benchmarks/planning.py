"""How much memory and time planning takes: a million shards, most of them finished and published, from a synthetic listing.

    python -m tests.benchmarks.planning [--shards 1000000] [--finished 0.99]

Prints one JSON object. The listing is made here, so no storage is timed but the local disk that the published manifest is read from;
footers are not part of it (Ray tasks read them wave by wave). Memory is the growth of this process's resident set from before the
listing is made to its largest value: `planned_mb` once it is known what is to do (all that `jobs.score` asks for if there is something
to do), `peak_mb` once it is also known whether exactly this is published, as is asked where nothing is to do.
"""

import argparse
import hashlib
import json
import multiprocessing
import tempfile
import threading
import time

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc

from lib import publishing
from lib.listing import LISTING_SCHEMA
from lib.planning import names_exactly, parse_objects, split_finished, with_identities, with_names
from lib.storage import open_store

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


VERSION, RUN = "0123456789abcdef", "2026-11-19"


def publish(folder: str, num_shards: int, finished: float) -> None:
    """Write the manifest of the finished shards, and the pointer to it."""
    objects = parse_objects(make_objects(with_identities(make_listing(num_shards), CHUNK_BYTES), finished))
    found = with_names(objects).append_column("run", pa.repeat(pa.scalar(RUN), objects.num_rows))
    paths = pc.binary_join_element_wise(VERSION, found["path"], "/")
    found = found.set_column(found.column_names.index("path"), "path", paths)
    found = found.append_column("version", pa.repeat(pa.scalar(VERSION), objects.num_rows))
    for name in ("start", "rows", "errors", "bytes"):
        found = found.append_column(name, pa.array(np.arange(objects.num_rows) % 100_003))
    output = open_store(folder)
    run = f"{VERSION}/_runs/{RUN}"
    name = publishing.write_manifest(output.at(run), found.select(publishing.MANIFEST_SCHEMA.names))
    pointer = publishing.Pointer(version=VERSION, run=RUN, manifest=f"{run}/{name}", planned_at="2026-11-19T00:00:00")
    output.replace(publishing.POINTER_NAME, pointer.model_dump_json().encode())


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
    folder = tempfile.TemporaryDirectory()
    publishing_process = multiprocessing.get_context("spawn").Process(
        target=publish, args=(folder.name, arguments.shards, arguments.finished)
    )
    publishing_process.start()
    publishing_process.join()
    output = open_store(folder.name)
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
    split_mb = round((peak.highest - peak.base) / MB)
    published = publishing.read_published(output)
    assert published is not None
    planned = time.perf_counter()
    planned_mb = round((peak.highest - peak.base) / MB)
    is_published = names_exactly(published.shards_in_parts(), finished, shards, objects, keep_deleted=True)
    decided = time.perf_counter()
    assert is_published
    expected = int(arguments.shards * arguments.finished)
    assert (finished.num_rows, unfinished.num_rows) == (expected, arguments.shards - expected)
    print(
        json.dumps(
            {
                "shards": arguments.shards,
                "finished": finished.num_rows,
                "seconds": round(identified - begun + planned - made, 2),
                "seconds_compared": round(decided - planned, 2),
                "split_mb": split_mb,
                "planned_mb": planned_mb,
                "peak_mb": round((peak.highest - peak.base) / MB),
                "kept_mb": round((finished.nbytes + unfinished.nbytes + shards.nbytes + objects.nbytes) / MB),
                "manifest_mb": round(len(published.raw) / MB),
            }
        )
    )


if __name__ == "__main__":
    main()
