"""Where the design stops scaling: the numbers behind the section of that name in the README.

    python -m tests.benchmarks.scaling [--measure]

Prints how many hours a million blocks take on 1,000 GPUs, by how long a block takes and how many make a wave: computed with
`lib.forecast`, the times of blocks spread by 20%, 15 s assumed between two waves. With --measure also what this machine's cores
take, in a local Ray: messages a second of the progress actor, and the processor time of a driver for each block of a run over
1,000 shards of one chunk with a tiny model, start-up included.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from lib.forecast import BLOCK_SECONDS, scoring_seconds
from lib.planning import MAX_WAVE_BLOCKS
from lib.progress import start_progress
from tests import fakes

import ray  # isort: skip  # after lib, which sets how Ray authenticates

GPUS, BLOCKS = 1_000, 1_000_000
SPREAD = 0.2
BETWEEN_WAVES = 15.0
MESSAGES = 20_000
SHARDS = 1_000


def hours(block_seconds: float, wave_blocks: int, driver_seconds: float) -> float:
    """Of all blocks, if each takes so long on average."""
    chance = np.random.default_rng(0)
    taken = block_seconds * np.maximum(0.1, 1 + SPREAD * chance.standard_normal(BLOCKS))
    return scoring_seconds(taken, GPUS, 1.0, BETWEEN_WAVES, wave_blocks, driver_seconds) / 3600


def messages_a_second() -> float:
    """What the progress actor takes, sent by one process."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    progress = start_progress("0" * 16)
    progress.read.remote()
    begun = time.monotonic()
    for _ in range(MESSAGES):
        progress.add.remote("one", 1, 100, 1)
    found = ray.get(progress.read.remote())
    seconds = time.monotonic() - begun
    assert found.rows == MESSAGES, f"{found.rows} rows, expected {MESSAGES}: the actor takes its messages in order"
    ray.shutdown()
    return MESSAGES / seconds


def driver_seconds_a_block(folder: Path) -> float:
    """Processor time of the process that runs `jobs.score`, without those that Ray starts."""
    fakes.make_classifier(folder / "model", "bert", ("no", "yes"))
    shards = {f"{number:04d}.parquet": pa.table({"text": [f"row of shard {number}"]}) for number in range(SHARDS)}
    fakes.write_archive(str(folder / "archive"), shards)
    paths = {"input.path": "archive", "model.path": "model", "output.path": "scores"}
    # A chunk as small as its shard: blocks hold one each.
    values = [*(f"{key}={folder}/{name}" for key, name in paths.items()), "planning.chunk_mb=0.00001"]
    words = [word for value in values for word in ("--set", value)]
    process = psutil.Popen([sys.executable, "-W", "ignore", "-m", "jobs.score", *words, "--run-id", "scaling"], stdout=subprocess.DEVNULL)  # fmt: skip
    spent = 0.0
    while process.poll() is None:
        times = process.cpu_times()
        spent = times.user + times.system
        time.sleep(0.2)
    assert process.returncode == 0, f"jobs.score ended with {process.returncode}"
    return spent / SHARDS


def main() -> None:
    """Compute, perhaps measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="a few minutes more")
    arguments = parser.parse_args()
    print(
        f"{BLOCKS:,} blocks, {GPUS:,} GPUs; hours without loss, in waves of {MAX_WAVE_BLOCKS:,} and ten times as many"
    )
    for seconds in (10, 23, 40, 80):
        ideal = seconds * BLOCKS / GPUS / 3600
        line = f"  {seconds:3} s a block: {ideal:6.2f}"
        for blocks in (MAX_WAVE_BLOCKS, 10 * MAX_WAVE_BLOCKS):
            alone, led = (hours(seconds, blocks, each) for each in (0.0, BLOCK_SECONDS))
            line += f"; {alone:6.2f} ({alone / ideal - 1:+.0%}), with a driver of {1000 * BLOCK_SECONDS:g} ms a block {led:6.2f}"
        print(line, flush=True)
    if arguments.measure:
        print(f"progress actor: {messages_a_second():,.0f} messages/s", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            print(
                f"driver: {1000 * driver_seconds_a_block(Path(folder)):.0f} ms of processor time a block of {SHARDS:,}"
            )


if __name__ == "__main__":
    main()
