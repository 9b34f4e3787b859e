"""Seconds of steps on several ranks: what the busiest rank takes, and what the cost model says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch.distributed as dist

from routing_replay.balance import CostModel

from .paired import ratios, spread

COLLECTIVES = ("all_to_all_single", "all_reduce", "barrier", "reduce_scatter_tensor")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One step on one rank.

    Args:
        wall_s: From barrier to barrier.
        parts_N: Processor seconds between one collective and the next.
    """

    wall_s: float
    parts_N: list[float]


@contextmanager
def parts_between_collectives() -> Iterator[list[float]]:
    """Collect the processor seconds of this thread between collectives; gloo's are not counted."""
    parts: list[float] = []
    last = time.thread_time()

    def counted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal last
            parts.append(time.thread_time() - last)
            result = collective(*arguments, **options)
            last = time.thread_time()
            return result

        return call

    with ExitStack() as stack:
        for name in COLLECTIVES:
            wrapped = counted(getattr(dist, name))
            stack.enter_context(mock.patch.object(dist, name, wrapped))
        yield parts


def path_s(timings: Sequence[Timing], is_ideal: bool = False) -> float:
    """Return the sum of the busiest rank's parts of a step, or of the mean rank's."""
    parts_RN = np.array([timing.parts_N for timing in timings])
    return float((parts_RN.mean(0) if is_ideal else parts_RN.max(0)).sum())


def report(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Print and return the figures of all ranks together."""
    first = ranks[0]["turns"]
    by_name = {
        name: list(zip(*(one["turns"]["times"][name] for one in ranks), strict=True))
        for name in first["times"]
    }
    wall = {
        name: [max(t.wall_s for t in step) for step in steps] for name, steps in by_name.items()
    }
    path = {name: [path_s(step) for step in steps] for name, steps in by_name.items()}
    ideal = {
        name: [path_s(step) / path_s(step, is_ideal=True) for step in steps]
        for name, steps in by_name.items()
    }
    wall_ratios, path_ratios = ratios(wall, "natural"), ratios(path, "natural")
    figures: dict[str, Any] = {}
    print("| step | peak / mean | wall s | / natural | path s | / natural | path / ideal |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in by_name:
        row = {
            "peak_over_mean": first["peaks"].get(name, first["peaks"]["natural"]),
            "wall_s": spread(wall[name]),
            "wall_to_natural": wall_ratios[name],
            "path_s": spread(path[name]),
            "path_to_natural": path_ratios[name],
            "path_to_ideal": spread(ideal[name]),
        }
        figures[name] = row
        print(
            f"| {name} | {row['peak_over_mean']:.3f} | "
            + " | ".join(map(str, list(row.values())[1:]))
            + " |"
        )
    if "live" in path:
        figures["both_to_live"] = ratios(path, "live")["both"]
        figures["both_to_live_wall"] = ratios(wall, "live")["both"]
        print(f"both / live: path {figures['both_to_live']}, wall {figures['both_to_live_wall']}")
    figures["planning_s"], figures["moving_s"] = first["planning"], spread(first["moving"])
    print(f"planning {first['planning']} s, moving {figures['moving_s']} s")
    return figures | {"fit": fitted(ranks)}


def fitted(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit the cost model to half of the steps, and predict the other half."""
    features_N4 = np.array([features for features, _ in ranks[0]["fit"]])
    measured_N = np.array(
        [path_s([one["fit"][n][1] for one in ranks]) for n in range(len(features_N4))]
    )
    half = np.arange(len(measured_N)) // 2 % 2 == 0  # pairs: natural, planned
    model = CostModel.fit(features_N4[half], measured_N[half])
    predicted_N = np.array([model.seconds(features_4) for features_4 in features_N4])
    error_N = predicted_N / measured_N - 1
    print(f"{model}\npredicted / measured - 1 of the other half: {np.round(error_N[~half], 3)}")
    return {
        "model": str(model),
        "measured_s": measured_N.tolist(),
        "predicted_s": predicted_N.tolist(),
        "errors_of_the_other_half": error_N[~half].tolist(),
    }
