"""Explanations for people: words marked by what they say for an answer, on a page and on a terminal.

Texts come from anywhere: on a page they are escaped, on a terminal they move no cursor.
"""

import math
import unicodedata
from collections.abc import Sequence

from markupsafe import Markup, escape

from lib.attribution import Explanation
from lib.plots import render_page
from lib.schema import Task
from lib.words import Word

SHOWN_WORDS = 10
"""The words with the largest values, as a list."""

LEAST = 0.05
"""A word is marked if its value is at least such a part of the text's largest one."""

COLORS = {True: "59,110,168", False: "200,98,45"}
"""Red, green and blue of words that speak for an answer, and against it: blue and orange differ for nearly everyone."""

SHADES = {True: ("195", "153", "75"), False: ("230", "223", "209")}
"""The same for terminals, of 256 colours, from weak to strong. Letters on them are black."""

REORDERING = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change in which direction others are written."""


def clear_words(words: Sequence[Word]) -> list[tuple[Word, float]]:
    """The words that are marked, in their order, each with its value as a part of the largest one, whatever their signs."""
    largest = max((abs(one.value) for one in words), default=0.0)
    return [(one, abs(one.value) / largest) for one in words if one.value and abs(one.value) >= LEAST * largest]


def marked_html(text: str, words: Sequence[Word]) -> Markup:
    """A text as HTML, its words marked; on a word its value is shown."""
    parts, last = [], 0
    for word, part in clear_words(words):
        strength = 0.12 + 0.5 * part
        kind = "for" if word.value > 0 else "against"
        color = f"rgba({COLORS[word.value > 0]},{strength:.2f})"
        mark = Markup('<mark class="{}" style="background:{}" title="{:+.3g}">{}</mark>')
        parts += [escape(text[last : word.start]), mark.format(kind, color, word.value, text[word.start : word.end])]
        last = word.end
    return Markup("").join([*parts, escape(text[last:])])


def explanation_page(model: str, answers: Sequence[Sequence[Explanation]], texts: Sequence[str]) -> str:
    """One HTML page for N texts, given the explanations of each; for a text without any that it has no answer."""
    return render_page(
        PAGE,
        model=model,
        rows=list(zip(texts, answers, strict=True)),
        marked=marked_html,
        heading=heading,
        strongest=strongest,
        rest=rest_of,
        legend=LEGEND,
    )


def terminal_lines(number: int, explanation: Explanation, colored: bool) -> list[str]:
    """The explanation of the text of some number: the text with its words marked, or without colours its strongest words."""
    lines = [f"text {number}: {printable(heading(explanation))}"]
    text, words = explanation.text, explanation.words
    if colored:
        lines.append(f"  {colored_text(text, words)}")
        return lines
    lines += [f"  {printable(text[one.start : one.end])} {one.value:+.2f}" for one in strongest(words)]
    others = len(words) - SHOWN_WORDS
    return [*lines, f"  ({others} more: {rest_of(words):+.2f})"] if others > 0 else lines


def heading(one: Explanation) -> str:
    """The answer, and what the words make of it."""
    if one.task is Task.REGRESSION:
        said = f"{one.label} {one.value:.4g}; without the words {one.without:.4g}"
    else:
        score = 1 / (1 + math.exp(-one.value)) if one.value > -700 else 0.0
        given = "" if one.missed_threshold is None else f" (not given: its threshold is {one.missed_threshold:.3f})"
        said = f"{one.label}{given}, score {score:.3f}; log-odds {one.value:+.2f}, without the words {one.without:+.2f}"
    short = f"; the words' values miss {one.missing:+.2g} of the difference after {one.steps} steps"
    return said if one.converged else said + short


def colored_text(text: str, words: Sequence[Word]) -> str:
    """A text for a terminal: on blue what speaks for the answer, underlined on orange what speaks against it."""
    parts, last = [], 0
    for word, part in clear_words(words):
        shade = SHADES[word.value > 0][min(2, int(3 * part))]
        line = "" if word.value > 0 else "4;"
        shown = printable(text[word.start : word.end])
        parts += [printable(text[last : word.start]), f"\x1b[{line}38;5;16;48;5;{shade}m{shown}\x1b[0m"]
        last = word.end
    return "".join([*parts, printable(text[last:])])


def printable(text: str) -> str:
    """A text that moves no cursor and turns no line around: spaces in place of control characters."""
    return "".join(" " if unicodedata.category(one) in ("Cc", "Zl", "Zp") or one in REORDERING else one for one in text)


def strongest(words: Sequence[Word]) -> list[Word]:
    """The words with the largest values, whatever their sign, the largest first."""
    return sorted(words, key=lambda one: -abs(one.value))[:SHOWN_WORDS]


def rest_of(words: Sequence[Word]) -> float:
    """What all other words are worth together."""
    return sum(one.value for one in words) - sum(one.value for one in strongest(words))


LEGEND = Markup("""<p><mark class="for" style="background:rgba({for_color},.5)">blue</mark> words speak for the answer,
<mark class="against" style="background:rgba({against_color},.5)">orange, dashed</mark> ones against it, the more the stronger the colour
(integrated gradients, from a text of padding).</p>""").format(for_color=COLORS[True], against_color=COLORS[False])

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Textsweep explanation</title>
<style>{{ style | safe }}</style></head><body>
<h1>What answers come from</h1>
<p>Model <code>{{ model }}</code>. A word's value is what it adds to the log-odds of the answer, or to a number;
values and what stands there without the words sum to the answer.</p>
{{ legend }}
{% for text, answers in rows %}<h2>Text {{ loop.index }}</h2>
{% for one in answers %}<h3 dir="auto">{{ heading(one) }}</h3>
<p class="text" dir="auto">{{ marked(one.text, one.words) }}</p>
<details><summary>values</summary><table><tr><th>word</th><th>value</th></tr>
{% for word in strongest(one.words) %}<tr><td dir="auto">{{ one.text[word.start:word.end] }}</td><td>{{ "%+.3f" | format(word.value) }}</td></tr>
{% endfor %}{% if one.words | length > strongest(one.words) | length %}<tr><td>{{ one.words | length - strongest(one.words) | length }} more</td><td>{{ "%+.3f" | format(rest(one.words)) }}</td></tr>
{% endif %}<tr><td>without the words</td><td>{{ "%+.3f" | format(one.without) }}</td></tr></table></details>
{% else %}<p>No answer.</p><p class="text" dir="auto">{{ text }}</p>{% endfor %}{% endfor %}
</body></html>
"""
