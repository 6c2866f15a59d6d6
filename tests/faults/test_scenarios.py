"""Every scenario ends with nothing lost: the nine points of `harness` are checked after each.

A few run with every test run; all of them, with many seeds, are a trial that prints a table:

    make faults SEEDS=20              # seeds 0 to 19; FIRST_SEED=20 goes on from there
"""

import contextlib
import json
import os
import random
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.demo_store import LoopbackS3
from lib.storage import open_store
from tests import fakes
from tests.faults.conftest import Played, make_shards
from tests.faults.harness import Bench, Job, Reader, check_idempotent, check_nothing_lost, check_unpublished, scoring
from tests.faults.scenarios import SCENARIOS, Scenario, Scene
from tests.waiting import wait_until

ALWAYS = "node replaced, everything for 5%"
"""Part of every test run, beside `test_killed`, `test_rescore` and `test_poison`, whose rows kill actors."""

KILLS = int(os.environ.get("KILLS", "100"))

SEEDS = int(os.environ.get("SEEDS", "1"))
FIRST_SEED = int(os.environ.get("FIRST_SEED", "0"))

SHARE_OF_STARTS = 0.2
"""Of the drivers that are killed at many points, those that are before they have done anything, as far as chance has it."""

SLOW_SECONDS = 200
"""A scenario that takes longer keeps what its runs printed: most take 30 to 100 on two cores."""


def play(name: str, seed: int, bench: Bench, s3: LoopbackS3, model: str, undamaged: pa.Table) -> int:
    """Play one scenario and check what came of it; returns how many faults happened."""
    url = s3.bucket()
    scene = Scene(
        bench=bench,
        s3=s3,
        archive=f"{url}/archive",
        output=f"{url}/scores",
        model=model,
        chance=random.Random(f"{name} {seed}"),
    )
    fakes.write_archive(scene.archive, make_shards())
    with scene.cleanup:
        return play_scene(SCENARIOS[name], scene, undamaged)


def play_scene(scenario: Scenario, scene: Scene, undamaged: pa.Table) -> int:
    """Play a scenario and check; returns how many faults happened."""
    with Reader(lambda: open_store(scene.output)) as reader:
        ending = scenario(scene)
    scene.bench.heal()
    check_nothing_lost(
        scene.archive,
        scene.output,
        faults=ending.faults,
        exit_code=0,
        run_id=ending.run_id,
        reader=reader,
        like=undamaged,
        changed=ending.changed,
        killed=ending.killed,
        zombies=scene.zombies,
    )
    check_idempotent(scene.s3, scene.archive, scene.model, scene.output)
    return ending.faults


def test_nothing_is_lost(bench: Bench, s3: LoopbackS3, classifier: str, undamaged: pa.Table) -> None:
    play(ALWAYS, 0, bench, s3, classifier, undamaged)


@pytest.mark.trial
@pytest.mark.timeout(3 * 3_600)
def test_a_driver_killed_at_many_random_points(
    bench: Bench, s3: LoopbackS3, classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 small shards, run and killed until they are done; then all over again, until `KILLS` drivers have died."""
    chance, nights = random.Random(0), 0
    points: list[int] = []
    """how many objects each driver had made when it died"""
    url = s3.bucket()
    archive = f"{url}/archive"
    fakes.write_archive(archive, make_shards(200, 20))
    while len(points) < KILLS:
        nights += 1
        output, code, kept, run, died = f"{url}/scores-{nights}", None, 0, 0, 0
        while code is None:
            run += 1
            with scoring(bench, archive, classifier, output, run_id=f"run-{run}") as job:
                code = job.wait(600) if len(points) == KILLS else ends_before(job, output, kept, chance)
                job.process.kill()
                job.process.wait()
            objects = num_objects(output)
            assert kept <= objects <= 200, "what was finished is kept"
            if code is None:
                died += 1
                points.append(objects - kept)
                if f"/_runs/run-{run}/" in (open_store(output).read("_published.json") or b"").decode():
                    code = 0  # it died behind its last step
                elif objects < 200:  # a run that has all may say that it succeeded before readers are moved to it
                    check_unpublished(output, f"run-{run}")
            kept = objects
        assert code == 0, job.text
        if died:
            check_nothing_lost(archive, output, faults=died, exit_code=0, run_id=f"run-{run}", killed=True)
        check_idempotent(s3, archive, classifier, output)
        with capsys.disabled():
            print(f"\n{len(points)} drivers killed; 200 shards done after {run} runs, nothing lost", flush=True)
    with capsys.disabled():
        print(f"objects that a driver had made when it died: {sorted(points)}", flush=True)
    assert sum(point > 0 for point in points) >= KILLS // 2, "most must die in the middle of the work"


def ends_before(job: Job, output: str, kept: int, chance: random.Random) -> int | None:
    """The exit code of a job that ends before a random point: a time in its start, or some objects more than were `kept`."""
    seconds = chance.uniform(0.5, 8)
    if chance.random() > SHARE_OF_STARTS:
        more = kept + chance.randint(1, 60)
        wait_until(lambda: job.process.poll() is not None or num_objects(output) >= more, "some work", 240)
        seconds = chance.uniform(0, 1)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return job.process.wait(seconds)
    return None


def num_objects(output: str) -> int:
    """How many objects a version has."""
    return sum("-of-" in path for path in open_store(output).list()["path"].to_pylist())


@pytest.mark.trial
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + SEEDS))
@pytest.mark.parametrize("name", SCENARIOS)
def test_matrix(
    name: str, seed: int, bench: Bench, s3: LoopbackS3, classifier: str, undamaged: pa.Table, played: list[Played]
) -> None:
    began = time.monotonic()
    line: Played = {"scenario": name, "seed": seed, "faults": 0, "violation": "an error in the test itself"}
    try:
        line |= {"faults": play(name, seed, bench, s3, classifier, undamaged), "violation": ""}
    except AssertionError as error:
        line["violation"] = str(error).partition("\n")[0][:200] or "an assertion"
        raise
    finally:
        line["seconds"] = round(time.monotonic() - began, 1)
        if line["seconds"] > SLOW_SECONDS or line["violation"]:
            line["logs"] = {path.stem: path.read_text(errors="replace") for path in bench.folder.glob("*.log")}
        with Path(os.environ.get("FAULTS_LOG", os.devnull)).open("a") as log:
            log.write(json.dumps(line) + "\n")
        played.append(line)
