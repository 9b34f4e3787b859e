"""Typed metrics, what is measured with them, and where they are written."""

from .load import expert_load
from .sinks import open_sinks
from .typed import (
    LayerMean,
    LayerValues,
    Max,
    Mean,
    Metric,
    Sum,
    Value,
    all_reduce,
    merge,
    to_floats,
)

__all__ = [
    "LayerMean",
    "LayerValues",
    "Max",
    "Mean",
    "Metric",
    "Sum",
    "Value",
    "all_reduce",
    "expert_load",
    "merge",
    "open_sinks",
    "to_floats",
]
