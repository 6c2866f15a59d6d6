"""Metrics of a real run, scraped from Ray's endpoint as Prometheus does, and the dashboard that asks for them."""

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from jobs.demo_store import LoopbackS3
from lib import pipeline, progress, telemetry
from lib.storage import open_store
from tests import fakes
from tests.integration.test_scoring import read_json, run_score, texts_table
from tests.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]

PROMTOOL = shutil.which("promtool")

DASHBOARD = REPOSITORY / "cluster" / "grafana" / "textsweep.json"


def scrape(version: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """A version's samples by name and what else tells them apart, summed over processes, as a query would."""
    found: dict[tuple[str, tuple[str, ...]], float] = {}
    for node in ray.nodes():
        with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.labels.get("version") == version and sample.name.startswith("ray_textsweep_"):
                    told = tuple(
                        sample.labels[name] for name in ("reason", "stage", "state", "run") if name in sample.labels
                    )
                    key = (sample.name, (*told, *([sample.labels["le"]] if "le" in sample.labels else [])))
                    found[key] = found.get(key, 0.0) + sample.value
    return found


@pytest.mark.usefixtures("ray_session")
def test_a_scraped_run_has_the_numbers_of_its_archive(
    s3: LoopbackS3, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, output = f"{s3.bucket()}/archive", f"{s3.bucket()}/scores"
    bad = pa.table({"id": [1, 2, 3], "text": [None, "", "a good one"]})
    fakes.write_archive(archive, {"a.parquet": texts_table(300), "b.parquet": texts_table(90, 300), "c.parquet": bad})
    at_rest: dict[tuple[str, tuple[str, ...]], float] = {("ray_textsweep_waiting_blocks", ()): 0}
    at_rest |= {("ray_textsweep_actors", (state,)): state == "idle" for state in ("starting", "idle", "busy")}
    told: dict[tuple[str, tuple[str, ...]], float] = {}

    def scrape_and_end(counting: Any) -> None:
        """Scrape what ends with the progress actor: all is scored, and the run's only actor waits for more."""
        version = open_store(output).list()["path"][0].as_py().partition("/")[0]

        def is_told() -> bool:
            progress.read_progress(counting)  # as the driver does each second, which keeps gauges alive
            told.update(scrape(version))
            return at_rest.items() <= told.items() and ("ray_textsweep_planned_rows", ()) in told

        wait_until(is_told, "Ray's processes to report (every 10 s)")
        progress.end_actors(counting)

    monkeypatch.setattr(pipeline, "end_actors", scrape_and_end)
    # A version of its own: other tests of this process count under theirs.
    run_score(archive, classifier, output, "model.max_length=37", "limits.max_bad_rows=1.0", run_id="scraped")
    version = read_json(open_store(output), "_published.json")["version"]
    record = read_json(open_store(output), f"{version}/_runs/scraped/run.json")["this_run"]
    rows = ("ray_textsweep_rows_total", ())
    tokens = ("ray_textsweep_tokens_total", ())
    assert told["ray_textsweep_budget_tokens", ()] > 0
    assert told["ray_textsweep_actor_seconds_total", ("idle",)] > 0

    def look() -> dict[tuple[str, tuple[str, ...]], float]:
        """All that was told until now: a gauge that nobody sets any more is not told for long."""
        told.update(scrape(version))
        return told

    wait_until(lambda: {rows, tokens} <= look().keys(), "Ray's processes to report (every 10 s)")
    wait_until(lambda: look()[tokens] == record["tokens"], "the progress actor's last report")

    look()
    assert told[rows] == 393
    assert told["ray_textsweep_chunks_total", ()] == record["chunks_finished"]
    assert told["ray_textsweep_errors_total", ("null",)] == 1
    assert told["ray_textsweep_errors_total", ("empty",)] == 1
    assert told["ray_textsweep_scored_rows_total", ()] == 391
    assert told["ray_textsweep_truncated_rows_total", ()] == record["truncated"] > 0
    assert told["ray_textsweep_planned_rows", ()] == 393
    assert told["ray_textsweep_run_info", ("scraped",)] == 1
    objects = [path for path in open_store(output).at(version).list()["path"].to_pylist() if not path.startswith("_")]
    sizes = open_store(output).at(version).list()
    written = sum(row["size"] for row in sizes.to_pylist() if row["path"] in objects)
    assert told["ray_textsweep_written_bytes_total", ()] == written
    for stage in ("read", "predict", "write"):
        assert told["ray_textsweep_chunk_seconds_count", (stage,)] == record["chunks_finished"]
    assert told["ray_textsweep_padding_tokens_total", ()] > 0
    assert told["ray_textsweep_actor_seconds_total", ("busy",)] > 0
    assert told["ray_textsweep_actor_seconds_total", ("starting",)] > 0

    known = {name for metric in telemetry.METRICS for name in metric.series}
    assert {name.removesuffix("_created") for name, _ in told} <= known
    names = {name for name, _ in told}
    silent = {metric.name for metric in telemetry.METRICS if not names & set(metric.series)}
    assert silent == {telemetry.FAILURES.name}, "no task failed"


def test_without_ray_and_its_agent_recording_does_nothing() -> None:
    code = "from lib import telemetry as t; [m.record(1.0, **dict.fromkeys(m.labels, 'x')) for m in t.METRICS]; t.ROWS.record(0, version='x')"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=REPOSITORY, timeout=60)


@pytest.mark.parametrize("metric", telemetry.METRICS, ids=lambda metric: metric.name)
def test_names_are_as_prometheus_asks(metric: telemetry.Metric) -> None:
    """https://prometheus.io/docs/practices/naming: one prefix, base units, counters end in total and nothing else does."""
    assert re.fullmatch(r"textsweep_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind is telemetry.Kind.COUNTER)
    assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|ratio|percent)(_|$)", metric.name)
    assert metric.help
    assert "run" not in metric.labels or metric is telemetry.RUN_INFO
    assert list(telemetry.CHUNK_SECONDS_BOUNDS) == sorted(telemetry.CHUNK_SECONDS_BOUNDS)


def panels_of(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for panel in board["panels"] for one in (panel, *panel.get("panels", []))]


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert board["schemaVersion"] >= 36
    assert board["title"]
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", board["uid"])
    assert board["id"] is None, "another Grafana numbers it"
    variables = {one["name"]: one for one in board["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    panels = panels_of(board)
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not taken & cells, f"{panel['title']} lies on another panel"
        taken |= cells
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["description"]
            assert panel["targets"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            refs = [target["refId"] for target in panel["targets"]]
            assert len(set(refs)) == len(refs)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (apt-get install prometheus)")
def test_prometheus_understands_every_query(tmp_path: Path) -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in panels_of(board) for target in panel.get("targets", [])]
    for name, value in (("$__rate_interval", "1m"), ("$__range", "1h"), ("$version", ".*")):
        queries = [query.replace(name, value) for query in queries]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "rules.json").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = subprocess.run(
        [str(PROMTOOL), "check", "rules", str(tmp_path / "rules.json")], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules)} rules found" in checked.stdout


def test_the_dashboard_asks_for_what_there_is_and_shows_all_of_it() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    known = {name: metric for metric in telemetry.METRICS for name in metric.series}
    queries = [target["expr"] for panel in panels_of(board) for target in panel.get("targets", [])]
    queries += [one["definition"] for one in board["templating"]["list"] if "definition" in one]
    asked = set()
    for query in queries:
        names = set(re.findall(r"\bray_\w+", query))
        assert names <= known.keys(), f"{names - known.keys()} in {query}"
        asked |= {known[name] for name in names}
        for name in names:
            in_braces = re.findall(name + r"\{([^}]*)\}", query)
            labels = {label for text in in_braces for label in re.findall(r"(\w+)\s*=", text)}
            assert labels <= {*known[name].labels, "le", "SessionName"}, query
            if known[name].kind is telemetry.Kind.COUNTER and "label_values" not in query:
                assert re.search(rf"(rate|increase)\({name}\{{", query), f"a counter without a rate: {query}"
        grouped = {label.strip() for text in re.findall(r"by \(([^)]*)\)", query) for label in text.split(",")}
        assert grouped <= {label for name in names for label in (*known[name].labels, "le")}, query
        assert query.count("(") == query.count(")")
    assert asked == set(telemetry.METRICS)
