"""Time of short GPU kernels: many launches in one CUDA graph, free of the host's time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

LAUNCHES = 50
# More than the 50 MiB of an H100's or H200's second-level cache, twice.
COLD_BYTES = 128 * 2**20


def copies_beyond_cache(size_bytes: int) -> int:
    """How many sets of tensors to use in turn, so that none is still in the cache."""
    return max(1, -(-COLD_BYTES // size_bytes))


def seconds_per_call(calls: Sequence[Callable[[], object]], rounds: int = 20) -> float:
    """Median over rounds of the device time of one call; the calls take turns.

    Args:
        calls: The same work on different tensors; one call if the cache may be warm.
        rounds: Replays of a graph of at least `LAUNCHES` launches.
    """
    repeats = max(1, -(-LAUNCHES // len(calls)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and fills the allocator's pool
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    times = [_seconds(graph.replay) for _ in range(rounds)]
    return statistics.median(times) / (repeats * len(calls))


def copy_bandwidth(device: torch.device, size_bytes: int = 2**30) -> float:
    """Bytes per second that a plain copy reads and writes: what memory allows, as measured."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / seconds_per_call([lambda: target.copy_(source)], rounds=5)


def _seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
