"""What people see of a scoring run: the progress line, `run.json` for programs, `report.html` for eyes.

The report is one file without scripts or outside links: it opens from a bucket, a mail or an archive alike.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from typing import Any

import numpy as np

from lib.config import ScoreConfig
from lib.cost import Meter, Usage
from lib.errors import ExitCode
from lib.outcome import Outcome
from lib.plots import COLOR, bar_plot, render_page, to_svg
from lib.storage import Store

PACKAGES = ("ray", "torch", "transformers", "tokenizers", "pyarrow", "numpy", "s3fs")

SHOWN_LABELS = 30
"""Bars of the label chart; the rest is one bar, and whole in run.json."""


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


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


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
    begun: float
    """the same moment, by `time.monotonic`"""
    model_digest: str
    usage: Usage
    """what the run held of the cluster; nothing if it needed none"""
    outcome: Outcome
    totals: dict[str, int]
    """of the manifest: shards, objects, rows, errors, bytes"""
    cluster: str


def run_record(facts: RunFacts) -> dict[str, Any]:
    """Everything about a run as plain JSON values."""
    outcome = facts.outcome
    seconds = (datetime.now(UTC) - facts.started_at).total_seconds()
    return {
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
        "model_digest": facts.model_digest,
        "output": facts.config.output.path,
        "cluster": facts.cluster,
        "this_run": {
            "chunks_planned": outcome.planned_chunks,
            "chunks_finished": outcome.finished_chunks,
            "rows_planned": outcome.planned_rows,
            "rows": outcome.finished_rows,
            "errors": dict(outcome.errors.most_common()),
            "truncated": outcome.truncated,
            "tokens": outcome.tokens,
            "tokens_per_second": round(outcome.tokens / seconds) if seconds else 0,
            "labels": dict(outcome.labels.most_common()),
            "abstained": outcome.abstained,
            "score_bins": outcome.score_bins.tolist(),
        },
        "cost": cost_record(facts),
        "phases": phases(outcome.marks, facts.begun),
        "throughput": [one.record() for one in outcome.counts.throughput],
        "published_total": facts.totals,
        "bad_shards": outcome.bad_shards,
        "changed_shards": sorted(outcome.changed),
        "missing_objects": outcome.missing,
        "crashing_rows": outcome.guilty,
        "failures": list(outcome.counts.failures),
        "config": facts.config.model_dump(mode="json"),
        "packages": {name: package_version(name) for name in PACKAGES},
    }


def cost_record(facts: RunFacts) -> dict[str, float | None]:
    """What the run held, in seconds, and what that costs; actors work for a part of it."""
    held = {name: round(seconds, 1) for name, seconds in asdict(facts.usage).items()}
    actors = {
        "actor_seconds": round(sum(one.seconds for one in facts.outcome.counts.throughput), 1),
        "busy_seconds": round(sum(one.busy_seconds for one in facts.outcome.counts.throughput), 1),
    }
    cost = facts.usage.cost(facts.config.forecast)
    return {**held, **actors, "cost": None if cost is None else round(cost, 4), "budget": facts.config.limits.budget}


def phases(marks: dict[str, float], begun: float) -> dict[str, float]:
    """Seconds of each part of a run, as far as it came: planning its first wave, starting actors, scoring, and what came after."""
    moments = [("planning", "planned"), ("starting", "begun"), ("scoring", "ended")]
    found, last = {}, begun
    for name, event in moments:
        if event in marks:
            found[name], last = round(marks[event] - last, 1), marks[event]
    return {**found, "finishing": round(time.monotonic() - last, 1)}


def write_report(run: Store, record: dict[str, Any]) -> None:
    """Write `run.json`, `config.json` and `report.html` of a run."""
    run.replace("run.json", json.dumps(record, indent=2).encode())
    run.replace("config.json", json.dumps(record["config"], indent=2).encode())
    run.replace("report.html", render(record).encode())


def render(record: dict[str, Any]) -> str:
    """The report as one HTML page; every value is escaped, plots are inline SVG."""
    labels = record["this_run"]["labels"]
    shown = dict(list(labels.items())[:SHOWN_LABELS])
    if len(labels) > SHOWN_LABELS:
        shown[f"{len(labels) - SHOWN_LABELS} more"] = sum(labels.values()) - sum(shown.values())
    plots = {"Labels": bar_plot(shown)} if shown else {}
    if any(record["this_run"]["score_bins"]):
        plots["Scores"] = histogram_plot(record["this_run"]["score_bins"])
    return render_page(PAGE, record=record, run=record["this_run"], plots=plots, duration=duration)


def histogram_plot(bins: list[int]) -> str:
    """A histogram of scores from 0 to 1, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, 1, len(bins) + 1)
    axes.bar(edges[:-1], bins, width=1 / len(bins), align="edge", color=COLOR, edgecolor="white")
    axes.set_xlabel("score (probability of the label given)")
    axes.set_ylabel("rows")
    return to_svg(figure)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Textsweep run {{ record.run_id }}</title>
<style>
{{ style | safe }}</style></head><body>
<h1>Textsweep run {{ record.run_id }}: <span class="{{ 'done' if record.exit_code == 0 else 'bad' }}">{{ record.status }}</span></h1>
<p>{{ record.message }}</p>
<div class="tiles">
<div class="tile"><b>{{ "{:,}".format(run.rows) }}</b><span>rows scored in this run</span></div>
<div class="tile"><b>{{ "{:,}".format(run.errors.values() | sum) }}</b><span>of them with an error</span></div>
<div class="tile"><b>{{ duration(record.seconds) }}</b><span>start to end</span></div>
<div class="tile"><b>{{ "{:,}".format(run.tokens_per_second) }}</b><span>tokens/s, start-up included</span></div>
{% if record.cost.cost is not none %}<div class="tile"><b>{{ "{:,.2f}".format(record.cost.cost) }}</b><span>cost{% if record.cost.budget %}, of a budget of {{ "{:,g}".format(record.cost.budget) }}{% endif %}</span></div>
{% endif %}<div class="tile"><b>{{ "{:,}".format(record.published_total.rows) }}</b><span>rows in the manifest, {{ "{:,}".format(record.published_total.shards) }} shards</span></div>
</div>
{% for title, plot in plots.items() %}<h2>{{ title }}</h2>{{ plot | safe }}{% endfor %}
{% if run.errors %}<h2>Rows with an error</h2><table><tr><th>reason</th><th>rows</th></tr>
{% for name, count in run.errors.items() %}<tr><td>{{ name }}</td><td>{{ "{:,}".format(count) }}</td></tr>{% endfor %}</table>
<p>Which rows: the Parquet files below <code>{{ record.version }}/_dead_letter/</code> name shard and row.</p>{% endif %}
{% if record.bad_shards %}<h2>Bad shards</h2><table><tr><th>shard</th><th>why</th></tr>
{% for name, why in record.bad_shards.items() %}<tr><td>{{ name }}</td><td>{{ why }}</td></tr>{% endfor %}</table>
<p>They are tried again by every run.</p>{% endif %}
{% for title, names in (("Shards that changed while they were scored", record.changed_shards), ("Objects missing after every attempt", record.missing_objects), ("Reported by tasks", record.failures)) %}
{% if names %}<h2>{{ title }}</h2><ul>{% for name in names %}<li>{{ name }}</li>{% endfor %}</ul>{% endif %}{% endfor %}
<h2>The run</h2><table>
{% for name in ("input", "model", "output", "version", "started_at", "cluster", "published") %}<tr><th>{{ name }}</th><td>{{ record[name] }}</td></tr>{% endfor %}
<tr><th>chunks</th><td>{{ run.chunks_finished }} of {{ run.chunks_planned }} planned</td></tr>
<tr><th>tokens</th><td>{{ "{:,}".format(run.tokens) }}; {{ "{:,}".format(run.truncated) }} texts were cut at the length limit</td></tr>
<tr><th>held</th><td>{{ duration(record.cost.gpu_seconds) }} of GPUs, {{ duration(record.cost.cpu_seconds) }} of CPUs, {{ duration(record.cost.node_seconds) }} of nodes</td></tr>
{% for one in record.throughput %}<tr><th>actors</th><td>{{ one.actors }} on {{ one.device.name }} ({{ one.device.engine }}, {{ one.device.precision }}): {{ "{:,.0f}".format(one.tokens_per_second) }} tokens/s each, busy for {{ "{:.0%}".format(one.busy_seconds / one.seconds if one.seconds else 0) }} of {{ duration(one.seconds) }}</td></tr>
{% endfor %}{% if run.abstained %}<tr><th>no label</th><td>{{ "{:,}".format(run.abstained) }} rows: the model is not sure enough of any</td></tr>
{% endif %}<tr><th>packages</th><td>{% for name, number in record.packages.items() %}{{ name }} {{ number }}{{ ", " if not loop.last }}{% endfor %}</td></tr></table>
<h2>Configuration</h2><pre>{{ record.config | tojson(indent=2) }}</pre>
</body></html>
"""
