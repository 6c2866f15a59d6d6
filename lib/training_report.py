"""The `report.html` of a checkpoint: how it learned, how good it is, what it gets wrong, what the data is like.

One file without scripts or outside links; `metrics.json` has the same numbers.
"""

import itertools
from typing import Any

from lib.checkpoint import Card
from lib.highlight import LEGEND, marked_html
from lib.metrics import SHOWN, metrics_of, top_confusions
from lib.plots import COLOR, GREY, SECOND_COLOR, bar_plot, render_page, to_svg
from lib.words import Word

MATRIX_LABELS = 30
"""A confusion matrix is drawn for up to so many labels, and its largest cells listed in any case."""

SHOWN_LABELS = 200
"""Lines of the table of labels; all are in metrics.json."""


def training_report(card: Card, metrics: dict[str, Any]) -> str:
    """Say as one HTML page what `metrics.json` holds, head by head; every value is escaped, plots are inline SVG."""
    if "tasks" in metrics:
        pages = {name: training_report(card.alone(name), metrics_of(metrics, name)) for name in metrics["tasks"]}
        bodies = (f"<h1>Head {name}</h1>{body_of(page)}" for name, page in pages.items())
        first = next(iter(pages.values()))
        return first.replace(body_of(first), "".join(bodies))
    name = "valid" if metrics["test"] is None else "test"
    found = metrics[name]
    plots = {"Learning": curves_plot(metrics["history"], metrics["metric"], metrics["best"]["step"])}
    if "per_class" in found:
        plots["Precision and recall"] = precision_recall_plot(found["precision_recall"])
        plots["Reliability"] = reliability_plot(found["reliability"])
        if card.task == "multi_class" and len(card.labels) <= MATRIX_LABELS:
            plots["Confusion"] = confusion_plot(found["confusion"], card.labels)
    counts = metrics["label_counts"]["train"]
    if counts:
        most = sorted(counts.items(), key=lambda one: -one[1])
        rest = {f"{len(most) - MATRIX_LABELS} more": sum(count for _, count in most[MATRIX_LABELS:])}
        plots["Labels of the training rows"] = bar_plot(
            dict(most[:MATRIX_LABELS]) | (rest if len(most) > MATRIX_LABELS else {})
        )
    lengths = metrics["lengths"]
    plots[f"Tokens of {lengths['rows']:,} training rows"] = bar_plot(length_counts(lengths))
    return render_page(
        PAGE,
        card=card,
        metrics=metrics,
        evaluated="validation" if name == "valid" else "test",
        found=found,
        plots=plots,
        shown=[one for one in SHOWN if one in found],
        table=sorted(found.get("per_class", []), key=lambda one: -one["support"])[:SHOWN_LABELS],
        confusions=top_confusions(found) if "per_class" in found else [],
        lengths=lengths,
        trained=card.trained,
        marked=lambda one: marked_html(one["text"], [Word(*word) for word in one["explained"]["words"]]),
        legend=LEGEND,
    )


def body_of(page: str) -> str:
    """What a page shows."""
    return page[page.index("<body>") + len("<body>") : page.index("</body>")]


def length_counts(lengths: dict[str, Any]) -> dict[str, int]:
    """Rows by tokens, of those whose length was counted, up to the longest: between limits, of which `longer_than` has the rows above."""
    limits = [0, *map(int, lengths["longer_than"])]
    above = [lengths["rows"], *lengths["longer_than"].values(), 0]
    names = [f"{low + 1:,} to {high:,}" for low, high in itertools.pairwise(limits)] + [f"over {limits[-1]:,}"]
    counts = [more - less for more, less in itertools.pairwise(above)]
    longest = max((place for place, count in enumerate(counts) if count), default=0)
    return dict(zip(names[: longest + 1], counts, strict=False))


def curves_plot(history: list[dict[str, float]], metric: str, best_step: int) -> str:
    """Losses of training and validation by step, and the metric that chose the weights."""
    from matplotlib.figure import Figure

    steps = [one["step"] for one in history]
    marker = "o" if len(steps) < 40 else None
    figure = Figure(figsize=(6, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [one["train_loss"] for one in history], color=COLOR, marker=marker, ms=3, label="training loss")
    axes.plot(steps, [one["loss"] for one in history], color=SECOND_COLOR, marker=marker, ms=3, label="validation loss")
    axes.axvline(best_step, color=GREY, lw=1, ls=":")
    axes.set_xlabel("step (dotted: the weights that were kept)")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    handles, names = axes.get_legend_handles_labels()
    if metric != "loss":
        other = axes.twinx()
        other.plot(steps, [one[metric] for one in history], color="#2f7d4f", marker=marker, ms=3)
        other.set_ylabel(metric.replace("_", " "), color="#2f7d4f")
        other.spines[["top"]].set_visible(False)
    figure.legend(handles, names, loc="outside upper left", ncols=2, frameon=False, fontsize=8)
    return to_svg(figure)


def precision_recall_plot(curve: dict[str, list[float]]) -> str:
    """Precision over recall, all classes together."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve["recall"], curve["precision"], color=COLOR)
    axes.set(xlabel="recall, all classes together", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.01))
    return to_svg(figure)


def reliability_plot(bins: list[dict[str, float]]) -> str:
    """How often answers are right, over their score; on the diagonal a score is what it says, and on the bars it may be, by chance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
    total = sum(one["rows"] for one in bins)
    scores, honest = [one["score"] for one in bins], [2 * one["deviation"] for one in bins]
    axes.errorbar(scores, scores, yerr=honest, fmt="none", ecolor=GREY, capsize=3)
    axes.scatter(scores, [one["right"] for one in bins], color=COLOR, zorder=3,
                 s=[20 + 300 * one["rows"] / total for one in bins])  # fmt: skip
    axes.set(
        xlabel="score (size: how many there are; bars: where honest scores lie, 19 of 20)",
        ylabel="part that is right",
        xlim=(0, 1.02),
        ylim=(0, 1.02),
    )
    return to_svg(figure)


def confusion_plot(matrix: list[list[int]], labels: tuple[str, ...]) -> str:
    """Rows are true classes, columns answers; shade is the part of the true class."""
    from matplotlib.figure import Figure

    size = 2.2 + 0.32 * len(labels)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow([[cell / max(1, sum(row)) for cell in row] for row in matrix], cmap="Blues", vmin=0, vmax=1)
    names = [label if len(label) < 25 else f"{label[:22]}…" for label in labels]
    axes.set_xticks(range(len(labels)), names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(labels)), names, fontsize=8, parse_math=False)
    for true, row in enumerate(matrix):
        for answer, cell in enumerate(row):
            if cell:
                color = "white" if cell > 0.6 * sum(row) else "#1b1f24"
                axes.text(
                    answer,
                    true,
                    str(cell),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=color,
                )
    axes.set(xlabel="answered", ylabel="true")
    return to_svg(figure)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Textsweep training {{ metrics.run_id }}</title>
<style>{{ style | safe }}</style></head><body>
<h1>Textsweep training {{ metrics.run_id }}</h1>
<p>{% if card.task == "regression" %}The number {{ card.labels[0] }}{% else %}{{ card.labels | length }} labels, {{ card.task | replace("_", "-") }}{% endif %};
fine-tuned from <code>{{ trained.config.model.base }}</code>. {% if trained.config.valid.path is none and not trained.config.valid.fraction %}No rows were set aside: what is called validation are the training rows{% elif trained.config.stopping.keep == "last" %}The weights of the last step: by the validation rows none were chosen{% else %}Chosen by {{ metrics.metric | replace("_", " ") }} on the validation rows{% endif %}{% if metrics.averaged_steps %}, averaged over steps {{ metrics.averaged_steps | join(", ") }}{% endif %}.</p>
<div class="tiles">
{% for name in shown %}<div class="tile"><b>{{ "%.4f" | format(found[name]) }}</b><span>{{ name | replace("_", " ") }}, {{ evaluated }} rows</span></div>
{% endfor %}{% if found.calibration_error is defined %}<div class="tile"><b>{{ "%.4f" | format(found.calibration_error) }}</b><span>calibration error (chance alone: {{ "%.4f" | format(found.chance_calibration_error) }})</span></div>
{% endif %}{% if found.coverage is defined %}<div class="tile"><b>{{ "%.1f" | format(100 * found.coverage) }}%</b><span>of rows get a label</span></div>
{% endif %}<div class="tile"><b>{{ "{:,}".format(metrics.rows.train) }}</b><span>rows learned from</span></div>
<div class="tile"><b>{{ "{:,.0f}".format(metrics.seconds) }} s</b><span>of training</span></div>
</div>
{% for title, plot in plots.items() %}<h2>{{ title }}</h2>{{ plot | safe }}{% endfor %}
{% if confusions %}<h2>Most frequent mistakes</h2><table><tr><th>true</th><th>answered</th><th>rows</th></tr>
{% for expected, answer, rows in confusions %}<tr><td>{{ expected }}</td><td>{{ answer }}</td><td>{{ "{:,}".format(rows) }}</td></tr>{% endfor %}</table>{% endif %}
{% if table %}<h2>Labels</h2><table><tr><th>label</th><th>precision</th><th>recall</th><th>F1</th><th>average precision</th><th>{{ evaluated }} rows</th></tr>
{% for one in table %}<tr><td>{{ one.label }}</td><td>{{ "%.3f" | format(one.precision) }}</td><td>{{ "%.3f" | format(one.recall) }}</td><td>{{ "%.3f" | format(one.f1) }}</td><td>{{ "%.3f" | format(one.average_precision) }}</td><td>{{ "{:,}".format(one.support) }}</td></tr>
{% endfor %}</table>{% endif %}
{% if metrics.errors %}<h2>Worst errors</h2><table><tr><th>{{ evaluated }} file</th><th>row</th><th>expected</th><th>answered</th><th>score</th><th>loss</th></tr>
{% for one in metrics.errors %}<tr{% if one.text is defined %} class="open"{% endif %}><td>{{ one.shard }}</td><td>{{ one.row }}</td>{% for value in (one.expected, one.answered) %}<td>{{ value if value is string or value is number else value | join("; ") }}</td>{% endfor %}<td>{% if one.score is not none %}{{ "%.3f" | format(one.score) }}{% endif %}</td><td>{{ "%.3f" | format(one.loss) }}</td></tr>
{% if one.text is defined %}<tr><td class="text" dir="auto" colspan="6">{% if one.explained is defined %}{% if card.task == "multi_label" %}<b>{{ one.explained.label }}:</b> {% endif %}{{ marked(one) }}{% else %}{{ one.text }}{% endif %}</td></tr>
{% endif %}{% endfor %}</table>{% if metrics.errors[0].explained is defined %}{{ legend }}{% endif %}{% if metrics.unexplained %}<p>Not all words are marked: {{ metrics.unexplained }}</p>{% endif %}<p>Files are below the set's root, rows are counted from 0 in their file.{% if metrics.errors[0].text is not defined %} <code>output.report_text = true</code> adds their texts, which may be personal.{% endif %}</p>{% endif %}
<h2>Data</h2><table><tr><th>set</th><th>rows</th><th>left out</th><th>known from training</th><th>known from validation</th></tr>
{% for name, rows in metrics.rows.items() %}<tr><td>{{ name }}</td><td>{{ "{:,}".format(rows) }}</td><td>{% for reason, count in metrics.dropped.get(name, {}).items() %}{{ "{:,}".format(count) }} {{ reason }}{{ ", " if not loop.last }}{% endfor %}</td><td>{{ "{:,}".format(metrics.known_from_training[name]) if name in metrics.known_from_training }}</td><td>{{ "{:,}".format(metrics.known_from_validation[name]) if name in metrics.known_from_validation }}</td></tr>
{% endfor %}</table>
{% for task, counts in metrics.known_from_tasks.items() %}{% for name, rows in counts.items() if rows %}<p>{{ "{:,}".format(rows) }} {{ name }} rows are known from the training rows of the task {{ task }}.</p>{% endfor %}{% endfor %}
<p>Texts are {% if card.windows %}read in windows of {{ card.max_length }} tokens{% else %}cut at {{ card.max_length }} tokens ({{ card.truncation }}){% endif %}.</p>
<table><tr><th>tokens</th><th>so many of {{ "{:,}".format(lengths.rows) }} training rows are longer</th></tr>
{% for limit, rows in lengths.longer_than.items() %}<tr><td>{{ limit }}</td><td>{{ "%.1f" | format(100 * rows / lengths.rows) }}%</td></tr>
{% endfor %}</table>
{% if metrics.label_noise %}<h2>Labels that look wrong</h2>
<p>{{ "{:,}".format(metrics.label_noise.found) }} of {{ "{:,}".format(metrics.label_noise.rows) }} training rows: a model that had not seen the row finds another label clearly likelier. The clearest:</p>
<table><tr><th>training file</th><th>row</th><th>label</th><th>likelier</th><th>confidence</th></tr>
{% for one in metrics.label_noise.listed %}<tr{% if one.text is defined %} class="open"{% endif %}><td>{{ one.shard }}</td><td>{{ one.row }}</td><td>{{ one.label }}</td><td>{{ one.likelier }}</td><td>{{ "%.2f" | format(one.confidence) }}</td></tr>
{% if one.text is defined %}<tr><td class="text" dir="auto" colspan="5">{{ one.text }}</td></tr>
{% endif %}{% endfor %}</table>{% endif %}
<h2>How it was made</h2><table>
{% for name in ("seed", "data", "precision", "workers") %}<tr><th>{{ name }}</th><td>{{ trained[name] }}</td></tr>{% endfor %}
<tr><th>versions</th><td>{% for name, number in trained.versions.items() %}{{ name }} {{ number }}{{ ", " if not loop.last }}{% endfor %}</td></tr>
{% if metrics.resumed_after %}<tr><th>went on after workers died</th><td>after steps {{ metrics.resumed_after | join(", ") }}</td></tr>{% endif %}</table>
<h2>Configuration</h2><pre>{{ trained.config | tojson(indent=2) }}</pre>
</body></html>
"""
