"""What goes wrong in a run, by name: each scenario breaks something real, lets the run (or the next one) end, and says what happened.

A scenario takes the bench and a seed, which decides when and where it strikes. The check of `harness` comes after it.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from jobs.demo_store import LoopbackS3
from lib.storage import open_store
from tests import fakes
from tests.faults.harness import SHARDS, Bench, Job, check_unpublished, scoring
from tests.proxy import CLIENT_PORT, Fault, FaultyProxy, Rule
from tests.waiting import wait_until


@dataclass
class Scene:
    """One run of a scenario: an archive and an output of its own."""

    bench: Bench
    s3: LoopbackS3
    archive: str
    output: str
    model: str
    chance: random.Random
    zombies: list[psutil.Process] = field(default_factory=list)
    endpoint: str = ""
    cleanup: ExitStack = field(default_factory=ExitStack)
    """what is undone after the last check"""

    @contextmanager
    def job(self, run_id: str = "run", *settings: str) -> Iterator[Job]:
        """Start a run."""
        with scoring(
            self.bench, self.archive, self.model, self.output, *settings, run_id=run_id, endpoint=self.endpoint
        ) as job:
            yield job

    def run(self, run_id: str = "run", *settings: str, code: int = 0) -> str:
        """Run to the end; returns what was printed."""
        with self.job(run_id, *settings) as job:
            assert job.wait(400) == code, job.text
        if code:
            check_unpublished(self.output, run_id)
        return job.text

    @contextmanager
    def job_at_a_shard(self, run_id: str, shard: str) -> Iterator[Job]:
        """Start a run whose readers stand still before they open a shard, until there are no faults planted any more."""
        self.bench.plant(read={"shard": shard, "do": "pause"})
        with self.job(run_id) as job:
            wait_until(lambda: bool(self.bench.events) or job.process.poll() is not None, "a reader at the shard", 240)
            assert self.bench.events, job.text
            yield job

    @property
    def objects(self) -> int:
        """Prediction objects that are there."""
        return sum("-of-" in path for path in open_store(self.output).list()["path"].to_pylist())

    def shard(self) -> str:
        """Some shard."""
        return f"part-{self.chance.randrange(SHARDS):03d}.parquet"

    def wait_for_some(self, job: Job) -> int:
        """Wait until some objects are there, at least one and not all; the job must still be at work then."""
        some = self.chance.randint(1, SHARDS * 2 // 3)

        def reached() -> bool:
            assert job.process.poll() is None, f"the job ended too early: {job.text[-2000:]}"
            return self.objects >= some

        wait_until(reached, f"{some} objects", 240)
        return some


@dataclass(frozen=True)
class Ending:
    """What a scenario came to."""

    faults: int
    run_id: str = "run"
    """the run whose results readers must see"""
    changed: tuple[str, ...] = ()
    """shards that are other ones, or gone, since the run without faults"""
    killed: bool = False
    """whether a driver died without a word, so that what it was just trying may be left"""


Scenario = Callable[[Scene], Ending]


# processes


def kill_driver(scene: Scene) -> Ending:
    """The driver dies at once; its orphans may go on writing while the next run works."""
    with scene.job("killed") as job:
        scene.wait_for_some(job)
        scene.zombies += scene.bench.workers("MapBatches")
        job.process.kill()
        job.process.wait()
    assert scene.zombies, "there must be orphans"
    check_unpublished(scene.output, "killed")
    scene.run("rerun")
    return Ending(1, "rerun", killed=True)


def stop_driver(scene: Scene) -> Ending:
    """SIGTERM: exit code 5 within 30 s, and the next run goes on."""
    with scene.job("stopped") as job:
        scene.wait_for_some(job)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(30) == 5, job.text
    check_unpublished(scene.output, "stopped")
    scene.run("rerun")
    return Ending(1, "rerun")


def kill_actors(scene: Scene, times: int = 1) -> Ending:
    """All predictor actors die, so many times; one shard is read only then, so that the run cannot end before."""
    killed = 0
    with scene.job_at_a_shard("run", scene.shard()) as job:
        for _ in range(times):
            scene.wait_for_some(job)
            wait_until(lambda: bool(scene.bench.workers("PredictBlock")), "actors", 120)
            victims = scene.bench.workers("PredictBlock")
            for victim in victims:
                victim.send_signal(signal.SIGKILL)
            killed += len(victims)
            psutil.wait_procs(victims, 10)
        scene.bench.plant()
        assert job.wait(400) == 0, job.text
    return Ending(killed)


def kill_actors_three_times(scene: Scene) -> Ending:
    """All predictor actors die, again and again."""
    return kill_actors(scene, 3)


def kill_progress(scene: Scene) -> Ending:
    """The actor that counts what is done dies: it counts again from zero, and nothing else changes."""
    with scene.job() as job:
        scene.wait_for_some(job)
        victims = scene.bench.workers("ray::Progress")
        head: Any = scene.bench.cluster.head_node
        beside_driver = head.all_processes["raylet"][0].process.pid
        assert [scene.bench.raylet_of(victim) for victim in victims] == [beside_driver], (
            "another node's end would take it along"
        )
        for victim in victims:
            victim.kill()
        assert job.wait(400) == 0, job.text
    return Ending(len(victims))


def kill_reader(scene: Scene) -> Ending:
    """A process dies while it reads and tokenizes."""
    scene.bench.plant(read={"shard": scene.shard(), "do": "kill", "times": 2})
    scene.run()
    return Ending(len(scene.bench.events))


def kill_writer(scene: Scene, when: str = "before") -> Ending:
    """A process dies right before its PUT."""
    scene.bench.plant(write={"shard": scene.shard(), "when": when, "times": 2})
    scene.run()
    return Ending(len(scene.bench.events))


def kill_writer_after_its_put(scene: Scene) -> Ending:
    """A process dies right after its PUT, before anybody knows of it."""
    return kill_writer(scene, "after")


def run_out_of_gpu_memory(scene: Scene) -> Ending:
    """No GPU here: large forward passes raise what CUDA would."""
    scene.bench.plant(memory={"most": 300})
    scene.run()
    return Ending(len(scene.bench.events))


# nodes


def lose_node(scene: Scene) -> Ending:
    """A node is gone without a word, and no other comes."""
    with scene.job() as job:
        scene.wait_for_some(job)
        scene.bench.lose_node()
        assert job.wait(400) == 0, job.text
    return Ending(1)


def replace_node(scene: Scene) -> Ending:
    """A node is gone, another one comes."""
    with scene.job() as job:
        scene.wait_for_some(job)
        scene.bench.lose_node()
        scene.bench.heal()
        assert job.wait(400) == 0, job.text
    return Ending(1)


def add_node(scene: Scene) -> Ending:
    """A node comes while the run is at work."""
    scene.bench.lose_node()
    with scene.job() as job:
        scene.wait_for_some(job)
        scene.bench.heal()
        assert job.process.poll() is None, "the node must come while the run is at work"
        assert job.wait(400) == 0, job.text
    return Ending(1)


# the machine

MEMORY_MARGIN = 3 * 2**30
"""Bytes that a node short of memory had left when it started."""


def set_clock(scene: Scene) -> Ending:
    """The driver's clock is set, a day back or up to a year ahead; the next run's plan counts as the later one all the same."""
    with scene.job("jumped") as job:
        scene.wait_for_some(job)
        scene.bench.plant(clock=scene.chance.choice([-86_400, 86_400, 365 * 86_400]))
        wait_until(lambda: bool(scene.bench.events), "the clock to be set", 60)
        assert job.wait(400) == 0, job.text
    faults = len(scene.bench.events)
    assert published_run(scene) == "jumped"
    scene.bench.heal()
    fakes.write_archive(scene.archive, {"part-new.parquet": pa.table({"text": ["what came", "the day after"]})})
    scene.run("day-after")
    return Ending(faults, "day-after", changed=("part-new.parquet",))


def run_out_of_memory(scene: Scene) -> Ending:
    """Another program takes a node's memory: Ray ends workers there until some is free again."""
    used = psutil.virtual_memory()
    limit = (used.total - used.available + MEMORY_MARGIN) / used.total
    scene.bench.lose_node()
    node = scene.bench.add_node(RAY_memory_usage_threshold=f"{limit:.4f}")
    scene.cleanup.callback(scene.bench.cluster.remove_node, node)
    with scene.job() as job:
        scene.wait_for_some(job)
        victims = scene.bench.workers("ray::")
        with subprocess.Popen(
            [sys.executable, "-c", f"b = b'x' * {2 * MEMORY_MARGIN}; input()"], stdin=subprocess.PIPE
        ) as other:
            try:
                wait_until(lambda: any(not one.is_running() for one in victims), "Ray to end a worker", 120)
            finally:
                other.kill()
        assert job.wait(400) == 0, job.text
    return Ending(1)


def fill_disk(scene: Scene) -> Ending:
    """The output's disk is full from some point on: exit code 4 with the system's words, and the next run goes on."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = Path(scene.bench.folder, f"disk-{scene.chance.getrandbits(32):x}")
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=True)
    scene.cleanup.callback(subprocess.run, ["umount", str(disk)], check=True)
    scene.output = str(disk / "scores")
    ballast = disk / "ballast"
    with scene.job("full") as job:
        kept = scene.wait_for_some(job)
        with ballast.open("wb", buffering=0) as sink, contextlib.suppress(OSError):
            while sink.write(bytes(4096)):
                pass
        assert psutil.disk_usage(str(disk)).free == 0
        assert job.wait(400) == 4, job.text
    assert "No space left on device" in job.text
    assert scene.objects >= kept
    check_unpublished(scene.output, "full")
    ballast.unlink()
    scene.run("rerun")
    return Ending(1, "rerun")


# doubles


def submit_twice(scene: Scene) -> Ending:
    """The same job twice at the same time: every object is made once."""
    first = len(scene.s3.requests())
    with scene.job("one", "resources.num_actors=1") as one, scene.job("two", "resources.num_actors=1") as two:
        wait_until(lambda: all("to do (" in job.text for job in (one, two)), "both to have a plan", 240)
        assert scene.objects < SHARDS, "both must be at work at the same time"
        assert one.wait(400) == 0, one.text
        assert two.wait(400) == 0, two.text
    bucket = scene.output.removeprefix("s3://").partition("/")[0]
    made = [
        path
        for method, path, status in scene.s3.requests()[first:]
        if method == "PUT" and status == 200 and f"/{bucket}/" in path and "-of-" in path
    ]
    assert len(made) == len(set(made)) == SHARDS
    published = (open_store(scene.output).read("_published.json") or b"").decode()
    return Ending(1, "two" if "/_runs/two/" in published else "one")


# storage


def at_rate(share: float, chance: random.Random, faults: Sequence[Fault]) -> Rule:
    """A fault of a random kind for a share of all requests."""
    lock = threading.Lock()

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault:
        with lock:
            return chance.choice(faults) if chance.random() < share else Fault.NONE

    return rule


def through_proxy(share: float, *faults: Fault, play: Callable[[Scene], object] = Scene.run) -> Scenario:
    """A share of all requests meets one of these faults, while another scenario plays or a run just goes its way."""

    def scenario(scene: Scene) -> Ending:
        with FaultyProxy(scene.s3.url) as proxy:
            proxy.rule = at_rate(share, scene.chance, faults)
            scene.endpoint = proxy.url
            play(scene)
            return Ending(count(proxy))

    return scenario


def count(proxy: FaultyProxy) -> int:
    """Faults that happened."""
    return sum(fault is not Fault.NONE for _, _, fault in proxy.seen)


MIXED = (Fault.ERROR, Fault.SLOW_DOWN, Fault.RESET, Fault.TRUNCATED, Fault.LOST_ANSWER, Fault.DENIED)
"""What a store under load does, and does not do to the same request again."""


def store_in_trouble(scene: Scene) -> Ending:
    """For a minute, three in ten requests fail in all ways; the run ends well or, incomplete, the next one does."""
    with FaultyProxy(scene.s3.url) as proxy:
        scene.endpoint = proxy.url
        with scene.job("trouble") as job:
            scene.wait_for_some(job)
            began, rule = time.monotonic(), at_rate(0.3, scene.chance, MIXED)
            proxy.rule = lambda *request: rule(*request) if time.monotonic() - began < 60 else Fault.NONE
            code = job.wait(600)
        proxy.rule = lambda *_: Fault.NONE
        assert code in (0, 4), job.text
        if code == 0:
            return Ending(count(proxy), "trouble")
        assert "run the same command again" in job.text
        check_unpublished(scene.output, "trouble")
        scene.run("rerun")
        return Ending(count(proxy), "rerun")


def store_gone(scene: Scene) -> Ending:
    """Every connection ends without an answer for 30 s."""
    with FaultyProxy(scene.s3.url) as proxy:
        scene.endpoint = proxy.url
        with scene.job() as job:
            scene.wait_for_some(job)
            gone_at = time.monotonic()
            proxy.rule = lambda *_: Fault.RESET if time.monotonic() - gone_at < 30 else Fault.NONE
            assert job.wait(600) == 0, job.text
        return Ending(count(proxy))


def credentials_expire(scene: Scene) -> Ending:
    """Every request is answered with ExpiredToken from some point on: exit code 4, and the next run goes on."""
    with FaultyProxy(scene.s3.url) as proxy:
        scene.endpoint = proxy.url
        with scene.job("expired") as job:
            kept = scene.wait_for_some(job)
            proxy.rule = lambda *_: Fault.EXPIRED
            assert job.wait(400) == 4, job.text
        assert "ExpiredToken" in job.text
        faults = count(proxy)
        scene.endpoint = ""
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in job.text
        assert scene.objects >= kept
        check_unpublished(scene.output, "expired")
    scene.run("renewed")
    return Ending(faults, "renewed")


def lose_acknowledgements(scene: Scene) -> Ending:
    """Three in ten PUTs are done, and nobody hears of it."""
    lost = at_rate(0.3, scene.chance, [Fault.LOST_ANSWER])
    return Ending(run_behind(scene, lambda method, *rest: lost(method, *rest) if method == "PUT" else Fault.NONE))


def run_behind(scene: Scene, rule: Rule) -> int:
    """Let a run go its way while its requests meet a rule; returns how many faults happened."""
    with FaultyProxy(scene.s3.url) as proxy:
        proxy.rule = rule
        scene.endpoint = proxy.url
        scene.run()
        return count(proxy)


def flip_bits(scene: Scene) -> Ending:
    """The last byte of one answer of each of three shards, of its footer or of its pages, arrives changed: what the storage has is scored.

    One of a shard: what cannot be decoded is asked for once more, and then believed.
    """
    turns = {
        f"part-{number:03d}.parquet": scene.chance.randint(1, 3) for number in scene.chance.sample(range(SHARDS), 3)
    }
    seen: Counter[str] = Counter()

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault:
        shard = path.partition("?")[0].rpartition("/")[2]
        if method != "GET" or shard not in turns:
            return Fault.NONE
        seen[shard] += 1
        return Fault.FLIPPED if seen[shard] == turns[shard] else Fault.NONE

    return Ending(run_behind(scene, rule))


def fall_silent(scene: Scene) -> Ending:
    """One request in twenty is never answered: the client gives up after `read_timeout`, which is set to seconds here, and asks again."""
    scene.bench.plant(read_timeout=3)
    return through_proxy(0.05, Fault.SILENT)(scene)


def kill_writer_in_its_put(scene: Scene) -> Ending:
    """A process dies when the store has read the head of its PUT, and not the body."""
    shard = scene.shard()
    killed: list[int] = []

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault:
        if method != "PUT" or shard not in path or "-of-" not in path or len(killed) == 2:
            return Fault.NONE
        killed.append(owner_of(int(headers[CLIENT_PORT])))
        os.kill(killed[-1], signal.SIGKILL)
        return Fault.RESET

    return Ending(run_behind(scene, rule))


def owner_of(port: int) -> int:
    """The process whose end of a connection on this machine has this port."""
    return next(one.pid for one in psutil.net_connections("tcp") if one.laddr and one.laddr.port == port and one.pid)


# the archive


def change_shard(scene: Scene) -> Ending:
    """A shard is rewritten before the run reads it: the run is incomplete, says why, and the next one has the new rows."""
    shard = f"part-{SHARDS - 1:03d}.parquet"
    with scene.job_at_a_shard("changed", shard) as job:
        fakes.write_archive(scene.archive, {shard: pa.table({"text": ["another text", "and one more"]})})
        scene.bench.plant()
        assert job.wait(400) == 4, job.text
    assert f"{shard}: its content is not the one that was listed" in job.text
    check_unpublished(scene.output, "changed")
    scene.run("rerun")
    return Ending(1, "rerun", changed=(shard,))


def remove_shard(scene: Scene) -> Ending:
    """A shard vanishes before the run reads it."""
    shard = f"part-{SHARDS - 1:03d}.parquet"
    with scene.job_at_a_shard("vanished", shard) as job:
        open_store(scene.archive).delete(shard)
        scene.bench.plant()
        assert job.wait(400) == 4, job.text
    assert f"{shard}: it was there when the archive was listed, and is gone" in job.text
    check_unpublished(scene.output, "vanished")
    scene.run("rerun", 'input.deleted="remove"')
    return Ending(1, "rerun", changed=(shard,))


def published_run(scene: Scene) -> str:
    """The run that the pointer names."""
    raw = (open_store(scene.output).read("_published.json") or b"").decode()
    return raw.partition("/_runs/")[2].partition("/")[0]


SCENARIOS: dict[str, Scenario] = {
    "driver killed": kill_driver,
    "driver stopped": stop_driver,
    "actors killed": kill_actors,
    "actors killed three times": kill_actors_three_times,
    "progress actor killed": kill_progress,
    "reader killed": kill_reader,
    "writer killed before its put": kill_writer,
    "writer killed in its put": kill_writer_in_its_put,
    "writer killed after its put": kill_writer_after_its_put,
    "out of GPU memory": run_out_of_gpu_memory,
    "node lost": lose_node,
    "node replaced": replace_node,
    "node added": add_node,
    "clock set": set_clock,
    "host memory short": run_out_of_memory,
    "disk full": fill_disk,
    "job submitted twice": submit_twice,
    "500 for 5%": through_proxy(0.05, Fault.ERROR),
    "503 SlowDown for 30%": through_proxy(0.3, Fault.SLOW_DOWN),
    "connections reset for 5%": through_proxy(0.05, Fault.RESET),
    "bodies truncated for 5%": through_proxy(0.05, Fault.TRUNCATED),
    "no answer for 5%": fall_silent,
    "false 403 for 5%": through_proxy(0.05, Fault.DENIED),
    "everything for 5%": through_proxy(0.05, *MIXED),
    "node replaced, everything for 5%": through_proxy(0.05, *MIXED, play=replace_node),
    "everything for 30% and a minute": store_in_trouble,
    "acknowledgements lost": lose_acknowledgements,
    "store gone for 30 s": store_gone,
    "credentials expired": credentials_expire,
    "bits flipped": flip_bits,
    "shard changed": change_shard,
    "shard removed": remove_shard,
}
