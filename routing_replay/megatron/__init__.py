"""Routing replay on the model chunks of a stock Megatron job.

Importing this package loads no Megatron and changes nothing: `attach` and the types do, when they
are first touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .receipt import Receipt
    from .recording import Recording
    from .replay import Replay, attach

__all__ = ["Receipt", "Recording", "Replay", "attach"]

_MODULES = {"Receipt": "receipt", "Recording": "recording", "Replay": "replay", "attach": "replay"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
