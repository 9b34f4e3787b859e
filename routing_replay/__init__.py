"""Routing replay for MoE reinforcement learning: train the expert path that was sampled.

Importing this package loads nothing else. Each name is loaded when it is first touched: `attach`
loads Megatron-Core, the other names need numpy only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .balance import plan
    from .config import ReplayConfig
    from .errors import (
        CheckpointError,
        ConfigError,
        DataError,
        ObjectiveError,
        PayloadError,
        PreflightError,
        ReplayError,
        RoutesError,
        RoutingReplayError,
        ServerError,
        TableError,
    )
    from .megatron import attach
    from .routes.part_index import PartIndex
    from .routes.parts import PartedTable, open_table, write_parts
    from .routes.routes import Routes
    from .routes.shape import MoEShape
    from .routes.spans import Sample, Span, Trajectory
    from .routes.table import RouteTable

_MODULES = {
    "ReplayConfig": "config",
    "MoEShape": "routes.shape",
    "PartIndex": "routes.part_index",
    "PartedTable": "routes.parts",
    "RouteTable": "routes.table",
    "Routes": "routes.routes",
    "Sample": "routes.spans",
    "Span": "routes.spans",
    "Trajectory": "routes.spans",
    "attach": "megatron",
    "open_table": "routes.parts",
    "plan": "balance",
    "write_parts": "routes.parts",
}
_SUBPACKAGES = (
    "adapters",
    "analysis",
    "balance",
    "cli",
    "kernels",
    "megatron",
    "metrics",
    "objectives",
    "report",
    "rollout",
    "routes",
    "sglang",
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MoEShape",
    "ObjectiveError",
    "PartIndex",
    "PartedTable",
    "PayloadError",
    "PreflightError",
    "ReplayConfig",
    "ReplayError",
    "RouteTable",
    "Routes",
    "RoutesError",
    "RoutingReplayError",
    "Sample",
    "ServerError",
    "Span",
    "TableError",
    "Trajectory",
    "__version__",
    "attach",
    "open_table",
    "plan",
    "write_parts",
]


def __getattr__(name: str) -> Any:
    """Load a public name or a subpackage on its first use (PEP 562)."""
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES.get(name, 'errors')}", __name__), name)
    globals()[name] = value  # the next use skips this function
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBPACKAGES})
