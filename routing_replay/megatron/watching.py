"""What `replay.watching` shows of each router call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .passes import ForwardPass
from .routers import RouterSeam
from .selection import LiveTopK


@dataclass(frozen=True, kw_only=True)
class RouterCall:
    """One router call of an announced forward; recomputations are not shown.

    Args:
        seam: Which router, of which layer.
        live: What the router would select.
        ids_TK: int64 experts that the tokens take, on the router's device.
        forward_pass: The pass, alike for all layers of a chunk and microbatch. Its `rows_T` are the
            tokens' rows in the step's table.
    """

    seam: RouterSeam
    live: LiveTopK
    ids_TK: torch.Tensor
    forward_pass: ForwardPass


class Watcher(Protocol):
    """Sees router calls; it runs inside the forward, so it must not make the host wait."""

    def see(self, call: RouterCall) -> None: ...
