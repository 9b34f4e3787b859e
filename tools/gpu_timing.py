"""Time of short GPU kernels: many launches in one CUDA graph, free of the host's time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from tools.bench.paired import Times, spread, take_turns

Calls = Sequence[Callable[[], object]]
LAUNCHES = 50
# More than the 50 MiB of an H100's or H200's second-level cache, twice.
COLD_BYTES = 128 * 2**20


def copies_beyond_cache(size_bytes: int) -> int:
    """How many sets of tensors to use in turn, so that none is still in the cache."""
    return max(1, -(-COLD_BYTES // size_bytes))


def seconds_per_call(variants: Mapping[str, Calls], rounds: int = 9) -> Times:
    """Device seconds of one call of every variant, round by round; the variants take turns.

    Args:
        variants: The same work on different tensors, which take turns too; one call if the cache
            may be warm.
        rounds: Replays of each variant's graph of at least `LAUNCHES` launches.
    """
    return take_turns({name: _graphed(calls) for name, calls in variants.items()}, rounds)


def copy_bandwidth(device: torch.device, size_bytes: int = 2**30) -> float:
    """Bytes per second that a plain copy reads and writes: what memory allows, as measured."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = seconds_per_call({"copy": [lambda: target.copy_(source)]}, rounds=5)
    return 2 * size_bytes / spread(times["copy"]).median


def _graphed(calls: Calls) -> Callable[[], float]:
    """Capture the calls; the returned function runs them and returns the seconds of one."""
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

    def run() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / (repeats * len(calls))

    return run
