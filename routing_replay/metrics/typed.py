"""Typed metrics: a value knows how it is reduced, so a reduction across ranks is never guessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean kept as its two sums, both on the device, until it is read. `count` 0 reads as nan."""

    total: torch.Tensor
    count: torch.Tensor

    def merge(self, other: Mean) -> Mean:
        return Mean(total=self.total + other.total, count=self.count + other.count)

    def value(self) -> torch.Tensor:
        return self.total / self.count


@dataclass(frozen=True, kw_only=True)
class Sum:
    """A plain sum over everything."""

    total: torch.Tensor

    def merge(self, other: Sum) -> Sum:
        return Sum(total=self.total + other.total)

    def value(self) -> torch.Tensor:
        return self.total


@dataclass(frozen=True, kw_only=True)
class Max:
    """The largest value seen anywhere; -inf where nothing was seen."""

    maximum: torch.Tensor

    def merge(self, other: Max) -> Max:
        return Max(maximum=torch.maximum(self.maximum, other.maximum))

    def value(self) -> torch.Tensor:
        return self.maximum


Metric = Mean | Sum | Max


def masked_mean(values_T: torch.Tensor, mask_T: torch.Tensor) -> Mean:
    """Mean over the tokens where `mask_T` (bool or 0/1) holds; the others may even be nan."""
    kept = torch.where(mask_T.bool(), values_T.detach().double(), 0.0)
    return Mean(total=kept.sum(), count=mask_T.sum().double())


def masked_max(values_T: torch.Tensor, mask_T: torch.Tensor) -> Max:
    """Maximum over the tokens where `mask_T` holds; -inf when there is none."""
    kept = torch.where(mask_T.bool(), values_T.detach().double(), -torch.inf)
    return Max(maximum=kept.max() if kept.numel() else kept.new_tensor(-torch.inf))


def merge(first: Mapping[str, Metric], second: Mapping[str, Metric]) -> dict[str, Metric]:
    """Union of two sets of metrics; a name in both is merged by its own rule."""
    merged = dict(first)
    for name, metric in second.items():
        # A name is of one kind; were it of two, this would raise.
        merged[name] = merged[name].merge(metric) if name in merged else metric  # type: ignore[arg-type]
    return merged


def all_reduce(metrics: Mapping[str, Metric], group=None, device=None) -> dict[str, Metric]:
    """Reduce over `group`. Every rank must take part, and may own different names.

    Pipeline stages own different layers, so the union of the names is agreed on first; a rank
    without a name contributes nothing to it. Two reductions move all the values.

    Args:
        metrics: This rank's metrics.
        group: Process group; the world if None. Without an initialised world nothing is reduced.
        device: Where the communication happens: the CPU for gloo (default), the GPU for NCCL.

    Raises:
        ConfigError: A name is of different kinds on different ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return dict(metrics)
    kinds: list[dict[str, str]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(kinds, {n: type(m).__name__ for n, m in metrics.items()}, group=group)
    union: dict[str, str] = {}
    for rank, of_rank in enumerate(kinds):
        for name, kind in of_rank.items():
            if union.setdefault(name, kind) != kind:
                raise ConfigError(
                    f"metric {name!r} is of two kinds",
                    expected=union[name],
                    got=kind,
                    where=f"group rank {rank}",
                    fix="Give every rank's metric of one name the same kind",
                )
    device = device or "cpu"
    names = sorted(union)
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    maxima = torch.full((len(names),), -torch.inf, dtype=torch.float64, device=device)
    for i, name in enumerate(names):
        match metrics.get(name):
            case Mean(total=total, count=count):
                sums[i, 0], sums[i, 1] = total, count
            case Sum(total=total):
                sums[i, 0] = total
            case Max(maximum=maximum):
                maxima[i] = maximum
    dist.all_reduce(sums, group=group)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
    made: dict[str, Callable[[int], Metric]] = {
        "Mean": lambda i: Mean(total=sums[i, 0], count=sums[i, 1]),
        "Sum": lambda i: Sum(total=sums[i, 0]),
        "Max": lambda i: Max(maximum=maxima[i]),
    }
    return {name: made[union[name]](i) for i, name in enumerate(names)}


def to_floats(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Read every metric as a float: the one place where the host waits for the device."""
    return {name: float(metric.value()) for name, metric in metrics.items()}
