"""What the reports of scoring and training share: their style, and plots as inline SVG. No scripts, no outside links."""

import io
import warnings
from typing import Any

import jinja2

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; } .tile { border: 1px solid #d4dae1; border-radius: .5rem; padding: .6rem 1rem; }
.tile b { display: block; font-size: 1.3rem; } .tile span { color: #57606a; font-size: .85rem; }
.done { color: #1a7f37; } .bad { color: #b42318; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; } td, th { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #e5e9ee; overflow-wrap: anywhere; vertical-align: top; }
.plot { overflow-x: auto; } svg { max-width: 100%; height: auto; } svg text { fill: currentColor; } .note { color: #57606a; font-size: .85rem; } pre { background: #f6f8fa; padding: 1rem; overflow-x: auto; font-size: .8rem; }
th { overflow-wrap: normal; } td { min-width: 4.6rem; } td.word { white-space: nowrap; } tr.open td { border-bottom: 0; } td.text { padding-bottom: .8rem; overflow-wrap: anywhere; }
mark { color: inherit; border-radius: .2rem; padding: 0 .1rem; border-bottom: 2px solid transparent; } mark.against { border-bottom: 2px dashed #c8622d; }
h3 { font-size: 1rem; margin-bottom: .3rem; } .text { white-space: pre-wrap; }
:root { color-scheme: light dark; }
@media (max-width: 40rem) { table { display: block; overflow-x: auto; } td, th { overflow-wrap: break-word; padding: .3rem .4rem; min-width: 0; } table.names td:first-child, td.name { min-width: 11rem; } }
@media (prefers-color-scheme: dark) {
body { color: #e6e9ed; background: #14181d; } .tile { border-color: #3a424b; } .tile span, .note { color: #9aa4ae; } .done { color: #4ac26b; } .bad { color: #ff8a75; }
td, th { border-color: #2c333a; } pre { background: #1d2329; }
}
"""

COLOR, SECOND_COLOR, GREY = "#3b6ea8", "#c8622d", "#8a939c"

PALETTE = ("#3b6ea8", "#c8622d", "#2f8f6b", "#d9a62e", "#8a5aa8", "#5fb0c9", "#b5537a")
"""Colours that are told apart on white and on black, by most colour-blind people, too."""


MIN_INCH = 84
"""Pixels that an inch of a figure takes at least: its smallest letters, 8 points, are 9.3 pixels high. On a phone it scrolls in its own box."""


def render_page(page: str, **values: Any) -> str:
    """Fill a report's template: every value is escaped, and one that is missing is an error."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(page).render(style=STYLE, **values)


def bar_plot(counts: dict[str, int]) -> str:
    """Horizontal bars with their counts, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.6 + 0.27 * len(counts)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(counts)), list(counts.values()), color=COLOR)
    axes.set_yticks(
        range(len(counts)), [name if len(name) < 40 else f"{name[:37]}…" for name in counts], parse_math=False
    )
    axes.invert_yaxis()
    axes.bar_label(bars, labels=[f"{value:,}" for value in counts.values()], padding=3, fontsize=8)
    axes.margins(x=0.15)
    axes.set_xlabel("rows")
    return to_svg(figure)


def to_svg(figure: Any) -> str:
    """A figure as an SVG element that scales with the page, in a box; its words are text, for which the reader's browser has fonts.

    What is black takes the colour of the page's text, and nothing lies behind it: it fits a light page and a dark one.
    """
    from matplotlib import rc_context

    figure.axes[0].spines[["top", "right"]].set_visible(False)
    sink = io.StringIO()
    with rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # it only measures with that font
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = sink.getvalue()
    svg = text[text.index("<svg") + len("<svg") :].replace("#000000", "currentColor")
    return f'<div class="plot"><svg style="min-width: {MIN_INCH * figure.get_figwidth():.0f}px"{svg}</div>'
