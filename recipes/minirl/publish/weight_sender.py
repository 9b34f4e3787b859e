"""The trainer's weights into running servers, bucket by bucket, without a disk."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ParamSpec

import torch
import torch.distributed as dist

from recipes.model.buckets import Buckets, Tensors, flattened
from routing_replay.errors import ServerError
from routing_replay.rollout.streaming import BucketHeader, WeightStream

from ..job.first_rank import LONGEST_WAIT

P = ParamSpec("P")
Converted = Callable[[Tensors], Tensors]


class WeightSender(ABC):
    """Sends a model's weights to the servers. Its methods are collective.

    Rank 0 talks to the servers; the sources of the buckets have the weights. One bucket after
    another is sent, for servers take one at a time; meanwhile other sources gather their next one.

    Args:
        stream: The servers' side, on rank 0; None elsewhere.
    """

    def __init__(self, stream: WeightStream | None):
        self._stream = stream
        self._store = dist.distributed_c10d._get_default_store()
        self._num_updates = 0
        self._error = ""  # on rank 0: what broke the current update off

    def send(
        self, buckets: Buckets, version: int, converted: Converted, *, flush_cache: bool = True
    ) -> str:
        """Replace the weights of all servers that are well.

        Args:
            buckets: The model's.
            version: Of the new weights.
            converted: Makes what the servers load of tensors as they are gathered.
            flush_cache: As for `WeightStream.close`.

        Returns:
            "", or why the update broke off: all servers then need another, whole one.

        Raises:
            ServerError: There are too few servers, or some that cannot be updated so (on rank 0).
        """
        self._num_updates += 1
        self._error = ""
        members = json.loads(self._from_rank_0("open", lambda: self._opened(version)))
        self._prepare(buckets.sources, **members)
        for number, bucket in enumerate(buckets.buckets):
            tensors = buckets.gather(bucket)
            sent = None if tensors is None else converted(tensors)
            self._send_bucket(f"bucket_{number}", bucket.source, sent)
        error = self._from_rank_0("end", lambda: self._finish(version, flush_cache))
        if error:
            self.leave()
        return error

    def leave(self) -> None:  # noqa: B027  (only some have what they could leave)
        """Leave what is shared with the servers; the next update makes it anew."""

    @abstractmethod
    def _prepare(self, sources: Sequence[int], num_ranks: list[int], has_changed: bool) -> None:
        """Make ready for the buckets of an update that is open.

        Args:
            sources: The ranks that gather buckets.
            num_ranks: Of the servers, one after another.
            has_changed: Whether these servers are others than in the update before.
        """

    @abstractmethod
    def _send_bucket(self, key: str, source: int, tensors: Tensors | None) -> None:
        """Send a bucket to the servers; its tensors are on its source alone."""

    def _opened(self, version: int) -> str:
        assert self._stream is not None
        members = self._stream.open(version)
        num_ranks = [member.num_ranks for member in members]
        return json.dumps({"num_ranks": num_ranks, "has_changed": self._stream.has_changed})

    def _finish(self, version: int, flush_cache: bool) -> str:
        assert self._stream is not None
        if not self._error:
            self._on_servers(self._stream.close, version, flush_cache=flush_cache)
        return self._error

    @property
    def _groups(self) -> Sequence[str]:
        """Names of the process groups that the servers are in, on rank 0."""
        return ()

    def _on_servers(self, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call the servers; if one fails, free the others and whoever waits for them in a group."""
        assert self._stream is not None
        try:
            call(*args, **kwargs)
        except ServerError as error:
            self._error = str(error)
            self._stream.abandon(self._groups)

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
    """Return what a bucket contains, and its bytes as one tensor."""
    ordered, flat = flattened(tensors)
    header = BucketHeader(
        names=[name for name, _ in ordered],
        dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in ordered],
        shapes=[list(tensor.shape) for _, tensor in ordered],
    )
    return header, flat
