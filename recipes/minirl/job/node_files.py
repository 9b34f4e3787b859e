"""Files that rank 0 wrote, copied to the other nodes through the process group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


def broadcast_files(folder: Path, names: Sequence[str], group: dist.ProcessGroup) -> OSError | None:
    """Copy rank 0's files of a folder into the folders of the group's other ranks; collective.

    Args:
        folder: This rank's own; it exists.
        names: Of the files; those that rank 0 does not have are left out.
        group: Of the backend gloo, with rank 0; one rank of each node.

    Returns:
        The error of a file that this rank could not write. It has received it all the same, so
        that no other rank waits for it.
    """
    is_source = dist.get_rank() == 0
    listing: list[list[tuple[str, int]]] = [[]]
    if is_source:
        listing = [_sizes(folder, [name for name in names if (folder / name).exists()])]
    dist.broadcast_object_list(listing, src=0, group=group)

    def move(chunk: torch.Tensor) -> None:
        dist.broadcast(chunk, src=0, group=group)

    return _moved(folder, listing[0], is_source, move)


def send_files(
    folder: Path, names: Mapping[int, Iterable[str]], group: dist.ProcessGroup
) -> OSError | None:
    """Copy files of rank 0's folder to the nodes that need them; collective over the group.

    Args:
        folder: This rank's own; it exists.
        names: What the nodes need, by the first rank of each.
        group: Of the backend gloo: these ranks, with rank 0.

    Returns:
        As `broadcast_files`.
    """
    is_source = dist.get_rank() == 0
    listing: list[dict[int, list[tuple[str, int]]]] = [{}]
    if is_source:
        listing = [{rank: _sizes(folder, sorted(of_node)) for rank, of_node in names.items()}]
    dist.broadcast_object_list(listing, src=0, group=group)
    if not is_source:
        return _moved(folder, listing[0][dist.get_rank()], False, _from_first(group))
    for rank, of_node in listing[0].items():
        if rank:
            _moved(folder, of_node, True, _towards(rank, group))
    return None


def _from_first(group: dist.ProcessGroup) -> Callable[[torch.Tensor], object]:
    return lambda chunk: dist.recv(chunk, 0, group)


def _towards(rank: int, group: dist.ProcessGroup) -> Callable[[torch.Tensor], object]:
    return lambda chunk: dist.send(chunk, rank, group)


def _sizes(folder: Path, names: Iterable[str]) -> list[tuple[str, int]]:
    return [(name, (folder / name).stat().st_size) for name in names]


def _moved(
    folder: Path,
    listing: Sequence[tuple[str, int]],
    is_source: bool,
    move: Callable[[torch.Tensor], object],
) -> OSError | None:
    """Send files chunk by chunk, or receive and write them; return the first error of a write."""
    errors = []
    for name, size_bytes in listing:
        if is_source:
            _send(folder / name, size_bytes, move)
        else:
            errors.append(_write(folder / name, _received(size_bytes, move)))
    return next((error for error in errors if error is not None), None)


def _send(path: Path, size_bytes: int, move: Callable[[torch.Tensor], object]) -> None:
    with open(path, "rb") as file:
        for chunk in _chunks(size_bytes):
            file.readinto(chunk.numpy().data)
            move(chunk)


def _received(size_bytes: int, move: Callable[[torch.Tensor], object]) -> Iterator[memoryview]:
    for chunk in _chunks(size_bytes):
        move(chunk)
        yield chunk.numpy().data


def _write(path: Path, chunks: Iterator[memoryview]) -> OSError | None:
    try:
        with atomic_write(path, is_durable=False) as partial, open(partial, "wb") as file:
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
