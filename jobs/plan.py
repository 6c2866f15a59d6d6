"""Say what jobs.score would do with the same configuration: shards, chunks, rows, tokens, time and cost. Scores nothing.

Reads   listings of archive and output, the footers of shards that are not finished, and some of their rows (0.1%, at least 1,024).
Writes  text to standard output, or one JSON object with --json; with --json FILE the text, and the object to the file. Needs no GPU.

    python -m jobs.plan --config jobs/configs/score.toml --set input.path=s3://bucket/archive --set output.path=s3://bucket/scores
    python -m jobs.plan ... --set forecast.gpus=32 forecast.gpu_hour=3.5          # a cluster that is not there yet
    python -m jobs.plan ... --set forecast.gpus=32 forecast.tokens_per_second=400000 --json plan.json

How fast it will be is, in this order: forecast.tokens_per_second; what an earlier run of the same version reached, or one of another
version with the same weights; a measurement on the cluster at hand, if that has GPUs or none like the one to forecast for. Time is
for a cluster that is used by this run alone and is there when it starts. The interval is that of the tokens: how fast the model
is on the day is not in it.

Exit codes: 0 done, also if the time cannot be told; 2 the command or configuration is wrong; 4 storage or cluster failed, run it
again; 5 stopped on request; 1 a bug.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from math import ceil
from typing import Any

import pyarrow.compute as pc

from lib import scoring, survey
from lib.config import masked, parse_command, write_json
from lib.errors import at_work, run_job
from lib.estimate import CONFIDENCE, Estimate
from lib.forecast import Forecast, Speed, described_cluster, forecast
from lib.run_page import duration
from lib.runtime import Cluster, Layout, plan_layout, ray_session
from lib.score_config import ScoreConfig, ScoreResources

UNKNOWN_SPEED = (
    "not known: no earlier run below output.path says how fast one {unit} is with this model, and {why}; set"
    " forecast.tokens_per_second to the tokens a second of one {unit}"
)

UNKNOWN_TOKENS = "not known: too few of the rows that were tried could be read to say how many tokens there are"


def main(argv: Sequence[str]) -> None:
    """Plan, look at footers and a few rows, and say what that means."""
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const=True,
        help="one JSON object, written here; without FILE on standard output, in place of the text",
    )
    command = parse_command(ScoreConfig, argv, prog="jobs.plan", description=__doc__ or "", extra=extra)
    record = plan(command.config, command.run_id)
    path = command.arguments.json
    if isinstance(path, str):
        write_json(path, record)
    print(json.dumps(record, indent=2) if path is True else "\n".join(lines(record)))


def plan(config: ScoreConfig, run_id: str) -> dict[str, Any]:
    """Everything that can be said before a run, as plain JSON values."""
    run = scoring.prepare(config, run_id)
    with ray_session() as here, at_work():
        wanted = config.forecast
        cluster = described_cluster(wanted) if wanted.describes_cluster else here
        # A described cluster's nodes have the threads that they are said to have, not this machine's.
        most_threads = ceil(cluster.cpus) if wanted.describes_cluster else None
        layout = plan_layout(cluster, config.resources, most_threads)
        # On this cluster nothing but footers and a sample is read: it need not be able to hold what is asked for.
        found, running = survey.take_survey(run, plan_layout(here, ScoreResources()))
        planning_seconds = time.monotonic() - run.begun - found.sampling_seconds
        is_gpu = layout.actor_gpus > 0
        speed, expected, problem = None, None, None
        if found.tokens is None:
            problem = UNKNOWN_TOKENS
        elif found.tally.rows:
            speed, why = survey.find_speed(run, found, running, is_gpu, is_here=(here.gpus >= 1) == is_gpu)
            problem = None if speed else UNKNOWN_SPEED.format(unit="GPU" if is_gpu else "CPU", why=why)
    if speed is not None and found.tokens is not None:
        expected = forecast(found.tokens, found.block_guesses, cluster, layout, speed, planning_seconds, wanted)
    return describe(run, found, cluster, layout, speed, expected, problem)


def describe(
    run: scoring.Run,
    found: survey.Survey,
    cluster: Cluster,
    layout: Layout,
    speed: Speed | None,
    expected: Forecast | None,
    problem: str | None,
) -> dict[str, Any]:
    """The record that --json prints, credentials in URLs left out."""
    outcome, rows = found.outcome, int(found.tally.numbers("rows").sum())
    record = {
        "input": run.job.archive.url,
        "output": run.output.url,
        "model": run.config.model.path,
        "version": run.job.version,
        "is_published": run.is_published,
        "shards": {**survey.count_shards(run), "bad": len(outcome.bad_shards)},
        "bad_shards": outcome.bad_shards,
        "bytes_to_do": int(pc.sum(run.unfinished["size"]).as_py() or 0),
        "chunks_planned": outcome.planned_chunks,
        "rows_planned": outcome.planned_rows,
        "chunks": len(found.tally.rows),
        "rows": rows,
        "blocks": found.tally.num_blocks,
        "tokens": rounded(found.tokens),
        "confidence": CONFIDENCE,
        "sampled_rows": found.sampled_rows,
        "sampled_errors": found.sampled_errors,
        "cluster": {
            "nodes": len(cluster.nodes),
            "cpus": cluster.cpus,
            "gpus": cluster.gpus,
            "actors": layout.num_actors,
        },
        "speed": None if speed is None else describe_speed(speed, layout),
        "problem": problem,
        "seconds": None if expected is None else rounded(expected.seconds),
        "phases": None
        if expected is None
        else {
            "planning": round(expected.planning_seconds, 1),
            "starting": round(expected.starting_seconds, 1),
            "scoring": round(expected.scoring_seconds.value, 1),
            "finishing": round(expected.finishing_seconds, 1),
        },
        "cost": None if expected is None or expected.cost is None else rounded(expected.cost, 2),
        "budget": run.config.limits.budget,
    }
    plain: dict[str, Any] = json.loads(masked(json.dumps(record)))
    return plain


def describe_speed(speed: Speed, layout: Layout) -> dict[str, Any]:
    """How fast one actor is, and who says so."""
    return {
        "actor_tokens_per_second": round(speed.per_unit * (1 if layout.actor_gpus else layout.threads)),
        "source": speed.source,
        "device": None if speed.device is None else str(speed.device),
    }


def rounded(found: Estimate | None, digits: int | None = None) -> dict[str, float] | None:
    """An estimate as JSON."""
    return None if found is None else {name: round(number, digits) for name, number in asdict(found).items()}


def lines(record: dict[str, Any]) -> list[str]:
    """What people read."""
    shards, cluster, tokens = record["shards"], record["cluster"], record["tokens"]
    there, speed = record["chunks_planned"] - record["chunks"], record["speed"]
    said = [
        f"{record['input']}: {shards['all']:,} shards: {shards['finished']:,} finished, {shards['to_do']:,} to do"
        f" ({shards['new']:,} new, {shards['changed']:,} changed, {shards['begun']:,} begun; {shards['bad']:,} of them bad),"
        f" {shards['deleted']:,} deleted; version {record['version']}",
        f"to score: {record['rows']:,} rows in {record['chunks']:,} chunks, {record['blocks']:,} blocks"
        f" (planned: {record['rows_planned']:,} rows in {record['chunks_planned']:,} chunks; {there:,} need no scoring)",
    ]
    if tokens:
        said.append(
            f"tokens: {tokens['value']:,} ({tokens['low']:,} to {tokens['high']:,} with {record['confidence']:.0%} confidence;"
            f" {record['sampled_rows']:,} rows were read, {record['sampled_errors']:,} of them have an error)"
        )
    where = (
        f"{cluster['nodes']:,} nodes, {cluster['cpus']:g} CPUs, {cluster['gpus']:g} GPUs, {cluster['actors']:,} actors"
    )
    if record["problem"]:
        said.append(f"time on {where}: {record['problem']}")
    if not record["rows"]:
        said.append("time: that of listing and publishing, nothing is to be scored")
    if speed:
        device = f" ({speed['device']})" if speed["device"] else ""
        said.append(f"speed: {speed['actor_tokens_per_second']:,} tokens/s an actor: {speed['source']}{device}")
    if seconds := record["seconds"]:
        parts = ", ".join(f"{name} {duration(took)}" for name, took in record["phases"].items())
        low, high = duration(seconds["low"]), duration(seconds["high"])
        said.append(f"time on {where}: {duration(seconds['value'])} ({low} to {high}): {parts}")
    if cost := record["cost"]:
        budget = "" if record["budget"] is None else f"; limits.budget = {record['budget']:g} is {enough(record)}"
        said.append(f"cost: {cost['value']:,.2f} ({cost['low']:,.2f} to {cost['high']:,.2f}){budget}")
    said += [f"bad shard {shard!r}: {why}" for shard, why in sorted(record["bad_shards"].items())[:5]]
    return said


def enough(record: dict[str, Any]) -> str:
    """Whether the budget is."""
    budget, cost = record["budget"], record["cost"]
    if budget >= cost["high"]:
        return "enough"
    return f"not enough: about {budget / cost['value']:.0%} of it" if budget < cost["low"] else "perhaps not enough"


if __name__ == "__main__":
    sys.exit(run_job(main))
