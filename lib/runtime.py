"""Ray: connect to the cluster or start a local one, and say what it has. Below `training` and `pipeline`, which run on it."""

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import ray

from lib.config import Resources
from lib.errors import IncompleteError, UsageError, stop_on_signals
from lib.score_config import ScoreResources

TASK_CPUS_WITHOUT_GPU = 0.25
"""Reading and tokenizing take under 5% of the time that a CPU forward pass takes: they share what the actor leaves."""

NOTHING = Resources()
"""needed"""

WAIT_POLL_SECONDS = 1.0
WAIT_LINE_SECONDS = 30.0

SINGLE_NODE_SHARE = 0.625
"""Of a small node's CPUs, for actors: of two what is left runs three tasks."""

READERS_PER_CPU_ACTOR = 2
"""More would only wait for the actor, and take from it what starting them costs: 3.4 s of processor time and 265 MB each."""


@dataclass(frozen=True)
class Node:
    """What one live node has in all, used or not."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Cluster:
    """The nodes there are when the job starts."""

    nodes: tuple[Node, ...]
    waited: float = 0.0
    """seconds until they were there"""

    @property
    def cpus(self) -> float:
        """All CPUs."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """All GPUs."""
        return sum(node.gpus for node in self.nodes)

    def __str__(self) -> str:
        return f"{len(self.nodes)} nodes, {self.cpus:g} CPUs, {self.gpus:g} GPUs"


@contextlib.contextmanager
def ray_session(needed: Resources = NOTHING) -> Iterator[Cluster]:
    """Connect to the cluster that `RAY_ADDRESS` names, or start a local one; a connection that is there already is used and left.

    Waits for nodes if fewer are there than needed, see `wait_for_nodes`. Raises `UsageError` if unsafe settings are on, `IncompleteError` if the cluster cannot be reached.
    """
    unsafe = sorted(name for name in os.environ if name.startswith("RAY_DATA_AUTOLOAD_"))
    if unsafe:
        raise UsageError(
            f"{', '.join(unsafe)} is set: it lets a Parquet file run code while its schema is read; unset it"
        )
    if ray.is_initialized():
        yield wait_for_nodes(needed)
        return
    try:
        start_ray()
    except (ConnectionError, TimeoutError, RuntimeError) as error:
        raise IncompleteError(
            f"Ray at {os.environ.get('RAY_ADDRESS', 'local')} cannot be reached or started: {error}"
        ) from error
    stop_on_signals()
    try:
        yield wait_for_nodes(needed)
    finally:
        ray.shutdown()


def start_ray() -> None:
    """Connect, or start a local cluster behind a token. `address="local"`: a killed driver leaves an address file that lies."""
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
        return
    try:
        ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
    except Exception as error:
        if "timed out during startup" not in str(error):  # of no type of its own, after 30 s that nothing can change
            raise
        raise TimeoutError(
            f"it did not start within 30 s, as on a machine with too much to do; run again ({error})"
        ) from error


def cluster_facts() -> Cluster:
    """Ask Ray for its live nodes."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Cluster(tuple(Node(cpus=found.get("CPU", 0), gpus=found.get("GPU", 0)) for found in alive))


def holds(cluster: Cluster, needed: Resources) -> bool:
    """Whether a cluster has what a job needs, used or not."""
    return cluster.gpus >= needed.min_gpus and cluster.cpus >= needed.min_cpus


def wait_for_nodes(needed: Resources) -> Cluster:
    """Return what the cluster has once that is enough; an autoscaler is asked for what lacks.

    The request is a placement group: Ray drops it when this process ends, however it ends, so that no node is paid for a job that
    is dead. It is given back before work begins, for the nodes are held by their idle time until then.

    Raises `IncompleteError` after `wait_seconds`.
    """
    if holds(cluster := cluster_facts(), needed):
        return cluster
    request = ray.util.placement_group([{"GPU": 1}] * needed.min_gpus + [{"CPU": 1}] * needed.min_cpus)
    begun = time.monotonic()
    shown = -WAIT_LINE_SECONDS
    try:
        while not holds(cluster := cluster_facts(), needed):
            waited = time.monotonic() - begun
            if waited > needed.wait_seconds:
                raise IncompleteError(
                    f"resources.min_gpus = {needed.min_gpus} and min_cpus = {needed.min_cpus}, but after resources.wait_seconds ="
                    f" {needed.wait_seconds:g} the cluster has {cluster}; add nodes, look at the autoscaler, wait longer or ask for less,"
                    " and run the same command again"
                )
            if waited - shown >= WAIT_LINE_SECONDS:
                print(
                    f"waiting for {needed.min_gpus} GPUs and {needed.min_cpus} CPUs: the cluster has {cluster} ({waited:.0f} of"
                    f" {needed.wait_seconds:g} s)",
                    flush=True,
                )
                shown = waited
            time.sleep(WAIT_POLL_SECONDS)
    finally:
        ray.util.remove_placement_group(request)
    return replace(cluster, waited=time.monotonic() - begun)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a cluster is divided between readers, actors and writers."""

    num_actors: int
    actor_gpus: float
    actor_cpus: float
    task_cpus: float
    """of each reading and of each writing task"""
    num_readers: int | None
    """reading tasks at a time; None: as many as there are CPUs for"""
    threads: int
    """of one actor's forward pass on a CPU"""


def plan_layout(cluster: Cluster, wanted: ScoreResources, most_threads: int | None = None) -> Layout:
    """Divide a cluster so that readers and writers always find a CPU: actors that take every CPU would wait for ever.

    `most_threads`: that a node of it can run, whatever Ray was told that it has; default: as many as this machine.
    Raises `UsageError` with the numbers if it cannot hold them.
    """
    if not cluster.cpus:
        raise UsageError(
            f"the cluster ({cluster}) has no CPU to read and write with; add a worker node, or have an autoscaler bring"
            " some: --set resources.min_gpus=N, or min_cpus"
        )
    if cluster.gpus >= 1:
        actors = wanted.num_actors or int(cluster.gpus)
        if actors > cluster.gpus:
            raise UsageError(
                f"resources.num_actors = {actors}, one GPU each, but the cluster has {cluster}; ask for at most {int(cluster.gpus)}"
            )
        task_cpus = min(1.0, cluster.cpus / 2)
        return Layout(num_actors=actors, actor_gpus=1, actor_cpus=0, task_cpus=task_cpus, num_readers=None, threads=1)
    smallest = min(node.cpus for node in cluster.nodes if node.cpus)
    nodes = [node for node in cluster.nodes if node.cpus]
    actors = wanted.num_actors or len(nodes)
    per_node = math.ceil(actors / len(nodes))
    # Beside other nodes each keeps room for as many actors again: a lost node's come here, and must not take every CPU either. On a
    # single node actors take more than half: those of two runs that took half each left no CPU to read with, and both waited for ever.
    share = max(smallest - 1, SINGLE_NODE_SHARE * smallest) if len(nodes) == 1 else max(smallest - 1, smallest / 2) / 2
    share /= per_node
    if share < TASK_CPUS_WITHOUT_GPU:
        most = int(share * per_node / TASK_CPUS_WITHOUT_GPU) * len(nodes)
        raise UsageError(
            f"resources.num_actors = {actors} leaves {share:.2g} CPUs for each, but the cluster has {cluster}; ask for at most {most}"
        )
    threads = max(1, int(min(smallest, most_threads or os.cpu_count() or 1) / per_node))
    actor_cpus = math.floor(share * 100) / 100
    task_cpus = TASK_CPUS_WITHOUT_GPU if actor_cpus != TASK_CPUS_WITHOUT_GPU else TASK_CPUS_WITHOUT_GPU - 0.05
    return Layout(
        num_actors=actors,
        actor_gpus=0,
        actor_cpus=actor_cpus,
        task_cpus=task_cpus,
        num_readers=READERS_PER_CPU_ACTOR * actors,
        threads=threads,
    )
