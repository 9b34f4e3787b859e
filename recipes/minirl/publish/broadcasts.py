"""Buckets into running servers over process groups: NCCL between GPUs, gloo otherwise.

Every pipeline stage has a source rank and a process group of its own, of that rank and all server
ranks.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch.distributed as dist

from recipes.model.buckets import Tensors
from routing_replay.rollout.streaming import BucketHeader, WeightStream

from ..launch.addresses import address_towards
from .server_group import ServerGroup
from .weight_sender import WeightSender, packed


class Broadcasts(WeightSender):
    """Broadcasts a model's weights to the servers.

    Args:
        stream: As for `WeightSender`.
        urls: The servers; a source listens in their network.
        timeout_s: The longest wait for the servers in a join or a broadcast.
    """

    def __init__(self, stream: WeightStream | None, urls: Sequence[str], timeout_s: float):
        super().__init__(stream)
        self._address = address_towards(urls)
        self._timeout_s = timeout_s
        self._names: dict[int, str] = {}  # of the groups, by source
        self._group: ServerGroup | None = None  # of this rank, if it is a source
        self._threads = ThreadPoolExecutor(1)

    def leave(self) -> None:
        """Leave the groups; the next update makes new ones."""
        # First this end: a server that waits for a broadcast answers nothing.
        if self._group is not None:
            self._group.close()
        if self._stream is not None and self._names:
            self._stream.leave(self._groups)
        self._names, self._group = {}, None

    @property
    def _groups(self) -> Sequence[str]:
        return list(self._names.values())

    def _prepare(self, sources: Sequence[int], num_ranks: list[int], has_changed: bool) -> None:
        """Make the groups, anew where the servers are others than before."""
        if self._names and not has_changed:
            return
        self.leave()
        token = self._from_rank_0("token", lambda: uuid.uuid4().hex[:8])
        self._names = {source: f"weights-{token}-{source}" for source in sources}
        for source in sources:
            self._join_group(source, 1 + sum(num_ranks))

    def _join_group(self, source: int, world_size: int) -> None:
        name = self._names[source]
        if dist.get_rank() == source:
            self._group = ServerGroup(self._address, name, world_size, self._timeout_s)
            where = [self._address, self._group.port, self._group.backend]
            self._set(name, json.dumps(where))

        def join() -> str:
            assert self._stream is not None
            address, port, backend = json.loads(self._take(name))
            if not self._error:
                self._on_servers(self._stream.join, name, address, port, backend)
            return self._error

        error = self._from_rank_0(f"{name}/joined", join)
        if self._group is not None and self._group.name == name:
            if error:
                self._group.close()
                self._group = None
            else:
                self._group.wait()

    def _send_bucket(self, key: str, source: int, tensors: Tensors | None) -> None:
        flat = None
        if tensors is not None:
            header, flat = packed(tensors)
            self._set(f"{key}/header", json.dumps(asdict(header)))
        call = None
        if self._stream is not None:
            header = BucketHeader(**json.loads(self._take(f"{key}/header")))
            self._set(f"{key}/go", "" if self._error else "go")
            if not self._error:
                name = self._names[source]
                call = self._threads.submit(self._on_servers, self._stream.send, name, header)
        if flat is not None and self._take(f"{key}/go"):
            assert self._group is not None
            try:
                self._group.broadcast(flat)
            except RuntimeError as error:  # the servers notice it too, and rank 0 by them
                print(f"Weights: a broadcast failed: {error}", flush=True)
        if call is not None:
            call.result()
