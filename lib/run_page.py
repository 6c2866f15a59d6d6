"""The `report.html` of a scoring run: how it went, what came of it, how that differs from earlier runs, where it came from.

One file without scripts or outside links: it opens from a bucket, a mail or an archive alike. It is made of `run.json` alone, the
run's own and those of earlier runs. Rows are named by shard and number, never by their text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lib.drift import LENGTH_NAMES
from lib.history import counts_of
from lib.plots import COLOR, GREY, PALETTE, SECOND_COLOR, bar_plot, render_page, to_svg

SHOWN_LABELS = 30
"""Bars of the label chart; the rest is one bar, and whole in run.json."""

MIXED_LABELS = 7
"""Labels that are told apart in a chart of several runs; more colours are not told apart by eye."""

SHOWN_HEADS = 6

SMOOTHED = 60
"""Throughput is averaged over about so many parts of a run: micro-batches and chunks end in bursts."""


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def render(record: dict[str, Any], earlier: Sequence[dict[str, Any]]) -> str:
    """The report as one HTML page, given the records of a run and of earlier ones, the latest first.

    Every value is escaped, plots are inline SVG.
    """
    runs = [record, *earlier]
    actor_hours = sum(record["this_run"]["actor_seconds"].values()) / 3600
    return render_page(
        PAGE,
        record=record,
        run=record["this_run"],
        course=course_plot(record["course"]),
        labels=label_plots(record),
        mixes=mix_plots(runs),
        scores=scores_plot(runs),
        lengths=lengths_plot(runs),
        stages=record["course"]["stages"],
        earlier=earlier,
        actor_hours=actor_hours,
        rows_per_actor_hour=record["this_run"]["rows"] / actor_hours if actor_hours else 0,
        padding_share=share(record["this_run"]["padding_tokens"], record["this_run"]["tokens"]),
        idle_share=idle_share(record["this_run"]["actor_seconds"]),
        duration=duration,
        exact=exact,
    )


def exact(seconds: float) -> str:
    """Seconds as people say them, with a fraction where they are few."""
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def share(part: float, rest: float) -> float:
    """A part of it and the rest together."""
    return part / (part + rest) if part else 0.0


def idle_share(seconds: Mapping[str, float]) -> float:
    """The time that actors with a loaded model wait, of all their time with one."""
    return share(seconds.get("idle", 0.0), seconds.get("busy", 0.0))


# plots


def new_figure(height: float = 2.6) -> Any:
    """An empty figure, as wide as all of a page's."""
    from matplotlib.figure import Figure

    return Figure(figsize=(6, height), layout="constrained")


def course_plot(course: Mapping[str, Any]) -> str | None:
    """Rows a second over the run, its stages shaded, and the actors at work; None if nothing was scored."""
    points = course["points"]
    seconds, rows, busy = (np.array(points[name], float) for name in ("seconds", "rows", "busy_actors"))
    if len(seconds) < 3 or not rows[-1]:
        return None
    scale, unit = (3600, "h") if seconds[-1] > 3 * 3600 else (60, "min") if seconds[-1] > 180 else (1, "s")
    edges = np.linspace(seconds[0], seconds[-1], min(len(seconds), SMOOTHED + 1))
    rates = np.diff(np.interp(edges, seconds, rows)) / np.diff(edges)
    figure = new_figure(3.0)
    axes, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    axes.stairs(rates, edges / scale, fill=True, color=COLOR, zorder=2)
    axes.set_ylabel("rows/s")
    axes.set_ylim(0, rates.max() * 1.18)
    for number, stage in enumerate(course["stages"]):
        start, end = stage["start"] / scale, min(stage["end"], seconds[-1]) / scale
        if end <= start:
            continue
        for part in (axes, below):
            part.axvspan(start, end, color=GREY, alpha=0.16 if number % 2 else 0.05, lw=0, zorder=0)
        if end - start > 0.09 * edges[-1] / scale:
            axes.text((start + end) / 2, rates.max() * 1.09, stage["stage"], ha="center", va="center", fontsize=8)
    below.fill_between(seconds / scale, busy, step="pre", color=SECOND_COLOR, lw=0, zorder=2)
    below.set(xlabel=f"{unit} since the start", ylabel="busy", ylim=(0, max(1, busy.max()) * 1.1))
    below.yaxis.get_major_locator().set_params(integer=True, nbins=2)
    below.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, seconds[-1] / scale)
    return to_svg(figure)


def label_plots(record: Mapping[str, Any]) -> dict[str, str]:
    """How often each label was given, by head."""
    found = {}
    for head, counts in by_head(record, record["this_run"]["labels"]).items():
        shown = dict(list(counts.items())[:SHOWN_LABELS])
        if len(counts) > SHOWN_LABELS:
            shown[f"{len(counts) - SHOWN_LABELS} more"] = sum(counts.values()) - sum(shown.values())
        if shown:
            found[f"Labels of {head}" if head else "Labels"] = bar_plot(shown)
    return found


def by_head(record: Mapping[str, Any], labels: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Counts of labels by the head that gave them; the only head has no name."""
    heads = [head["name"] for head in record["heads"]] or [""]
    if len(heads) == 1:
        return {"": dict(labels)}
    return {
        head: {name.removeprefix(f"{head}/"): count for name, count in labels.items() if name.startswith(f"{head}/")}
        for head in heads[:SHOWN_HEADS]
    }


def mix_plots(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The label mix of new rows, this run and earlier ones below one another, by head; nothing if there is no earlier run."""
    found = {}
    for head in by_head(runs[0], {}) if len(runs) > 1 else ():
        mixes = {
            one["run_id"]: by_head(runs[0], (counts_of(one) or {"labels": {}})["labels"]).get(head, {}) for one in runs
        }
        if sum(bool(mix) for mix in mixes.values()) > 1:
            found[f"Label mix of {head}" if head else "Label mix"] = mix_plot(mixes)
    return found


def mix_plot(mixes: Mapping[str, Mapping[str, int]]) -> str:
    """One bar a run, cut into the parts of its labels."""
    total: dict[str, float] = {}
    for mix in mixes.values():
        for label, count in mix.items():
            total[label] = total.get(label, 0.0) + count / sum(mix.values())
    ranked = sorted(total, key=lambda label: -total[label])
    shown = ranked[:MIXED_LABELS]
    names = [name if len(name) < 22 else f"…{name[-20:]}" for name in mixes]
    lines = -(-(len(shown) + 1) // 3)
    figure = new_figure(0.75 + 0.3 * len(mixes) + 0.22 * lines)
    axes = figure.subplots()
    left, handles, titles = np.zeros(len(mixes)), [], []
    groups = [*([label] for label in shown), ranked[MIXED_LABELS:]]
    for wanted, color in zip(groups, [*PALETTE[: len(shown)], GREY], strict=True):
        parts = np.array([sum(mix.get(one, 0) for one in wanted) / max(1, sum(mix.values())) for mix in mixes.values()])
        if parts.any():
            handles.append(axes.barh(range(len(mixes)), parts, left=left, color=color, height=0.72))
            name = wanted[0] if color != GREY else f"{len(wanted)} more"
            titles.append(name if len(name) < 24 else f"{name[:21]}…")
            left += parts
    axes.set_yticks(range(len(mixes)), names, fontsize=8, parse_math=False)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    # Given by hand: matplotlib leaves out labels that begin with an underscore.
    legend = figure.legend(handles, titles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return to_svg(figure)


def scores_plot(runs: Sequence[Mapping[str, Any]]) -> str | None:
    """The histogram of scores of new rows, and those of earlier runs as lines; None if there are none in it."""
    bins = len(runs[0]["this_run"]["score_bins"])
    edges = np.linspace(0, 1, bins + 1)
    figure = new_figure()
    if not overlay(figure, runs, "score_bins", edges):
        return None
    figure.axes[0].set_xlabel("score (probability of the label given)")
    return to_svg(figure)


def lengths_plot(runs: Sequence[Mapping[str, Any]]) -> str | None:
    """The histogram of text lengths of new rows in tokens, and those of earlier runs as lines; None if there are none."""
    used = [place for one in runs for place in np.flatnonzero((counts_of(one) or {}).get("length_bins", []))]
    if not used:
        return None
    first, last = min(used), max(used)
    figure = new_figure(2.8)
    if not overlay(figure, runs, "length_bins", np.arange(len(LENGTH_NAMES) + 1)):
        return None
    axes = figure.axes[0]
    axes.set_xlim(first, last + 1)
    names = [name.rpartition(" ")[2] if "to" in name else f">{name.rpartition(' ')[2]}" for name in LENGTH_NAMES]
    axes.set_xticks(np.arange(first, last + 1) + 1, names[first : last + 1], fontsize=8)
    axes.set_xlabel("tokens of a text, up to")
    return to_svg(figure)


def overlay(figure: Any, runs: Sequence[Mapping[str, Any]], name: str, edges: Any) -> bool:
    """Draw parts of rows by bin: this run filled, the one before it as a line, older ones thin; False if this run has none."""
    counts = [np.array((counts_of(one) or {}).get(name, []), float) for one in runs]
    if not counts[0].sum():
        return False
    axes = figure.subplots()
    axes.stairs(100 * counts[0] / counts[0].sum(), edges, fill=True, color=COLOR, alpha=0.85, label="this run")
    for age, (one, run) in enumerate(zip(counts[1:], runs[1:], strict=True)):
        if len(one) == len(counts[0]) and one.sum():
            title = {0: f"before: {run['run_id'][-24:]}", 1: "older"}.get(age)
            look = {"color": SECOND_COLOR, "lw": 1.8} if age == 0 else {"color": GREY, "lw": 0.8}
            axes.stairs(100 * one / one.sum(), edges, baseline=None, label=title, zorder=4 - age, **look)
    axes.set_ylabel("% of rows")
    axes.set_ylim(bottom=0)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    return True


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Textsweep run {{ record.run_id }}</title>
<style>
{{ style | safe }}</style></head><body>
<h1>Textsweep run {{ record.run_id }}: <span class="{{ 'done' if record.exit_code == 0 else 'bad' }}">{{ record.status | replace("_", " ") }}</span></h1>
<p>{{ record.message }}</p>
<div class="tiles">
<div class="tile"><b>{{ "{:,}".format(run.rows) }}</b><span>rows scored in this run</span></div>
<div class="tile"><b>{{ "{:,}".format(run.errors.values() | sum) }}</b><span>of them with an error</span></div>
<div class="tile"><b>{{ duration(record.seconds) }}</b><span>start to end</span></div>
<div class="tile"><b>{{ "{:,}".format(run.tokens_per_second) }}</b><span>tokens/s, start-up included</span></div>
{% if record.cost.cost is not none %}<div class="tile"><b>{{ "{:,.2f}".format(record.cost.cost) }}</b><span>cost{% if record.cost.budget %}, of a budget of {{ "{:,g}".format(record.cost.budget) }}{% endif %}</span></div>
{% endif %}{% if record.published_total %}<div class="tile"><b>{{ "{:,}".format(record.published_total.rows) }}</b><span>rows in the manifest, {{ "{:,}".format(record.published_total.shards) }} shards</span></div>
{% endif %}</div>
{% if course %}<h2>Throughput</h2>{{ course | safe }}
<p class="note">Above rows of finished micro-batches, below actors that had a block. A tail begins when not every actor has one any more.</p>
<table><tr><th>stage</th><th>from</th><th>took</th></tr>
{% for one in stages %}<tr><td>{{ one.stage }}</td><td>{{ exact(one.start) }}</td><td>{{ exact(one.end - one.start) }}</td></tr>
{% endfor %}</table>{% endif %}
{% for title, plot in labels.items() %}<h2>{{ title }}</h2>{{ plot | safe }}{% endfor %}
{% for title, plot in mixes.items() %}<h2>{{ title }}, beside earlier runs</h2>{{ plot | safe }}{% endfor %}
{% if scores %}<h2>Scores</h2>{{ scores | safe }}{% endif %}
{% if lengths %}<h2>Text lengths</h2>{{ lengths | safe }}
<p>{{ "{:,}".format(run.truncated) }} of {{ "{:,}".format(run.rows) }} texts ({{ "%.1f" | format(100 * run.truncated / run.rows if run.rows else 0) }}%) were cut at the length limit. Lengths are those of what was kept.</p>{% endif %}
<h2>Drift</h2>
{% if record.drift.shifts %}<p>New rows, those that no run had published before, compared with run <code>{{ record.drift.baseline }}</code>.
{% if record.drift.max_psi is none %}Reported only: <code>drift.max_psi</code> is not set.{% else %}Over <code>drift.max_psi = {{ record.drift.max_psi }}</code> nothing is published.{% endif %}</p>
<table><tr><th>of</th><th>shift</th><th>index</th><th>by chance</th><th>KS distance</th><th>KS p</th><th>changed most</th></tr>
{% for one in record.drift.shifts %}<tr><td class="word">{{ one.name }}</td><td{% if one.verdict == "large" %} class="bad"{% endif %}>{{ one.verdict }}</td><td>{{ "%.3f" | format(one.psi) }}</td><td>{{ "%.3f" | format(one.chance) }}</td><td>{% if one.ks is not none %}{{ "%.3f" | format(one.ks) }}{% endif %}</td><td class="word">{% if one.ks_p_value is not none %}{{ "under 0.001" if one.ks_p_value < 0.001 else "%.3f" | format(one.ks_p_value) }}{% endif %}</td><td class="name">{{ one.most }}: {{ "%.1f" | format(100 * one.most_before) }}% to {{ "%.1f" | format(100 * one.most_now) }}%</td></tr>
{% endfor %}</table>
<p class="note">The index is the population stability index: over 0.1 is a small shift, over 0.25 a large one. By chance: what 99 of 100 runs stay under if nothing has changed.</p>
{% else %}<p>Not compared: {{ record.drift.why_none or "this run has no new rows" }}.</p>{% endif %}
{% if run.errors %}<h2>Rows with an error</h2><table><tr><th>reason</th><th>rows</th><th>for example: shard, row</th></tr>
{% for name, count in run.errors.items() %}<tr><td class="word">{{ name }}</td><td>{{ "{:,}".format(count) }}</td><td class="name">{% for one in record.error_examples.get(name, []) %}{{ one.shard }}, {{ one.row }}{% if not loop.last %}<br>{% endif %}{% endfor %}</td></tr>{% endfor %}</table>
<p>All of them: the Parquet files below <code>{{ record.version }}/_dead_letter/</code> name shard and row.</p>{% endif %}
{% if record.bad_shards %}<h2>Bad shards</h2><table><tr><th>shard</th><th>why</th></tr>
{% for name, why in record.bad_shards.items() %}<tr><td>{{ name }}</td><td>{{ why }}</td></tr>{% endfor %}</table>
<p>They are tried again by every run.</p>{% endif %}
{% for title, names in (("Shards that changed while they were scored", record.changed_shards), ("Objects missing after every attempt", record.missing_objects), ("Reported by tasks", record.failures)) %}
{% if names %}<h2>{{ title }}</h2><ul>{% for name in names %}<li>{{ name }}</li>{% endfor %}</ul>{% endif %}{% endfor %}
{% if record.slowest_shards %}<h2>Slowest shards</h2><table class="names"><tr><th>shard</th><th>seconds</th><th>rows</th><th>tokens/s</th></tr>
{% for one in record.slowest_shards %}<tr><td>{{ one.shard }}</td><td>{{ "{:,.1f}".format(one.seconds) }}</td><td>{{ "{:,}".format(one.rows) }}</td><td>{% if one.seconds %}{{ "{:,.0f}".format(one.tokens / one.seconds) }}{% endif %}</td></tr>
{% endfor %}</table><p class="note">Reading, predicting and writing one after the other; these overlap between shards.</p>{% endif %}
<h2>Time and cost</h2><table>
<tr><th>actors</th><td>{{ "%.3g" | format(actor_hours) }} actor-hours{% for state, seconds in run.actor_seconds.items() %}{{ ": " if loop.first else ", " }}{{ exact(seconds) }} {{ state }}{% endfor %}; {{ "%.1f" | format(100 * idle_share) }}% of the time with a loaded model idle</td></tr>
<tr><th>held</th><td>{{ duration(record.cost.gpu_seconds) }} of GPUs, {{ duration(record.cost.cpu_seconds) }} of CPUs, {{ duration(record.cost.node_seconds) }} of nodes</td></tr>
{% for one in record.throughput %}<tr><th>on</th><td>{{ one.device.name }} ({{ one.device.engine }}, {{ one.device.precision }}), {{ "{:,.0f}".format(one.tokens_per_second) }} tokens/s an actor{% if one.lives != 1 %}, the mean of {{ "{:,}".format(one.lives) }} (those of each wave, and those that restarted, are counted again){% endif %}</td></tr>
{% endfor %}<tr><th>rows per actor-hour</th><td>{{ "{:,.0f}".format(rows_per_actor_hour) }}{% if rows_per_actor_hour %}; a million rows take {{ "%.3g" | format(1e6 / rows_per_actor_hour) }} actor-hours{% endif %}</td></tr>
<tr><th>chunks</th><td>{{ "{:,}".format(run.chunks_finished) }} of {{ "{:,}".format(run.chunks_planned) }} planned{% for stage, seconds in run.chunk_seconds.items() %}{{ "; " if loop.first else ", " }}{{ stage }} {{ exact(seconds) }}{% endfor %}</td></tr>
<tr><th>tokens</th><td>{{ "{:,}".format(run.tokens) }}; {{ "%.1f" | format(100 * padding_share) }}% of what was computed was padding</td></tr>
{% if run.abstained %}<tr><th>no label</th><td>{{ "{:,}".format(run.abstained) }} rows: the model is not sure enough of any</td></tr>
{% endif %}</table>
<h2>Where it comes from</h2><table>
{% for name in ("input", "model", "model_digest", "output", "version", "config_digest", "started_at", "cluster", "published") %}<tr><th>{{ name | replace("_", " ") }}</th><td>{{ record[name] }}</td></tr>{% endfor %}
<tr><th>packages</th><td>{% for name, number in record.packages.items() %}{{ name }} {{ number }}{{ ", " if not loop.last }}{% endfor %}</td></tr>
{% if earlier %}<tr><th>earlier runs</th><td>{% for one in earlier %}{{ one.run_id }} ({{ one.status | default("") | replace("_", " ") }}){{ ", " if not loop.last }}{% endfor %}</td></tr>
{% endif %}</table>
<h2>Configuration</h2><pre>{{ record.config | tojson(indent=2) }}</pre>
</body></html>
"""
