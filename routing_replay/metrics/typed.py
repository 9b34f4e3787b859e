"""Typed metrics: a value knows how it is reduced, so a reduction across ranks is never guessed.

A metric of the routed layers is one object, not one name per layer: only a sink that knows nothing
but scalars (TensorBoard, Weights & Biases) expands it, as `NAME` and `NAME_layer_{i}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean, kept as two sums on the device until it is read. A `count` of 0 reads as nan."""

    total: torch.Tensor
    count: torch.Tensor

    def merge(self, other: Mean) -> Mean:
        return Mean(total=self.total + other.total, count=self.count + other.count)

    def value(self) -> torch.Tensor:
        return self.total / self.count


@dataclass(frozen=True, kw_only=True)
class Sum:
    """A sum over everything."""

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


@dataclass(frozen=True, kw_only=True)
class LayerMean:
    """One mean per routed layer, and the mean over all of them.

    Args:
        layers: Global 0-based indices, ascending.
        total_L: float64 sums, one per layer.
        count_L: float64 counts; 0 for a layer that this rank does not see.
        has_mean: False where a mean over the layers says nothing, as for shares of one whole.
    """

    layers: tuple[int, ...]
    total_L: torch.Tensor
    count_L: torch.Tensor
    has_mean: bool = True

    def merge(self, other: LayerMean) -> LayerMean:
        """Add two parts; the layers may differ."""
        layers = tuple(sorted({*self.layers, *other.layers}))
        sums_2L = self.cells(layers) + other.cells(layers)
        return LayerMean(
            layers=layers, total_L=sums_2L[0], count_L=sums_2L[1], has_mean=self.has_mean
        )

    def value_L(self) -> torch.Tensor:
        return self.total_L / self.count_L

    def value(self) -> torch.Tensor:
        """Return the mean over all layers, each weighted by its count."""
        return self.total_L.sum() / self.count_L.sum()

    def cells(self, layers: tuple[int, ...]) -> torch.Tensor:
        """Return totals and counts [2, L] for these layers; 0 where this rank has none."""
        cells_2L = self.total_L.new_zeros(2, len(layers))
        index_L = [layers.index(layer) for layer in self.layers]
        cells_2L[:, index_L] = torch.stack([self.total_L, self.count_L])
        return cells_2L


@dataclass(frozen=True, kw_only=True)
class LayerValues:
    """A `LayerMean` that was read: the mean over the layers (None without one) and each layer."""

    mean: float | None
    layers: Mapping[int, float]


Metric = Mean | Sum | Max | LayerMean
Value = float | LayerValues


def masked_mean(values_T: torch.Tensor, mask_T: torch.Tensor) -> Mean:
    """Return the mean where `mask_T` (bool or 0/1) holds; other tokens may hold nan."""
    kept_T = torch.where(mask_T.bool(), values_T.detach().double(), 0.0)
    return Mean(total=kept_T.sum(), count=mask_T.sum().double())


def masked_max(values_T: torch.Tensor, mask_T: torch.Tensor) -> Max:
    """Return the maximum where `mask_T` holds; -inf where it never does."""
    kept_T = torch.where(mask_T.bool(), values_T.detach().double(), -torch.inf)
    return Max(maximum=kept_T.max() if kept_T.numel() else kept_T.new_tensor(-torch.inf))


def merge(first: Mapping[str, Metric], second: Mapping[str, Metric]) -> dict[str, Metric]:
    """Return the union of two sets of metrics; a name in both is merged by its own rule."""
    merged = dict(first)
    for name, metric in second.items():
        # Raises AttributeError if the kinds differ: a bug of ours, not of the user.
        merged[name] = merged[name].merge(metric) if name in merged else metric  # type: ignore[arg-type]
    return merged


def all_reduce(
    metrics: Mapping[str, Metric],
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Metric]:
    """Reduce over `group`. Every rank must take part, and may own different names.

    Pipeline stages own different layers, so the ranks first agree on the union of names and layers;
    a rank without a name contributes nothing to it. Two reductions move all the values.

    Args:
        metrics: This rank's metrics.
        group: Process group; the world if None. Without an initialised world nothing is reduced.
        device: Where the communication happens: the CPU for gloo (default), the GPU for NCCL.

    Raises:
        ConfigError: A name is of different kinds on different ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return dict(metrics)
    # This pickles, but only between the ranks of one job.
    kinds: list[dict[str, _Kind]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(kinds, {n: _Kind.of(m) for n, m in metrics.items()}, group=group)
    union = _union(kinds)
    if not union:
        return {}
    device = device or "cpu"
    sums = [_sums(metrics.get(name), kind).to(device) for name, kind in union.items()]
    maxima = [_maximum(metrics.get(name)).to(device) for name in union]
    sums_C2, maximum_N = torch.cat(sums), torch.stack(maxima)
    # Two tensors, because one collective has one operation.
    dist.all_reduce(sums_C2, group=group)
    dist.all_reduce(maximum_N, op=dist.ReduceOp.MAX, group=group)
    parts = sums_C2.split([len(part) for part in sums])
    return {
        name: kind.metric(part.T, maximum)
        for (name, kind), part, maximum in zip(union.items(), parts, maximum_N, strict=True)
    }


def to_floats(metrics: Mapping[str, Metric]) -> dict[str, Value]:
    """Read every metric: the one place where the host waits for the device."""
    return {name: _read(metric) for name, metric in metrics.items()}


def _read(metric: Metric) -> Value:
    if not isinstance(metric, LayerMean):
        return float(metric.value())
    values = dict(zip(metric.layers, metric.value_L().tolist(), strict=True))
    return LayerValues(mean=float(metric.value()) if metric.has_mean else None, layers=values)


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What the ranks tell each other about a metric before the values move."""

    type: str
    layers: tuple[int, ...] = ()
    has_mean: bool = True

    @classmethod
    def of(cls, metric: Metric) -> _Kind:
        if isinstance(metric, LayerMean):
            return cls(type="LayerMean", layers=metric.layers, has_mean=metric.has_mean)
        return cls(type=type(metric).__name__)

    def metric(self, sums_2C: torch.Tensor, maximum: torch.Tensor) -> Metric:
        total_C, count_C = sums_2C
        match self.type:
            case "Mean":
                return Mean(total=total_C[0], count=count_C[0])
            case "Sum":
                return Sum(total=total_C[0])
            case "Max":
                return Max(maximum=maximum)
        return LayerMean(
            layers=self.layers, total_L=total_C, count_L=count_C, has_mean=self.has_mean
        )


def _union(kinds_by_rank: list[dict[str, _Kind]]) -> dict[str, _Kind]:
    union: dict[str, _Kind] = {}
    for rank, kinds in enumerate(kinds_by_rank):
        for name, kind in kinds.items():
            known = union.setdefault(name, kind)
            if known.type != kind.type:
                raise ConfigError(
                    f"metric {name!r} is of two kinds",
                    expected=known.type,
                    got=kind.type,
                    where=f"group rank {rank}",
                    fix="Give every rank's metric of one name the same kind",
                )
            layers = tuple(sorted({*known.layers, *kind.layers}))
            union[name] = _Kind(type=kind.type, layers=layers, has_mean=kind.has_mean)
    return dict(sorted(union.items()))


def _sums(metric: Metric | None, kind: _Kind) -> torch.Tensor:
    """Return totals and counts [C, 2]: one row, or one for each of the kind's layers."""
    match metric:
        case LayerMean():
            return metric.cells(kind.layers).T
        case Mean(total=total, count=count):
            return torch.stack([total, count])[None].double()
        case Sum(total=total):
            return torch.stack([total, torch.zeros_like(total)])[None].double()
    # Absent here, or a maximum, whose row stays zero: every rank reduces tensors of one shape.
    num_rows = len(kind.layers) if kind.type == "LayerMean" else 1
    return torch.zeros(num_rows, 2, dtype=torch.float64)


def _maximum(metric: Metric | None) -> torch.Tensor:
    maximum = metric.maximum if isinstance(metric, Max) else torch.tensor(-torch.inf)
    return maximum.double()
