"""Talk to SGLang servers: sample with routes, check a server, load new weights.

Needs aiohttp, not SGLang. Importing this package loads neither; the first use of a name loads what
it needs. Its names:

- `RolloutClient`, `ClientOptions`: send batches of requests to one or several servers.
- `GenerateRequest`, `Completion`: a request and its answer, with routes and log-probs.
- `Conversation`, `sample_of`: an agent's turns, and the trajectories that they make.
- `request_fields`, `completion_of`, `decode`: the same for an HTTP client of your own.
- `probe`, `ProbeReport`: prove, before a job starts, that a server returns true routes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..routes.payload import decode
    from .client import RolloutClient
    from .conversation import Conversation, sample_of
    from .options import ClientOptions
    from .probing import ProbeReport, probe
    from .requests import Completion, GenerateRequest, completion_of, request_fields
    from .session import Session, SharedSession

__all__ = [
    "ClientOptions",
    "Completion",
    "Conversation",
    "GenerateRequest",
    "ProbeReport",
    "RolloutClient",
    "Session",
    "SharedSession",
    "completion_of",
    "decode",
    "probe",
    "request_fields",
    "sample_of",
]

_MODULES = {
    "ClientOptions": ".options",
    "Completion": ".requests",
    "Conversation": ".conversation",
    "GenerateRequest": ".requests",
    "ProbeReport": ".probing",
    "RolloutClient": ".client",
    "Session": ".session",
    "SharedSession": ".session",
    "completion_of": ".requests",
    "decode": "..routes.payload",
    "probe": ".probing",
    "request_fields": ".requests",
    "sample_of": ".conversation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
