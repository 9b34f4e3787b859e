"""A Ray cluster on this machine: raylets with loopback addresses of their own, without GPUs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import psutil

# Not 127.0.0.1, which Ray replaces by the machine's own address.
FIRST_ADDRESS = 2


class LocalCluster:
    """Raylets with some CPUs each; a context manager.

    Args:
        cpus: Of each node; the first is the head.
        options: Of all nodes, such as num_gpus: Ray counts GPUs that nobody has.
    """

    def __init__(self, cpus: Sequence[int], **options: Any):
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        # Ray's 15 gives its workers a twenty-eighth of a core beside any other busy process.
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (how Ray spells it)
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(shutdown_at_exit=True)
        self._nodes: dict[str, Any] = {}
        self._numbers = itertools.count()
        for num_cpus in cpus:
            self.add(num_cpus, **options)
        self.address: str = self._cluster.address

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()

    def add(self, num_cpus: int, **options: Any) -> str:
        """Add a node; return its address."""
        address = f"127.0.0.{FIRST_ADDRESS + next(self._numbers)}"
        is_head = {} if self._nodes else {"include_dashboard": False}
        self._nodes[address] = self._cluster.add_node(
            num_cpus=num_cpus, node_ip_address=address, **is_head, **options
        )
        return address

    def actors(self, name: str) -> list[psutil.Process]:
        """The living actors of a class: processes of this cluster, for tests run side by side."""
        raylets = [p for node in self._nodes.values() for p in node.all_processes["raylet"]]
        started = [p for raylet in raylets for p in psutil.Process(raylet.process.pid).children()]
        return [process for process in started if process.name().startswith(f"ray::{name}")]

    def lose(self, address: str) -> None:
        """End a node as a power failure does."""
        self._cluster.remove_node(self._nodes.pop(address), allow_graceful=False)
