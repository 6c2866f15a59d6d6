"""The README.md of a checkpoint: a model card (Mitchell et al. 2019, arXiv 1810.03993) with the hub's front matter."""

from typing import Any

import jinja2

from lib.checkpoint import CARD_NAME, Card
from lib.metrics import SHOWN, metrics_of

SHOWN_LABELS = 30
"""Labels, and rows of the table; the rest is in the checkpoint's files."""

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-classification
---

{% if card.task == "regression" -%}
# A number: {{ card.labels[0] | line }}
{% else -%}
# {{ card.labels | length }} labels, {{ card.task | replace("_", "-") }}

Labels: {% for label in card.labels[:most] %}`{{ label | line }}`{{ ", " if not loop.last }}{% endfor %}
{%- if card.labels | length > most %} and {{ card.labels | length - most }} more{% endif %}.
{%- endif %}
{% if card.windows %}Texts are read in at most {{ card.windows.most }} windows of {{ card.max_length }} tokens that share {{ card.windows.stride }}; the answer is the {{ card.windows.pooling }} of theirs.
{%- else %}Texts are cut at {{ card.max_length }} tokens ({{ card.truncation }}).{% endif %}
{%- if card.temperature != 1 %} Probabilities are those of logits divided by {{ "%.4g" | format(card.temperature) }}.{% endif %}
{%- if card.thresholds and card.task == "multi_label" %} Each label is given from its own probability on.{% endif %}
{%- if card.thresholds and card.task == "multi_class" %} Rows whose score is below {{ "%.4g" | format(card.thresholds[0]) }} get no label.{% endif %}

    python -m jobs.predict --set model.path=THIS_FOLDER "a text"
    python -m jobs.score --set model.path=THIS_FOLDER --set input.path=... --set output.path=...

## How good it is

| rows | number |{% for name in shown %} {{ name | replace("_", " ") }} |{% endfor %}
|---|---|{{ "---|" * shown | length }}
{%- for name, rows, found in results %}
| {{ name }} | {{ "{:,}".format(rows) }} |{% for key in shown %} {{ "%.4f" | format(found[key]) }} |{% endfor %}
{%- endfor %}
{%- if per_class %}

| label | precision | recall | F1 | test rows |
|---|---|---|---|---|
{%- for one in per_class %}
| {{ one.label | cell }} | {{ "%.3f" | format(one.precision) }} | {{ "%.3f" | format(one.recall) }} | {{ "%.3f" | format(one.f1) }} | {{ one.support }} |
{%- endfor %}
{%- endif %}

Texts unlike the training rows are answered like any others: check a sample of yours before trusting the answers.

## How it was made

Fine-tuned from `{{ trained.config.model.base }}` on {{ "{:,}".format(rows.train) }} rows (fingerprint {{ trained.data }}), run
`{{ trained.run_id }}`, seed {{ trained.seed }}. `{{ card_name }}` has the whole configuration, `metrics.json` all metrics.
"""


def model_card(card: Card, metrics: dict[str, Any]) -> str:
    """Say in Markdown what a checkpoint is, how good, and how it was made, head by head; `metrics` as `metrics.json` has them."""
    if "tasks" in metrics:
        pages = {name: model_card(card.alone(name), metrics_of(metrics, name)) for name in metrics["tasks"]}
        front = next(iter(pages.values())).partition("# ")[0]
        return front + "\n".join(f"# Head `{name}`\n\n#{page.removeprefix(front)}" for name, page in pages.items())
    tested = metrics["test"]
    valid = card.trained["config"]["valid"]
    is_apart = valid["path"] is not None or valid["fraction"] > 0
    chose = ", which chose the weights" if card.trained["config"]["stopping"]["keep"] == "best" else ""
    name = f"validation{chose}" if is_apart else "the training rows themselves: none were set aside"
    results = [(name, metrics["rows"]["valid"], metrics["valid"])]
    if tested is not None:
        results.append(("test", metrics["rows"]["test"], tested))
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["line"] = lambda label: " ".join(label.split())
    environment.filters["cell"] = lambda label: " ".join(label.replace("|", "\\|").split())
    return environment.from_string(TEMPLATE).render(
        card=card,
        card_name=CARD_NAME,
        most=SHOWN_LABELS,
        per_class=sorted((tested or {}).get("per_class", []), key=lambda one: -one["support"])[:SHOWN_LABELS],
        results=results,
        rows=metrics["rows"],
        shown=[name for name in SHOWN if name in metrics["valid"]],
        trained=card.trained,
    )
