"""Reports and explanations in a browser, Debian's Chromium where it is there: nothing is wider than the page and plots can be read, on a phone too."""

import io
import json
import shutil
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lib import drift
from lib.attribution import Explanation
from lib.checkpoint import Card
from lib.config import validate
from lib.cost import Usage
from lib.course import FINISHING
from lib.errors import ExitCode
from lib.highlight import explanation_page
from lib.history import Baseline
from lib.outcome import Outcome
from lib.planning import Chunk
from lib.progress import Counts
from lib.report import RunFacts, run_record
from lib.run_page import render
from lib.schema import Head, Task
from lib.score_config import ScoreConfig
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
const plots = [...document.querySelectorAll("svg")].map(one => one.getBoundingClientRect().height);
const letters = [...document.querySelectorAll("svg text")].map(one => {
  const {a, b} = one.getScreenCTM();
  return parseFloat(getComputedStyle(one).fontSize) * Math.hypot(a, b);
});
const found = {width: innerWidth, needed: document.documentElement.scrollWidth, broken, plots, letters};
document.body.dataset.measured = JSON.stringify(found);
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
        "chance_calibration_error": 0.05,
        "per_class": per_class,
        "precision_recall": {"recall": [0, 1], "precision": [1, 0.5]},
        "confusion": [[50, 1, 2, 3], [4, 50, 5, 6], [7, 8, 50, 9], [1, 2, 3, 50]],
        "reliability": [{"score": 0.5, "right": 0.4, "rows": 10, "deviation": 0.16}],
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
        "known_from_validation": {"test": 3},
        "known_from_tasks": {"other": {"valid": 0, "test": 1_234}},
        "history": [{"step": step, "train_loss": 0.5, "loss": 0.4, "macro_f1": 0.7} for step in (10, 20)],
        "errors": [
            {"shard": f"{LONG}/part-00000.parquet", "row": 123_456, **error, "explained": explained},
            {"shard": "a.parquet", "row": 7, **error},
        ],
        "label_counts": {"train": dict.fromkeys(LABELS, 1_000)},
        "lengths": {
            "rows": 1_000,
            "longer_than": dict.fromkeys((16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192), 999),
        },
        "label_noise": {
            "rows": 1_000,
            "found": 2,
            "listed": [
                {
                    "shard": "part-00000.parquet",
                    "row": 123_456,
                    "label": LABELS[0],
                    "likelier": LABELS[1],
                    "confidence": 0.98,
                    "text": LONG,
                },
                {
                    "shard": f"{LONG}.parquet",
                    "row": 5,
                    "label": "d",
                    "likelier": LABELS[2],
                    "confidence": 0.98,
                    "text": "short",
                },
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
            "stopping": {"keep": "best"},
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


SCORED_LABELS = ("$ign", "_hidden", "<b>bold</b>", *(f"topic number {number}" for number in range(9)), "x" * 60)


def scoring_record(number: int, last: dict[str, Any] | None) -> dict[str, Any]:
    """The record of a run of two waves with everything in it that can be."""
    chance = np.random.default_rng(number)
    outcome = Outcome()
    outcome.course.began = time.monotonic() - 385  # the last moment is 382.9
    outcome.course.begin_wave(8)
    for chunk in range(120):
        shard = f"2026/{'a-folder-with-a-long-name/' * 3}part-{chunk // 3:05d}.parquet"
        outcome.plan(Chunk(shard, "0" * 12, chunk % 3, 3, 0, 1_000, 1))
        outcome.add(
            {
                "name": f"{shard}-{chunk}",
                "shard": shard,
                "start": 0,
                "rows": 1_000,
                "bytes": 50_000,
                "truncated": 70,
                "tokens": 80_000,
                "abstained": 12,
                "errors": {"null": 7, "undecodable": 1} if chunk % 7 == 0 else {},
                "error_rows": {"null": [3, 17, 240]} if chunk % 7 == 0 else {},
                "labels": dict(
                    zip(SCORED_LABELS, (chance.dirichlet(np.arange(13, 0, -1)) * 980).astype(int).tolist(), strict=True)
                ),
                "score_bins": np.histogram(chance.beta(6, 2 + number / 2, 1_000), bins=20, range=(0, 1))[0].tolist(),
                "length_bins": np.bincount(chance.binomial(11, 0.6 - number / 50, 1_000), minlength=18).tolist(),
                "seconds": {"read": 0.4, "predict": chance.gamma(4, 0.6), "write": 0.1},
            }
        )
        moment = 14 + 3.1 * chunk
        outcome.course.note(Counts(rows=1_000 * chunk, tokens=80_000 * chunk, num_busy=4 if chunk < 110 else 2), moment)
        if chunk == 60:
            outcome.course.begin("wave 2", moment)
    outcome.course.end_wave(moment)
    outcome.course.begin(FINISHING, moment)
    outcome.counts = Counts(
        num_actors=4, failures=("s3://bucket/archive/part: storage failed to read: 503 SlowDown (3x)",), padding=150_000,
        actor_seconds={"starting": 40.2, "idle": 61.0, "busy": 1_400.5},
    )  # fmt: skip
    outcome.bad_shards = {"broken.parquet": "its footer is not Parquet's"}
    outcome.close_wave()
    heads = (Head(task=Task.MULTI_CLASS, labels=SCORED_LABELS, thresholds=(0.1,) * len(SCORED_LABELS)),)
    settings = {
        "input": {"path": "s3://key:hidden-secret@bucket/archive"},
        "model": {"path": "/models/" + "long-name-" * 12},
        "output": {"path": "s3://bucket/scores"},
    }
    record = run_record(
        RunFacts(
            run_id=f"2026-11-{20 + number}T02:00:00",
            version="0123456789abcdef",
            config=validate(ScoreConfig, settings),
            exit_code=ExitCode.DONE,
            message="120,000 rows of 40 shards are scored, 144 of them with an error",
            published=True,
            started_at=datetime.now(UTC),
            usage=Usage(node_seconds=780, cpu_seconds=12_480, gpu_seconds=1_560),
            outcome=outcome,
            totals={"shards": 1_234_567, "objects": 2_000_000, "rows": 123_456_789, "errors": 12_345, "bytes": 1},
            cluster="2 nodes, 32 CPUs, 4 GPUs",
            model_digest="ab" * 32,
            heads=heads,
            seconds_planning=6.2,
            new_rows=outcome.plus(outcome.found),
            baseline=Baseline(name="2026-11-20T02:00:00", counts=last and last["new_rows"]),
            shifts=drift.compare(outcome.record(), last and last["new_rows"], heads),
        )
    )
    return record | {"seconds": 391.2}


def scoring_page() -> str:
    """The report of a run beside five earlier ones."""
    records = [scoring_record(0, None)]
    for number in range(1, 6):
        records.append(scoring_record(number, records[-1]))
    return render(records[-1], records[-2::-1])


def first_scoring_page() -> str:
    """The report of a run that failed before anything was scored, and has nothing before it."""
    record = scoring_record(0, None)
    nothing = Outcome().record()
    record |= {"this_run": record["this_run"] | nothing, "new_rows": nothing, "slowest_shards": [], "exit_code": 4}
    return render(record | {"course": Outcome().course.record()}, [])


def test_a_training_page_says_of_each_set_what_was_left_out_and_what_was_known_before() -> None:
    table = next(one for one in pd.read_html(io.StringIO(training_page())) if "known from training" in one)
    assert table.set_index("set").astype(object).fillna("").astype(str).to_dict("index") == {
        "train": {"rows": "1234567", "left out": "3 null label, 4 empty text", "known from training": "", "known from validation": ""},
        "valid": {"rows": "12345", "left out": "", "known from training": "0.0", "known from validation": ""},
        "test": {"rows": "12345", "left out": "", "known from training": "12.0", "known from validation": "3.0"},
    }  # fmt: skip


def test_a_scoring_page_shows_all_of_a_run_and_no_credentials() -> None:
    page = scoring_page()
    plots = ("Throughput", "Labels", "Label mix, beside earlier runs", "Scores", "Text lengths")
    for title in plots:
        assert "<svg" in page.partition(f"<h2>{title}</h2>")[2][:200], title
    assert page.count("<svg") == len(plots)
    assert "hidden-secret" not in page
    configuration = page.partition("<h2>Configuration</h2><pre>")[2].partition("</pre>")[0]
    assert "s3://***@bucket/archive" in configuration
    assert "max_bad_rows" in configuration
    slowest = page.partition("<h2>Slowest shards</h2>")[2].partition("</table>")[0]
    assert slowest.count("part-000") > 1
    assert "8,400 of 120,000 texts (7.0%) were cut at the length limit" in page
    assert "part-00000.parquet, 17" in page, "errors are named by shard and row"
    assert "<b>bold</b>" not in page
    for name in ("$ign", "_hidden"):
        assert page.count(name) >= 2, "in the bars and in the mix"
    for name in ("config digest", "model digest", "python 3.", "actor-hours", "tail", "wave 2", "2026-11-24T02:00:00"):
        assert name in page, name
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    nothing = first_scoring_page()
    assert "<svg" not in nothing
    assert "Not compared" in nothing


MIN_PLOT_PIXELS = 80

MIN_LETTER_PIXELS = 9
"""Font size as it is shown; a table's letters have 14.4."""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize(
    ("page", "num_plots"), [(training_page, 6), (explained_page, 0), (scoring_page, 5), (first_scoring_page, 0)]
)
def test_pages_fit_with_plots_that_can_be_read_and_no_errors(
    page: Any, num_plots: int, width: int, tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(page().replace("</body>", MEASURE), encoding="utf-8")
    frame = f'<iframe id="f" src="page.html" width="{width}" height="800"></iframe>'
    # What the frame logs shows that the console is seen.
    script = 'f.onload = () => { document.title = f.contentDocument.body.dataset.measured; console.error("loaded"); }'
    (tmp_path / "frame.html").write_text(f"<body>{frame}<script>{script}</script></body>")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
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
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert ['"loaded"' in line for line in console] == [True], console
    found = json.loads(done.stdout.partition("<title>")[2].partition("</title>")[0])
    assert found["width"] == width
    assert found["needed"] <= width, f"{found['needed']} pixels are needed"
    assert found["broken"] == []
    assert len(found["plots"]) == num_plots
    assert all(height >= MIN_PLOT_PIXELS for height in found["plots"]), found["plots"]
    assert all(size >= MIN_LETTER_PIXELS for size in found["letters"]), sorted(set(found["letters"]))
