"""The cluster that fault tests share, an archive, and what a run without faults gives on it."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from jobs.demo_store import LoopbackS3
from tests import fakes
from tests.faults.harness import ROWS, SHARDS, Bench, check_nothing_lost, scoring
from tests.integration.test_equality import real_texts
from tests.preloaded import Preloaded, preloaded

Played = dict[str, Any]
"""One run of a scenario: its name, seed, faults that happened, seconds, and what was violated ('' for nothing)."""

PLAYED = pytest.StashKey[list[Played]]()


@pytest.fixture
def played(request: pytest.FixtureRequest) -> list[Played]:
    """What the table at the end of the session is made of."""
    return request.config.stash.setdefault(PLAYED, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table: each scenario with its seeds, faults, seconds and violations."""
    lines = config.stash.get(PLAYED, [])
    if not lines:
        return
    terminalreporter.section("faults")
    names = list(dict.fromkeys(line["scenario"] for line in lines))
    width = max(map(len, names))
    terminalreporter.write_line(f"{'scenario':{width}}  seeds  faults  seconds  violations")
    for name in names:
        mine = [line for line in lines if line["scenario"] == name]
        faults, seconds = sum(line["faults"] for line in mine), max(line["seconds"] for line in mine)
        violated = [f"seed {line['seed']}: {line['violation']}" for line in mine if line["violation"]]
        terminalreporter.write_line(
            f"{name:{width}}  {len(mine):5}  {faults:6}  {seconds:7.0f}  {'; '.join(violated) or 'none'}"
        )


@pytest.fixture(scope="session")
def damaged(forked_workers: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One cluster for all fault tests; use `bench`."""
    with preloaded(tmp_path_factory.mktemp("drivers"), "jobs.score", "time_machine") as drivers:
        made = Bench(tmp_path_factory.mktemp("bench"), forked_workers, drivers)
        yield made
        made.close()


@pytest.fixture
def bench(damaged: Bench) -> Bench:
    """A whole cluster, without faults."""
    damaged.heal()
    return damaged


def make_shards(shards: int = SHARDS, rows: int = ROWS) -> dict[str, pa.Table]:
    """Small shards of long texts: a run takes long enough to be damaged in the middle."""
    texts = [" ".join(real_texts(500)[index % 400 : index % 400 + 20]) for index in range(shards * rows)]
    return {
        f"part-{shard:03d}.parquet": pa.table({"text": texts[shard * rows : (shard + 1) * rows]})
        for shard in range(shards)
    }


@pytest.fixture
def archive(s3: LoopbackS3) -> str:
    """An archive of a test's own."""
    url = f"{s3.bucket()}/archive"
    fakes.write_archive(url, make_shards())
    return url


@pytest.fixture(scope="session")
def undamaged(s3: LoopbackS3, damaged: Bench, classifier: str) -> pa.Table:
    """Predictions of a run without faults on what `archive` holds."""
    damaged.heal()
    url = s3.bucket()
    fakes.write_archive(f"{url}/archive", make_shards())
    with scoring(damaged, f"{url}/archive", classifier, f"{url}/scores", run_id="undamaged") as job:
        assert job.wait() == 0, job.text
    return check_nothing_lost(f"{url}/archive", f"{url}/scores", faults=1, exit_code=0, run_id="undamaged")
