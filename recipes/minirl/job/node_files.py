"""Files that rank 0 wrote, copied to the other nodes through the process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from routing_replay.files import atomic_write

# Bounds the memory of a copy. A message of this size reaches a network's full rate.
CHUNK_BYTES = 64 << 20


def node_number() -> int:
    """Return this process's node in a torchrun job, from 0."""
    return int(os.environ.get("GROUP_RANK", "0"))


def first_ranks() -> list[int]:
    """Return the lowest rank of each node, ascending; collective over the world."""
    nodes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(nodes, node_number())
    return [nodes.index(node) for node in sorted(set(nodes), key=nodes.index)]


def broadcast_files(folder: Path, group: dist.ProcessGroup) -> OSError | None:
    """Copy rank 0's files of a folder into the folders of the group's other ranks; collective.

    Args:
        folder: This rank's own; it exists.
        group: Of the backend gloo, with rank 0; one rank of each node.

    Returns:
        The error of a file that this rank could not write. It has received it all the same, so
        that no other rank waits for it.
    """
    is_source = dist.get_rank() == 0
    listing: list[list[tuple[str, int]]] = [[]]
    if is_source:
        listing = [[(path.name, path.stat().st_size) for path in sorted(folder.iterdir())]]
    dist.broadcast_object_list(listing, src=0, group=group)
    errors = []
    for name, size_bytes in listing[0]:
        if is_source:
            _send(folder / name, size_bytes, group)
        else:
            errors.append(_write(folder / name, _received(size_bytes, group)))
    return next((error for error in errors if error is not None), None)


def _send(path: Path, size_bytes: int, group: dist.ProcessGroup) -> None:
    with open(path, "rb") as file:
        for chunk in _chunks(size_bytes):
            file.readinto(chunk.numpy().data)
            dist.broadcast(chunk, src=0, group=group)


def _received(size_bytes: int, group: dist.ProcessGroup) -> Iterator[memoryview]:
    for chunk in _chunks(size_bytes):
        dist.broadcast(chunk, src=0, group=group)
        yield chunk.numpy().data


def _write(path: Path, chunks: Iterator[memoryview]) -> OSError | None:
    try:
        with atomic_write(path) as partial, open(partial, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
    except OSError as error:
        for _ in chunks:
            pass
        return error
    return None


def _chunks(size_bytes: int) -> Iterator[torch.Tensor]:
    """Yield parts of one buffer, together as long as a file."""
    buffer = torch.empty(min(size_bytes, CHUNK_BYTES), dtype=torch.uint8)
    for start in range(0, size_bytes, CHUNK_BYTES):
        yield buffer[: min(CHUNK_BYTES, size_bytes - start)]
