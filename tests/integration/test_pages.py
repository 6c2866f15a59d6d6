"""Reports and explanations in a browser, Debian's Chromium where it is there: nothing is wider than the page, on a phone either."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lib.attribution import Explanation
from lib.checkpoint import Card
from lib.highlight import explanation_page
from lib.schema import Task
from lib.training_report import training_report
from lib.words import Word

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

LABELS = ("card_payment_fee_charged_without_any_reason_given", "x" * 60, "悪い", "d")

LONG = "the friendship " * 40 + "y" * 300

MEASURE = """<script>
const broken = [...document.querySelectorAll("td")].filter(one => {
  const range = document.createRange();
  range.selectNodeContents(one);
  return /^[\\w.%]{1,10}$/.test(one.innerText) && new Set([...range.getClientRects()].map(line => line.top)).size > 1;
}).map(one => one.innerText);
document.body.dataset.measured = JSON.stringify([innerWidth, document.documentElement.scrollWidth, broken]);
</script></body>"""


def training_page() -> str:
    """The report of a run with long names, long texts, and all that can be in it."""
    error = {"expected": LABELS[0], "answered": LABELS[1], "score": 0.987, "loss": 4.321, "text": LONG}
    words = [[0, 3, 1.0], [4, 14, -2.0], [len(LONG) - 300, len(LONG), 0.5]]
    explained = {"label": LABELS[1], "value": 2.0, "without": 1.0, "missing": 0.0, "steps": 16, "words": words}
    per_class = [
        {"label": label, "precision": 0.9, "recall": 0.8, "f1": 0.85, "average_precision": 0.9, "support": 12_345}
        for label in LABELS
    ]
    found = {
        "accuracy": 0.9,
        "macro_f1": 0.8,
        "micro_f1": 0.9,
        "loss": 0.3,
        "calibration_error": 0.1,
        "per_class": per_class,
        "precision_recall": {"recall": [0, 1], "precision": [1, 0.5]},
        "confusion": [[50, 1, 2, 3], [4, 50, 5, 6], [7, 8, 50, 9], [1, 2, 3, 50]],
        "reliability": [{"score": 0.5, "right": 0.4, "rows": 10}],
    }
    metrics: dict[str, Any] = {
        "run_id": "20261122T103549Z-164a",
        "seconds": 123.4,
        "metric": "macro_f1",
        "best": {"step": 20},
        "averaged_steps": None,
        "resumed_after": [],
        "valid": found,
        "test": found,
        "unexplained": None,
        "rows": {"train": 1_234_567, "valid": 12_345, "test": 12_345},
        "dropped": {"train": {"null label": 3, "empty text": 4}},
        "known_from_training": {"valid": 0, "test": 12},
        "history": [{"step": step, "train_loss": 0.5, "loss": 0.4, "macro_f1": 0.7} for step in (10, 20)],
        "errors": [{"row": 123_456, **error, "explained": explained}, {"row": 7, **error}],
        "label_counts": {"train": dict.fromkeys(LABELS, 1_000)},
        "lengths": {
            "rows": 1_000,
            "longer_than": dict.fromkeys((16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192), 999),
        },
        "label_noise": {
            "rows": 1_000,
            "found": 2,
            "listed": [
                {"row": 123_456, "label": LABELS[0], "likelier": LABELS[1], "confidence": 0.98, "text": LONG},
                {"row": 5, "label": "d", "likelier": LABELS[2], "confidence": 0.98, "text": "short"},
            ],
        },
    }
    trained = {
        "seed": 0,
        "data": "0123456789abcdef",
        "precision": "float32",
        "workers": 2,
        "versions": {"python": "3.11"},
        "config": {
            "model": {"base": "s3://bucket/" + "long/" * 30},
            "valid": {"path": None, "fraction": 0.1},
            "output": {"report_text": True},
        },
    }
    return training_report(Card(labels=LABELS, task=Task.MULTI_CLASS, max_length=128, trained=trained), metrics)


def explained_page() -> str:
    words = tuple(Word(place, place + 3, 0.1 * place) for place in range(0, 60, 5))
    one = Explanation(
        task=Task.MULTI_CLASS, label=LABELS[1], value=2.0, without=1.0, missing=0.0, steps=16, text=LONG, words=words
    )
    return explanation_page("s3://bucket/" + "long/" * 30, [[one, one], []], [LONG, LONG])


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("page", [training_page, explained_page])
def test_nothing_is_wider_than_the_page_and_no_number_is_broken(page: Any, width: int, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page().replace("</body>", MEASURE), encoding="utf-8")
    frame = f'<iframe id="f" src="page.html" width="{width}" height="800"></iframe>'
    (tmp_path / "frame.html").write_text(
        f"<body>{frame}<script>f.onload = () => document.title = f.contentDocument.body.dataset.measured</script></body>"
    )
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--virtual-time-budget=3000",
    ]
    done = subprocess.run(
        [
            CHROMIUM or "",
            *options,
            f"--user-data-dir={tmp_path}/profile",
            "--dump-dom",
            f"file://{tmp_path}/frame.html",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    inner, needed, broken = json.loads(done.stdout.partition("<title>")[2].partition("</title>")[0])
    assert inner == width
    assert needed <= width, f"{needed} pixels are needed"
    assert broken == []
