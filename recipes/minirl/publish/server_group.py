"""A process group of one trainer rank, which is its rank 0, and of the servers' ranks."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    TCPStore,
    distributed_c10d,
)


class ServerGroup:
    """Listens for the servers, then broadcasts to them.

    Args:
        address: Of this rank in the servers' network.
        name: Unique among the groups of all jobs that use the servers.
        world_size: Of the group.
        timeout_s: The longest wait of the group.
    """

    def __init__(self, address: str, name: str, world_size: int, timeout_s: float):
        self.name = name
        self.backend = "nccl" if torch.cuda.is_available() else "gloo"
        self._timeout = timedelta(seconds=timeout_s)
        # The servers' ranks, and a failed join below, wait in this store: its end frees them.
        self._store: TCPStore | None = self._open_store(address, 0)
        self.port = self._store.port
        own = PrefixStore(name, self._open_store(address, self.port))
        self._threads = ThreadPoolExecutor(1)
        self._group: Future[Any] = self._threads.submit(self._connect, own, world_size)

    def wait(self) -> None:
        """Return once all have joined; raise RuntimeError if they do not."""
        self._group.result()

    def broadcast(self, flat: torch.Tensor) -> None:
        """Send a tensor to all servers; raise RuntimeError if one is gone or too slow."""
        dist.broadcast(flat, group_src=0, group=self._group.result())
        if flat.is_cuda:
            torch.cuda.synchronize()

    def close(self) -> None:
        """Leave the group; whoever waits in it gets an error."""
        self._store = None
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group(self._group.result())
        # Connections end with the last reference to the group.
        self._group = Future()
        self._threads.shutdown()

    def _open_store(self, address: str, port: int) -> TCPStore:
        """Listen if the port is 0, else connect."""
        return TCPStore(
            address, port, is_master=not port, wait_for_workers=False, timeout=self._timeout
        )

    def _connect(self, store: PrefixStore, world_size: int) -> Any:
        """Do what SGLang's `init_custom_process_group` does: the keys in the store must agree."""
        group, _ = distributed_c10d._new_process_group_helper(
            world_size,
            0,
            [],
            distributed_c10d.Backend(self.backend),
            store,
            group_name=self.name,  # type: ignore[arg-type]
            backend_options=None,
            timeout=self._timeout,
        )
        distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
        return group
