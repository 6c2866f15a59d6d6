"""How long a resume takes to come to new work: 10,000 shards on a real S3 server, 99% of them finished.

    python -m tests.benchmarks.resume [--shards 10000] [--finished 0.99]

Prints one JSON object: seconds from the command line to the plan, to the first request for an unfinished shard, and to its
predictions, with imports and the model's loading, on a Ray that is running already, as for a submitted job; and how often a
finished shard or its object was opened. The finished objects are empty files: whoever opened one would fail.
"""

import argparse
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo_store import LoopbackS3
from lib.config import validate
from lib.score_config import ScoreConfig
from lib.scoring import prepare
from lib.storage import Store, open_store
from tests import fakes
from tests.waiting import wait_until

import ray  # isort: skip  # after lib, which sets how Ray authenticates

SCHEMA_SAMPLE = 20
"""Shards whose footers may be opened to learn the columns, finished or not: the first ones."""


def write_all(store: Store, names: list[str], data: bytes) -> None:
    """Create many equal objects."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.create(name, data), names))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--finished", type=float, default=0.99)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, LoopbackS3(Path(folder) / "server.log") as server:
        os.environ.update(server.environment)
        ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        print(json.dumps(measure(server, Path(folder), arguments.shards, int(arguments.shards * arguments.finished))))


def measure(server: LoopbackS3, folder: Path, shards: int, finished: int) -> dict[str, float]:
    """Make the archive and what is finished of it, and run the job."""
    fakes.make_classifier(folder / "model", "bert", ("down", "same", "up"))
    archive, output = server.bucket(), server.bucket()  # this server looks at a whole bucket for each page of a listing
    values = {
        "input": {"path": f"{archive}/archive"},
        "model": {"path": str(folder / "model"), "precision": "fp32"},
        "output": {"path": f"{output}/scores"},
    }
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["one text", "and another"]}), sink)
    names = [f"part-{number:05d}.parquet" for number in range(shards)]
    write_all(open_store(f"{archive}/archive"), names, sink.getvalue())
    run = prepare(validate(ScoreConfig, values), "plan")
    rows = run.shards.slice(0, finished).select(["path", "identity"]).to_pylist()
    write_all(run.job.output, [f"{one['path']}-{one['identity']}-00000-of-00001.parquet" for one in rows], b"")
    before = len(server.requests())

    settings = [f"{section}.{key}={value}" for section, keys in values.items() for key, value in keys.items()]
    words = [word for setting in settings for word in ("--set", setting)]
    log = folder / "job.log"
    new = f"part-{finished:05d}.parquet"
    with log.open("wb") as printed:
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.score", *words, "--run-id", "resume"], stdout=printed, stderr=printed
        )
    seconds = {}

    def seen(method: str, part: str) -> Callable[[], bool]:
        def look() -> bool:
            assert process.poll() in (None, 4), log.read_text()
            return any(one[0] == method and part in one[1] for one in server.requests()[before:])

        return look

    try:
        wait_until(lambda: " to do (" in log.read_text(), "the plan", 120)
        seconds["plan"] = time.monotonic() - begun
        wait_until(seen("GET", f"/archive/{new}"), "the first request for an unfinished shard", 120)
        seconds["first_read"] = time.monotonic() - begun
        wait_until(seen("PUT", f"/{new}-"), "the first predictions", 120)
        seconds["first_written"] = time.monotonic() - begun
    finally:
        process.terminate()
        process.wait()
    opened = 0
    for method, path, _ in server.requests()[before:]:
        found = re.search(r"/part-([0-9]{5})\.parquet", path.partition("?")[0])
        if method == "GET" and found and int(found[1]) < finished:
            opened += int(found[1]) >= SCHEMA_SAMPLE or "-of-" in path
    return {"shards": shards, "finished": finished, **{k: round(v, 1) for k, v in seconds.items()}, "opened": opened}


if __name__ == "__main__":
    main()
