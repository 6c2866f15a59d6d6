"""Where the workers of a training run find each other: on one address, not on every interface of a machine.

PyTorch 2.13's own store listens on all of them and asks for no token; Ray Train 2.60 has no setting for that, but takes a backend.
"""

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.torch.config import TorchConfig, _set_torch_distributed_env_vars, _TorchBackend
from torch._C._distributed_c10d import TCPStore


@dataclass
class OneAddressConfig(TorchConfig):
    """A process group whose store listens on the address of the first worker's node alone. `backend` must be given."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What Ray Train's controller makes the process group with."""
        return OneAddressBackend


class OneAddressBackend(_TorchBackend):
    """As Ray has it, but for the store."""

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: Any) -> None:
        """Make the process group; called whenever workers were started."""
        worker_group.execute(_set_torch_distributed_env_vars)
        store = worker_group.execute_single(0, listen)
        size, seconds = len(worker_group), backend_config.timeout_s
        ranks: list[Any] = [
            worker_group.execute_single_async(rank, join, backend_config.backend, rank, size, store, seconds)
            for rank in range(size)
        ]
        ray.get(ranks)


def listen() -> tuple[str, int, int]:
    """A listening socket of this process on its node's address: host, port, and the descriptor that the store takes over."""
    host = ray.util.get_node_ip_address()
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    return host, listener.getsockname()[1], listener.detach()


def join(backend: str, rank: int, size: int, store: tuple[str, int, int], timeout_seconds: float) -> None:
    """Connect this worker with the others."""
    host, port, descriptor = store
    timeout = timedelta(seconds=timeout_seconds)
    taken = descriptor if rank == 0 else None
    found = TCPStore(host, port, size, rank == 0, timeout, master_listen_fd=taken)
    dist.init_process_group(backend, store=found, rank=rank, world_size=size, timeout=timeout)
