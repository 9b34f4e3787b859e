"""Metrics by version lag: by how many versions the trained weights are newer than the rollout's.

Between weights of one version a difference is a discrepancy of the engines. Between versions it
also holds what the updates changed. So metrics that compare the rollout with the trainer carry the
lag in their name: `NAME` at lag 0, `NAME_lag_1` at lag 1. A step can have tokens of several lags.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

V = TypeVar("V")
MARK = "_lag_"
# Of `routing_replay/`: what compares the rollout's routes with the trainer's live ones.
COMPARISONS = (
    "overlap",
    "exact_match",
    "live_mass",
    "replay_bias",
    "margin",
    "router_kl",
    "router_kl_bound",
    "any_layer_differs",
    "first_differing_layer",
    "first_difference",
    "replace_rate",
)


def lag_suffix(lag: int) -> str:
    """Return what follows the name of a metric at a version lag."""
    return f"{MARK}{lag}" if lag else ""


def lags_of(names: Collection[str], name: str) -> list[int]:
    """Return the version lags at which a metric is among some names, ascending."""
    prefix = name + MARK
    numbers = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
    return [0] * (name in names) + sorted(int(number) for number in numbers if number.isdigit())


def nearest_lag(names: Collection[str], name: str, lag: float) -> int:
    """Return the version lag nearest to another at which a metric is among some names.

    Args:
        names: Of all metrics.
        name: Of the metric, without a lag.
        lag: What a step's responses have, in the mean. If there is no such metric, it is rounded.
    """
    return min(lags_of(names, name), key=lambda one: abs(one - lag), default=round(lag))


def with_lag(metrics: Mapping[str, V], lag: int) -> dict[str, V]:
    """Return a replay's metrics, its comparisons named by their version lag."""
    compared = {f"routing_replay/{name}" for name in COMPARISONS}
    suffix = lag_suffix(lag)
    return {name + suffix * (name in compared): metric for name, metric in metrics.items()}
