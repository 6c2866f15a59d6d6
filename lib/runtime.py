"""Ray: connect to the cluster or start a local one, and say what it has. Below `training` and `pipeline`, which run on it."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import ray

from lib.errors import IncompleteError, UsageError, stop_on_signals


@dataclass(frozen=True)
class Node:
    """What one live node has in all, used or not."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Cluster:
    """The nodes there are when the job starts."""

    nodes: tuple[Node, ...]

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
def ray_session() -> Iterator[Cluster]:
    """Connect to the cluster that `RAY_ADDRESS` names, or start a local one; a connection that is there already is used and left.

    Raises `UsageError` if unsafe settings are on, `IncompleteError` if the cluster cannot be reached.
    """
    unsafe = sorted(name for name in os.environ if name.startswith("RAY_DATA_AUTOLOAD_"))
    if unsafe:
        raise UsageError(
            f"{', '.join(unsafe)} is set: it lets a Parquet file run code while its schema is read; unset it"
        )
    if ray.is_initialized():
        yield cluster_facts()
        return
    try:
        start_ray()
    except (ConnectionError, TimeoutError, RuntimeError) as error:
        raise IncompleteError(
            f"Ray at {os.environ.get('RAY_ADDRESS', 'local')} cannot be reached or started: {error}"
        ) from error
    stop_on_signals()
    try:
        yield cluster_facts()
    finally:
        ray.shutdown()


def start_ray() -> None:
    """Connect, or start a local cluster behind a token. `address="local"`: a killed driver leaves an address file that lies."""
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
    else:
        ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)


def cluster_facts() -> Cluster:
    """Ask Ray for its live nodes."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Cluster(tuple(Node(cpus=found.get("CPU", 0), gpus=found.get("GPU", 0)) for found in alive))
