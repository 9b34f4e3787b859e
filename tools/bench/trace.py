"""A profiler's trace of one replayed microbatch: where the host waits, and what the device does.

    python -m tools.bench.trace [--tokens 16384] [--layers 48] [--trace FILE.json]

The routers of a model replay one microbatch, forward and backward with recomputation. Printed are
the operations that take most time, how long the host takes before the first router, and the calls
in which the host waits for the device. The trace opens in chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from recipes.model import parallel

from .paired import finish, is_too_much, parse, parser
from .replay import Way, random_routes, settings

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item")
SHOWN = 15


def profiled(arguments: argparse.Namespace) -> Any:
    """Return the profile of one step; steps before it warm up."""
    setting = next(s for s in settings(arguments) if s.is_router_only)
    way = Way("ours", setting, random_routes(setting))
    weight = next(way.chunk.parameters())
    hidden = torch.randn(setting.tokens, 1, setting.hidden).to(weight).requires_grad_()
    for _ in range(2):
        way.step(hidden, backward=True)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as made:
        with record_function("step"):
            way.step(hidden, backward=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return made


def summary(made: Any) -> dict[str, Any]:
    """Return the largest operations, the waits, and the microseconds before the first router."""
    on_gpu = torch.cuda.is_available()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = sorted(made.key_averages(), key=lambda event: -getattr(event, key))
    events = made.events()
    begun = next(event.time_range.start for event in events if event.name == "step")
    linear = (e.time_range.start for e in events if e.name in ("aten::mm", "aten::addmm"))
    first = min((start for start in linear if start >= begun), default=begun)
    return {
        "us_before_the_first_router": first - begun,
        "waits": {e.key: e.count for e in averages if e.key in WAITS},
        "us": {event.key: getattr(event, key) for event in averages[:SHOWN]},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Profile one step and print its summary."""
    made = parser(__doc__)
    for name, default in (("tokens", 16384), ("layers", 48), ("hidden", 2048)):
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--expert-width", type=int, default=16, help="experts do not run")
    made.add_argument("--spec", choices=("auto", "te", "local"), default="local", help="layer spec")
    made.add_argument("--trace", type=Path, help="file of the trace")
    quick = {"tokens": 16, "layers": 2, "hidden": 64}
    arguments = parse(made, argv, quick)
    if is_too_much(arguments):
        return
    parallel.initialize(parallel.ParallelLayout(), seed=1)
    profile_made = profiled(arguments)
    figures = summary(profile_made)
    print(f"{figures['us_before_the_first_router']:.0f} us before the first router")
    print("waits: " + (str(figures["waits"]) if figures["waits"] else "none"))
    for name, microseconds in figures["us"].items():
        print(f"{microseconds:12.0f} us  {name}")
    if arguments.trace is not None:
        profile_made.export_chrome_trace(str(arguments.trace))
    finish("trace", arguments, figures)
    parallel.destroy()


if __name__ == "__main__":
    main()
