"""What is open between the start of a `recording` or `replaying` block and its end."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..errors import ReplayError
from ..metrics.agreement import LayerAgreement
from ..routes.table import RouteTable
from .passes import LivePass, Pass
from .recording import Recording


@dataclass(kw_only=True)
class Scope:
    """One `recording` or `replaying` block: its passes, and at its end its receipt."""

    num_rows: int
    table: RouteTable | None = None
    recorded: Recording | None = None
    agreement: LayerAgreement | None = None
    passes: list[Pass] = field(default_factory=list)

    def replayed_passes(self) -> list[Pass]:
        """Those that promise something: all but the live ones."""
        return [p for p in self.passes if not isinstance(p, LivePass)]

    def check_passes(self, num_chunks: int, rank: int) -> None:
        """Raise ReplayError unless every chunk ran for every microbatch, and at least one did."""
        passes = self.replayed_passes()
        numbers = [sum(p.chunk == chunk for p in passes) for chunk in range(num_chunks)]
        if not passes or min(numbers) != max(numbers):
            raise ReplayError(
                "not every model chunk ran for every microbatch of the scope",
                expected="the same number of microbatches, at least 1, for each chunk",
                got=f"{numbers} for chunks 0..{len(numbers) - 1}",
                where=f"rank {rank}",
                fix="Run the whole schedule inside the scope",
            )


@dataclass(kw_only=True)
class Microbatch:
    """What `replay.microbatch` announced, until the model has run."""

    rows_BS: np.ndarray
    counts_BS: np.ndarray | None
    is_live: bool = False
    chunks: set[int] = field(default_factory=set)
