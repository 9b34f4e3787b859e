"""The trainer's weights into running servers, bucket by bucket, without a disk.

Every pipeline stage has a source rank and a process group of its own, of that rank and all server
ranks. Rank 0 talks to the servers. One bucket after another is broadcast, for servers take one at a
time; meanwhile the other stages gather their next one.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import ParamSpec

import torch
import torch.distributed as dist

from recipes.model.buckets import Bucket, Buckets, Tensors, flattened
from routing_replay.errors import ServerError
from routing_replay.rollout.streaming import BucketHeader, WeightStream

from ..job.first_rank import LONGEST_WAIT
from ..launch.addresses import address_towards
from .server_group import ServerGroup

P = ParamSpec("P")
Converted = Callable[[Tensors], Tensors]


class WeightSender:
    """Sends a model's weights to the servers. Its methods are collective.

    Args:
        stream: The servers' side, on rank 0; None elsewhere.
        urls: The servers; a source listens in their network.
        timeout_s: The longest wait for the servers in a join or a broadcast.
    """

    def __init__(self, stream: WeightStream | None, urls: Sequence[str], timeout_s: float):
        self._stream = stream
        self._address = address_towards(urls)
        self._timeout_s = timeout_s
        self._store = dist.distributed_c10d._get_default_store()
        self._num_updates = 0
        self._names: dict[int, str] = {}  # of the groups, by source
        self._group: ServerGroup | None = None  # of this rank, if it is a source
        self._error = ""  # on rank 0: what broke the current update off
        self._threads = ThreadPoolExecutor(1)

    def send(self, buckets: Buckets, version: int, converted: Converted) -> str:
        """Replace the weights of all servers that are well.

        Args:
            buckets: The model's.
            version: Of the new weights.
            converted: Makes what the servers load of tensors as they are gathered.

        Returns:
            "", or why the update broke off: all servers then need another, whole one.

        Raises:
            ServerError: There are too few servers, or some that cannot be updated so (on rank 0).
        """
        self._num_updates += 1
        self._error = ""
        self._join(buckets.sources, version)
        for number, bucket in enumerate(buckets.buckets):
            self._send_bucket(f"bucket_{number}", buckets, bucket, converted)
        error = self._from_rank_0("end", lambda: self._finish(version))
        if error:
            self.leave()
        return error

    def leave(self) -> None:
        """Leave the groups; the next update makes new ones."""
        # First this end: a server that waits for a broadcast answers nothing.
        if self._group is not None:
            self._group.close()
        if self._stream is not None and self._names:
            self._stream.leave(list(self._names.values()))
        self._names, self._group = {}, None

    def _join(self, sources: Sequence[int], version: int) -> None:
        """Open the update, and make the groups anew where the servers are others than before."""

        def open_update() -> str:
            assert self._stream is not None
            self._stream.open(version)
            return str(self._stream.world_size) if self._stream.has_changed else ""

        if not (world_size := self._from_rank_0("open", open_update)):
            return
        self.leave()
        token = self._from_rank_0("token", lambda: uuid.uuid4().hex[:8])
        self._names = {source: f"weights-{token}-{source}" for source in sources}
        for source in sources:
            self._join_group(source, int(world_size))

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

    def _send_bucket(
        self, key: str, buckets: Buckets, bucket: Bucket, converted: Converted
    ) -> None:
        tensors, flat = buckets.gather(bucket), None
        if tensors is not None:
            header, flat = packed(converted(tensors))
            self._set(f"{key}/header", json.dumps(asdict(header)))
        call = None
        if self._stream is not None:
            header = BucketHeader(**json.loads(self._take(f"{key}/header")))
            self._set(f"{key}/go", "" if self._error else "go")
            if not self._error:
                name = self._names[bucket.source]
                call = self._threads.submit(self._on_servers, self._stream.send, name, header)
        if flat is not None and self._take(f"{key}/go"):
            assert self._group is not None
            try:
                self._group.broadcast(flat)
            except RuntimeError as error:  # the servers notice it too, and rank 0 by them
                print(f"Weights: a broadcast failed: {error}", flush=True)
        if call is not None:
            call.result()

    def _finish(self, version: int) -> str:
        assert self._stream is not None
        if not self._error:
            self._on_servers(self._stream.close, version)
        return self._error

    def _on_servers(self, call: Callable[P, None], *arguments: P.args, **named: P.kwargs) -> None:
        """Call the servers; if one fails, free the others and whoever broadcasts to them."""
        assert self._stream is not None
        try:
            call(*arguments, **named)
        except ServerError as error:
            self._error = str(error)
            self._stream.abandon(list(self._names.values()))

    def _from_rank_0(self, name: str, work: Callable[[], str]) -> str:
        """Return on every rank what rank 0 does."""
        if self._stream is not None:
            self._set(name, work())
        key = self._key(name)
        self._store.wait([key], LONGEST_WAIT)
        return self._store.get(key).decode()

    def _set(self, name: str, value: str) -> None:
        self._store.set(self._key(name), value)

    def _take(self, name: str) -> str:
        """Wait for a value that this rank alone reads; the store need not keep it."""
        key = self._key(name)
        self._store.wait([key], LONGEST_WAIT)
        value = self._store.get(key).decode()
        self._store.delete_key(key)
        return value

    def _key(self, name: str) -> str:
        return f"weight_stream/{self._num_updates}/{name}"


def packed(tensors: Tensors) -> tuple[BucketHeader, torch.Tensor]:
    """Return what a broadcast says and contains."""
    ordered, flat = flattened(tensors)
    header = BucketHeader(
        names=[name for name, _ in ordered],
        dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in ordered],
        shapes=[list(tensor.shape) for _, tensor in ordered],
    )
    return header, flat
