"""What is known of a scoring run: the progress line while it goes on, `run.json` for programs and for its `report.html`."""

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version as package_version
from typing import Any

from lib.config import masked
from lib.cost import Meter, Usage
from lib.course import FINISHING, PLANNING, START_UP, WAITING
from lib.drift import Shift
from lib.errors import ExitCode, TextsweepError, say
from lib.history import Baseline, recent_runs
from lib.outcome import Outcome, Tally
from lib.run_page import duration, render
from lib.schema import Head
from lib.score_config import ScoreConfig
from lib.storage import Store

PACKAGES = ("ray", "torch", "transformers", "tokenizers", "pyarrow", "numpy", "s3fs")


@dataclass
class ProgressLine:
    """One line about a run: rewritten in place on a terminal, printed every few seconds in a log."""

    every_seconds: float = 10
    started_at: float = field(default_factory=time.monotonic)
    shown_at: float = 0
    first: tuple[float, int, int] | None = None
    """when the first micro-batch was seen, and the rows and tokens done by then: start-up is left out of the rates"""
    meter: Meter | None = None
    """says what the run has cost so far"""

    def __call__(self, outcome: Outcome) -> None:
        """Show how far the run is, if it is time to."""
        terminal = sys.stderr.isatty()
        now = time.monotonic()
        if now - self.shown_at < (0.5 if terminal else self.every_seconds):
            return
        self.shown_at = now
        if outcome.counts.rows and self.first is None:
            self.first = (now, outcome.counts.rows, outcome.counts.tokens)
        print(self.text(outcome, now), end="\r" if terminal else "\n", file=sys.stderr, flush=True)

    def text(self, outcome: Outcome, now: float) -> str:
        """The line itself."""
        planned, counts = outcome.planned_rows, outcome.counts
        done = min(planned, max(counts.rows, outcome.finished_rows))
        elapsed = f"{duration(now - self.started_at)}"
        if not planned:
            return f"scoring: reading the shards' footers, {elapsed} so far"
        if self.first is None:
            return f"scoring: {planned:,} rows planned, starting actors and loading the model, {elapsed} so far"
        since, rows_before, tokens_before = self.first
        seconds = now - since
        speed = ""
        if seconds > 1 and done > rows_before:
            rate = (done - rows_before) / seconds
            left = duration((planned - done) / rate)
            speed = f", {rate:,.0f} rows/s, {(counts.tokens - tokens_before) / seconds:,.0f} tokens/s, {left} left"
        bad, spent = outcome.errors.total(), str(self.meter or "")
        return (
            f"scoring: {done:,} of {planned:,} rows ({done / planned:.1%}), {bad:,} bad rows, {elapsed} so far{speed}"
            f"{spent and ', '}{spent}"
        )

    def close(self) -> None:
        """Leave the terminal's line."""
        if sys.stderr.isatty():
            print(file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known when a run ends."""

    run_id: str
    version: str
    config: ScoreConfig
    exit_code: ExitCode
    message: str
    published: bool
    started_at: datetime
    model_digest: str
    usage: Usage
    """what the run held of the cluster; nothing if it needed none"""
    outcome: Outcome
    totals: dict[str, int]
    """of the manifest: shards, objects, rows, errors, bytes; nothing of a run that came to none"""
    cluster: str
    heads: tuple[Head, ...]
    seconds_planning: float
    """from the run's start to that of its course"""
    new_rows: Tally
    """what no run has published yet: this run's objects, and those that a run before it left"""
    baseline: Baseline
    shifts: list[Shift]
    """of the new rows from the baseline's"""


def run_record(facts: RunFacts) -> dict[str, Any]:
    """Everything about a run as plain JSON values, credentials in URLs left out."""
    outcome, config = facts.outcome, facts.config.model_dump(mode="json")
    seconds = (datetime.now(UTC) - facts.started_at).total_seconds()
    course = outcome.course.record(facts.seconds_planning)
    record = {
        "run_id": facts.run_id,
        "version": facts.version,
        "exit_code": int(facts.exit_code),
        "status": facts.exit_code.name.lower(),
        "message": facts.message,
        "published": facts.published,
        "started_at": facts.started_at.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "input": facts.config.input.path,
        "model": facts.config.model.path,
        "output": facts.config.output.path,
        "cluster": facts.cluster,
        "model_digest": facts.model_digest,
        "config_digest": sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "heads": [{"name": head.name, "task": head.task.value} for head in facts.heads],
        "this_run": {
            "chunks_planned": outcome.planned_chunks,
            "chunks_finished": outcome.finished_chunks,
            "rows_planned": outcome.planned_rows,
            **outcome.record(),
            "tokens_per_second": round(outcome.tokens / seconds) if seconds else 0,
            "padding_tokens": outcome.counts.padding,
            "num_actors": outcome.counts.num_actors,
            "actor_seconds": rounded(outcome.counts.actor_seconds),
            "chunk_seconds": rounded(outcome.stage_seconds),
        },
        "new_rows": facts.new_rows.record(),
        "drift": {
            "baseline": facts.baseline.name,
            "why_none": facts.baseline.why_not,
            "max_psi": facts.config.drift.max_psi,
            "shifts": [shift.record() for shift in facts.shifts],
        },
        "course": course,
        "slowest_shards": [
            {"shard": shard, **asdict(spent), "seconds": round(spent.seconds, 3)}
            for shard, spent in outcome.slowest.items()
        ],
        "error_examples": {
            reason: [{"shard": shard, "row": row} for shard, row in rows] for reason, rows in outcome.error_rows.items()
        },
        "cost": cost_record(facts),
        "phases": phases(course["stages"]),
        "throughput": [one.record() for one in outcome.counts.throughput],
        "published_total": facts.totals,
        "bad_shards": outcome.bad_shards,
        "changed_shards": sorted(outcome.changed),
        "missing_objects": outcome.missing,
        "crashing_rows": outcome.guilty,
        "failures": list(outcome.counts.failures),
        "config": config,
        "packages": {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}},
    }
    plain: dict[str, Any] = json.loads(masked(json.dumps(record)))
    return plain


def cost_record(facts: RunFacts) -> dict[str, float | None]:
    """What the run held, in seconds, and what that costs; actors work for a part of it."""
    held = {name: round(seconds, 1) for name, seconds in asdict(facts.usage).items()}
    actors = {
        "actor_seconds": round(sum(one.seconds for one in facts.outcome.counts.throughput), 1),
        "busy_seconds": round(sum(one.busy_seconds for one in facts.outcome.counts.throughput), 1),
    }
    cost = facts.usage.cost(facts.config.forecast)
    return {**held, **actors, "cost": None if cost is None else round(cost, 4), "budget": facts.config.limits.budget}


def phases(stages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each part of a run, as far as it came: planning its waves, waiting for nodes, starting actors, scoring, what came after."""
    names = {PLANNING: "planning", WAITING: "waiting", START_UP: "starting", FINISHING: "finishing"}
    found: dict[str, float] = {}
    for one in stages:
        name = names.get(one["stage"], "scoring")
        found[name] = found.get(name, 0.0) + one["end"] - one["start"]
    return {name: round(seconds, 1) for name, seconds in found.items()}


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds to the millisecond."""
    return {name: round(value, 3) for name, value in seconds.items()}


def write_report(version: Store, run_id: str, record: dict[str, Any]) -> None:
    """Write `run.json`, `config.json` and `report.html` of a run. Earlier runs, beside which it is shown, may be unreadable."""
    run = version.at(f"_runs/{run_id}")
    run.replace("run.json", json.dumps(record, indent=2).encode())
    run.replace("config.json", json.dumps(record["config"], indent=2).encode())
    earlier = []
    try:
        earlier = recent_runs(version, run_id)
    except (TextsweepError, OSError) as error:
        say(f"WARNING: the report shows no earlier runs, they cannot be read: {error}")
    run.replace("report.html", render(record, earlier).encode())
