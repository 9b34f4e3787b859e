"""The harness of all benchmarks: variants take turns, and ratios are taken round by round.

On a shared machine the absolute times drift. Variants of the same round see the same drift, so
their ratio is steady. Every other round runs in the reverse order, so that what one variant leaves
in caches and allocators does not always favour the same successor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Times = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles of figures."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles; of one value, that value three times."""
    if len(values) == 1:
        return Spread(median=values[0], low=values[0], high=values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median=median, low=low, high=high)


def take_turns(variants: Mapping[str, Callable[[], float]], rounds: int) -> Times:
    """Return the figures of every variant, round by round.

    Args:
        variants: Functions that return the figure of one run, such as its seconds.
        rounds: Counted rounds; one more before them warms up.
    """
    times: Times = {name: [] for name in variants}
    for number in range(rounds + 1):
        names = list(variants) if number % 2 else list(variants)[::-1]
        for name in names:
            figure = variants[name]()
            if number:
                times[name].append(figure)
    return times


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """Return a function that runs `work` and returns its seconds.

    On a GPU that is wall time up to the end of its kernels; on a CPU it is this process's processor
    time, which other processes do not disturb.
    """

    def run() -> float:
        has_cuda = torch.cuda.is_available()
        clock = time.perf_counter if has_cuda else time.process_time
        if has_cuda:
            torch.cuda.synchronize()
        started = clock()
        work()
        if has_cuda:
            torch.cuda.synchronize()
        return clock() - started

    return run


def ratios(times: Times, base: str) -> dict[str, Spread]:
    """Return each variant's ratio to `base`, taken within each round."""
    return {
        name: spread([a / b for a, b in zip(values, times[base], strict=True)])
        for name, values in times.items()
    }


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """Return a command line with what every benchmark takes."""
    made = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    made.add_argument("--quick", action="store_true", help="smallest sizes: shows that it runs")
    return made


def parse(
    made: argparse.ArgumentParser, argv: Sequence[str] | None, quick: Mapping[str, object]
) -> argparse.Namespace:
    """Return the arguments; with --quick those of `quick` replace the defaults."""
    if made.parse_args(argv).quick:
        made.set_defaults(**quick)
    return made.parse_args(argv)


def run_kernel(
    name: str,
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Mapping[str, Any]],
    check: Callable[[argparse.Namespace], Mapping[str, Any]],
) -> None:
    """Time a Triton kernel on a GPU; without one check its results in Triton's interpreter."""
    if torch.cuda.is_available():
        figures = measure(arguments)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        figures = check(arguments)
        print("The interpreter ran on a CPU: correctness only, no time is meant.")
    finish(name, arguments, figures)


def is_too_much(arguments: argparse.Namespace) -> bool:
    """Whether a benchmark for GPUs shall not run: on a CPU it shows only that it runs."""
    is_cpu = not torch.cuda.is_available() and not arguments.quick
    if is_cpu:
        print("There is no GPU: --quick shows that it runs.")
    return is_cpu


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finish(name: str, arguments: argparse.Namespace, figures: Mapping[str, Any]) -> None:
    """Write the figures, their arguments and the machine to --json, if it was given."""
    if arguments.json is None:
        return
    values = {key: value for key, value in vars(arguments).items() if key != "json"}
    record = {"benchmark": name, "machine": machine(), "arguments": values, "figures": figures}
    text = json.dumps(record, indent=2, default=_plain)
    arguments.json.write_text(text + "\n", encoding="utf-8")


def machine() -> dict[str, str]:
    """Return what the figures depend on: device, torch and Python."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "torch": torch.__version__, "python": platform.python_version()}


def run_apart(module: str, *arguments: str) -> Any:
    """Run a module in a process of its own, so that its peak memory is its own.

    Returns:
        The JSON that it prints.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _plain(value: object) -> object:
    return asdict(value) if isinstance(value, Spread) else str(value)
