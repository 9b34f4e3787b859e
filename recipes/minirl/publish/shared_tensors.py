"""Buckets into servers of the same machine, which read them where the trainer has them.

SGLang is told where the bytes are, in a message that it unpickles: a tensor in shared memory of the
CPU, or one on a GPU. Servers and trainer can thus use the same GPU.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
from torch import multiprocessing
from torch.multiprocessing import reductions

from recipes.model.buckets import Tensors
from routing_replay.rollout.streaming import BucketHeader

from .weight_sender import WeightSender, packed

# Of what `reduce_tensor` says of a tensor on a GPU: the device, as this process numbers them.
DEVICE_ARGUMENT = 6


class SharedTensors(WeightSender):
    """Lets the servers of this machine read a model's weights from the trainer's memory."""

    _num_ranks: Sequence[int] = ()

    def _prepare(self, sources: Sequence[int], num_ranks: list[int], has_changed: bool) -> None:
        self._num_ranks = num_ranks

    def _send_bucket(self, key: str, source: int, tensors: Tensors | None) -> None:
        if self._stream is not None:
            self._set(f"{key}/go", "" if self._error else "go")
        if tensors is not None:
            header, flat = packed(tensors)
            # A payload counts as one reader, and what nobody reads stays in memory.
            num_ranks = self._num_ranks if self._take(f"{key}/go") else []
            payloads = [[payload(header, flat) for _ in range(number)] for number in num_ranks]
            self._set(f"{key}/payloads", json.dumps(payloads))
        if self._stream is not None:
            payloads = json.loads(self._take(f"{key}/payloads"))
            if payloads:
                self._on_servers(self._stream.share, payloads)
            self._set(f"{key}/read", "read")
        if tensors is not None:
            self._take(f"{key}/read")  # until then `flat` must live


def payload(header: BucketHeader, flat: torch.Tensor) -> str:
    """Return a bucket as one rank of a server reads it, once: base64 of a pickled dictionary.

    Args:
        header: What the bucket contains.
        flat: Its bytes, uint8, which must live until the server has read them.
    """
    stream = io.BytesIO()
    with _named_sharing():
        bucket = {"flattened_tensor": _Shared(flat), "metadata": _metadata(header)}
        ForkingPickler(stream).dump(bucket)
    return base64.b64encode(stream.getvalue()).decode()


class _Shared:
    """A tensor that is pickled as where it is."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def __reduce__(self) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
        rebuild, arguments = reductions.reduce_tensor(self._tensor)
        if self._tensor.is_cuda:
            # Servers may number the devices otherwise: SGLang knows them by their UUIDs.
            uuid = str(torch.cuda.get_device_properties(self._tensor.device).uuid)
            arguments = (*arguments[:DEVICE_ARGUMENT], uuid, *arguments[DEVICE_ARGUMENT + 1 :])
        return rebuild, arguments


def _metadata(header: BucketHeader) -> list[SimpleNamespace]:
    """Return the tensors of a bucket with the attributes of SGLang's FlattenedTensorMetadata."""
    tensors, end = [], 0
    for name, dtype_name, shape in zip(header.names, header.dtypes, header.shapes, strict=True):
        dtype = getattr(torch, dtype_name)
        start, size = end, torch.Size(shape).numel() * dtype.itemsize
        end = start + size
        tensors.append(
            SimpleNamespace(
                name=name,
                shape=tuple(shape),
                dtype=dtype,
                start_idx=start,
                end_idx=end,
                numel=size,
            )
        )
    return tensors


@contextlib.contextmanager
def _named_sharing() -> Iterator[None]:
    """Share memory under names. By default torch sends a descriptor on a socket with a key.

    SGLang's processes have another key: they would end with an AuthenticationError.
    """
    strategy = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        multiprocessing.set_sharing_strategy(strategy)
