"""How well jobs.plan forecasts jobs.score: tokens and seconds, for archives of three length regimes.

    python -m tests.benchmarks.forecast [--regimes web reviews messages] [--tokens 500000] [--shards 8] [--json FILE]

For each regime an archive is planned and scored by a real MiniLM-L6 on the processors of this machine, then as much is added, and that
is planned and scored. The first forecast rests on a short measurement, the second on what the first run reached. Prints predicted and
actual numbers, one line for each; both jobs run in processes of their own, as a user runs them. Seconds are from the command to its
end without the imports of Python. What else the machine does is in them: repeat it before a number is believed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.material import REGIMES, hardware, make_model, make_texts, versions

CHUNK_MB = 0.25
"""Chunks of about 3 s, so that a small archive has enough of them to be like a large one."""


def run_job(name: str, settings: dict[str, str], *words: str) -> str:
    """Run a job in a process of its own; returns what it prints."""
    pairs = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *pairs, *words], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"jobs.{name} ended with exit code {done.returncode}: {done.stderr[-2_000:]}")
    return done.stdout


def add_shards(folder: Path, texts: list[str], shards: int, name: str) -> None:
    """Write texts as shards of several row groups."""
    folder.mkdir(exist_ok=True)
    for index in range(shards):
        part = texts[index * len(texts) // shards : (index + 1) * len(texts) // shards]
        groups = max(1, len(part) // 4)
        pq.write_table(pa.table({"text": part}), folder / f"{name}-{index:03d}.parquet", row_group_size=groups)


def compare(settings: dict[str, str], run_id: str) -> dict[str, Any]:
    """Plan, score, and put both side by side."""
    predicted = json.loads(run_job("plan", settings, "--json"))
    run_job("score", settings, "--run-id", run_id)
    record = next(Path(settings["output.path"]).glob(f"*/_runs/{run_id}/run.json"))
    actual = json.loads(record.read_text())
    (reached,) = actual["throughput"]
    return {
        "speed_from": predicted["speed"]["source"],
        "rows": [predicted["rows"], actual["this_run"]["rows"]],
        "tokens": [predicted["tokens"], actual["this_run"]["tokens"]],
        "tokens_off": predicted["tokens"]["value"] / actual["this_run"]["tokens"] - 1,
        "speed": [predicted["speed"]["actor_tokens_per_second"], reached["tokens_per_second"]],
        "seconds": [predicted["seconds"], actual["seconds"]],
        "seconds_off": predicted["seconds"]["value"] / actual["seconds"] - 1,
        "phases": [predicted["phases"], actual["phases"]],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regimes", nargs="+", default=["web", "reviews", "messages"], choices=list(REGIMES))
    parser.add_argument("--tokens", type=int, default=500_000, help="of each of the two parts of an archive, about")
    parser.add_argument("--shards", type=int, default=8, help="of each part")
    parser.add_argument("--json", metavar="FILE", help="write everything here")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"hardware": hardware(), "versions": versions(), "regimes": {}}
    print(found["hardware"], flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", "MiniLM-L6")
        for regime in arguments.regimes:
            settings = {
                "input.path": str(folder / f"{regime}-archive"),
                "output.path": str(folder / f"{regime}-scores"),
                "model.path": str(folder / "model"),
                "planning.chunk_mb": str(CHUNK_MB),
            }
            rows = arguments.tokens // REGIMES[regime].mean_tokens
            parts: list[dict[str, Any]] = []
            found["regimes"][regime] = parts
            for part in ("first", "second"):
                texts = make_texts(rows, REGIMES[regime], seed=len(parts))
                add_shards(Path(settings["input.path"]), texts, arguments.shards, part)
                one = compare(settings, part)
                parts.append(one)
                print(
                    f"{regime:9} {part:6} tokens {one['tokens'][0]['value']:>9,.0f} / {one['tokens'][1]:>9,} ({one['tokens_off']:+.1%})"
                    f"  seconds {one['seconds'][0]['value']:6.1f} / {one['seconds'][1]:6.1f} ({one['seconds_off']:+.1%})"
                    f"  tokens/s {one['speed'][0]:>8,.0f} / {one['speed'][1]:>8,.0f}  {one['speed_from']}",
                    flush=True,
                )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
