"""The `search.html` of a search: its trials, their values against each key, how they learned. One file without scripts or outside links."""

from typing import Any

from lib.plots import COLOR, SECOND_COLOR, render_page, to_svg
from lib.space import point_text

RANKS = {"done": 0, "stopped": 1, "failed": 2}


def ranked(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The trials, best first: those that came to their end, then those that were ended, by how far they came, then those that failed."""
    sign = 1 if result["metric"] == "loss" else -1

    def order(one: dict[str, Any]) -> tuple[float, ...]:
        percent = one["looks"][-1]["percent"] if one["status"] == "stopped" else 0
        return (RANKS[one["status"]], -percent, 0 if one["value"] is None else sign * one["value"], one["number"])

    return sorted(result["trials"], key=order)


def search_report(result: dict[str, Any]) -> str:
    """Say as one HTML page what `search.json` holds; every value is escaped, plots are inline SVG."""
    keys = list(result["trials"][0]["point"])
    return render_page(
        PAGE,
        result=result,
        trials=ranked(result),
        keys=keys,
        metric=result["metric"].replace("_", " "),
        plots={key: value_plot(result, key) for key in keys},
        curves=curves_plot(result),
        words=lambda value: "none" if value is None else point_text({"": value}).partition(" = ")[2],
    )


def value_plot(result: dict[str, Any], key: str) -> str:
    """The value of each trial against one key: filled for those that came to their end."""
    from matplotlib.figure import Figure

    trials = [one for one in result["trials"] if one["value"] is not None]
    values = [one["point"][key] for one in trials]
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    names: list[str] = []
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        places = values
        if min(values) > 0 and max(values) >= 10 * min(values):
            axes.set_xscale("log")
    else:
        names = list(dict.fromkeys(map(str, values)))
        places = [names.index(str(value)) for value in values]
        axes.set_xticks(range(len(names)), [name[:20] for name in names], parse_math=False, fontsize=8)
    for status, filled in (("done", True), ("stopped", False)):
        chosen = [place for place, one in enumerate(trials) if one["status"] == status]
        axes.scatter(
            [places[place] for place in chosen],
            [trials[place]["value"] for place in chosen],
            color=COLOR if filled else "none",
            edgecolors=COLOR if filled else "#8a939c",
            zorder=3,
        )
    best = result["best"]
    at = names.index(str(best["point"][key])) if names else best["point"][key]
    axes.scatter([at], [best["value"]], color=SECOND_COLOR, zorder=4)
    axes.set_xlabel(key, parse_math=False)
    axes.set_ylabel(result["metric"].replace("_", " "))
    return to_svg(figure)


def curves_plot(result: dict[str, Any]) -> str:
    """The value of every trial as it learned, by the part of its steps: looks and evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for one in result["trials"]:
        points = [(look["step"], look["value"]) for look in one["looks"]]
        points += [(entry["step"], entry[result["metric"]]) for entry in one["history"]]
        seen = {step: value for step, value in points if value is not None}
        is_best = one["number"] == result["best"]["trial"]
        color = SECOND_COLOR if is_best else COLOR if one["status"] == "done" else "#8a939c"
        axes.plot(
            [100 * step / max(1, one["steps"]) for step in sorted(seen)],
            [seen[step] for step in sorted(seen)],
            color=color,
            lw=1.8 if is_best else 1,
            marker="o",
            ms=3,
            zorder=3 if is_best else 2,
        )
    axes.set_xlabel("percent of a trial's steps (orange: the best, grey: ended early or failed)")
    axes.set_ylabel(result["metric"].replace("_", " "))
    return to_svg(figure)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Textsweep search {{ result.run_id }}</title>
<style>{{ style | safe }}</style></head><body>
<h1>Textsweep search {{ result.run_id }}</h1>
<p>Trial {{ result.best.trial }} is the best of {{ result.trials | length }} by {{ metric }} on the validation rows. The best of several is a little
too good on the rows that chose it; {% if result.best.trained and result.best.trained.test %}the test rows were looked at once, by the checkpoint that was trained with it{% else %}no test rows were looked at{% endif %}.</p>
<div class="tiles">
<div class="tile"><b>{{ "%.4f" | format(result.best.value) }}</b><span>{{ metric }}, validation rows</span></div>
{% if result.best.trained and result.best.trained.test %}{% for name, value in result.best.trained.test.items() if value is number and name != "rows" %}<div class="tile"><b>{{ "%.4f" | format(value) }}</b><span>{{ name | replace("_", " ") }}, test rows</span></div>
{% endfor %}{% endif %}<div class="tile"><b>{{ "%.0f" | format(100 * result.steps / ([result.steps_without_stopping, 1] | max)) }}%</b><span>of all trials' steps were made</span></div>
<div class="tile"><b>{{ "{:,.0f}".format(result.seconds) }} s</b><span>of training in the trials</span></div>
</div>
<h2>Trials</h2><table><tr><th>trial</th><th>{{ metric }}</th>{% for key in keys %}<th>{{ key }}</th>{% endfor %}<th>steps</th><th></th></tr>
{% for one in trials %}<tr><td>{{ one.number }}</td><td>{% if one.value is not none %}{{ "%.4f" | format(one.value) }}{% endif %}</td>{% for key in keys %}<td>{{ words(one.point[key]) }}</td>{% endfor %}<td>{{ "{:,} of {:,}".format(one.step, one.steps) }}</td><td>{% if one.status == "stopped" %}ended early{% elif one.status == "failed" %}<span class="bad">{{ one.reason }}</span>{% elif one.number == result.best.trial %}<span class="done">the best</span>{% endif %}</td></tr>
{% endfor %}</table>
<p>Trial 1 is the configuration as it was given.</p>
<h2>How they learned</h2>{{ curves | safe }}
{% for key, plot in plots.items() %}<h2>{{ key }}</h2>{{ plot | safe }}{% endfor %}
<p>Hollow: ended early, with the value they had then; orange: the best.</p>
<h2>Configuration</h2><pre>{{ result.config | tojson(indent=2) }}</pre>
</body></html>
"""
