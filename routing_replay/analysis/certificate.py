"""A certificate of one batch: does replay change anything, and are the engines exact?

Engines can be made exact, at a price of 10 to 34 % of their speed in published figures
(docs/high_kl.md). Where they are, live routes are the rollout's, and replay is a no-op.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..routes.table import RouteTable
from .arms import ScoredArms

CHUNK_ROWS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Counts of one batch.

    Args:
        num_rows: Rows that both tables cover, times layers.
        num_differing_rows: Of these, whose sets of experts differ.
        num_tokens: Response tokens.
        num_unchanged: Of these, whose log-prob is bitwise the same with live and replayed routes.
        num_exact: Of these, whose log-prob with live routing is bitwise the engine's.
        num_exact_replayed: The same in the arm that is closest to the rollout.
        is_whole: Whether live routes were recorded: without them rows are unknown.
    """

    num_rows: int
    num_differing_rows: int
    num_tokens: int
    num_unchanged: int
    num_exact: int
    num_exact_replayed: int
    is_whole: bool

    @property
    def is_no_op(self) -> bool:
        """Whether replay changed nothing: no route, and no bit of a log-prob."""
        is_same = self.num_unchanged == self.num_tokens and self.num_differing_rows == 0
        return self.is_whole and is_same

    @property
    def is_exact(self) -> bool:
        """Whether the engines agree bitwise without replay."""
        return self.num_exact == self.num_tokens

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"is_no_op": self.is_no_op, "is_exact": self.is_exact}

    def text(self) -> str:
        """Return the certificate for people."""
        rows = f"{self.num_differing_rows} of {self.num_rows}" if self.is_whole else "not recorded"
        share = f"of {self.num_tokens} tokens"
        verdict = "replay changed something"
        if self.is_no_op:
            verdict = "replay was a no-op"
        if self.is_exact:
            verdict += "; the engines are exact without it"
        return "\n".join(
            [
                f"certificate: {verdict}",
                "",
                f"  rows and layers whose experts differ   {rows}",
                f"  bitwise equal, live and replayed       {self.num_unchanged} {share}",
                f"  bitwise the engine's, live             {self.num_exact} {share}",
                f"  bitwise the engine's, replayed         {self.num_exact_replayed} {share}",
            ]
        )


def certify(arms: ScoredArms, table: RouteTable, live: RouteTable | None) -> Certificate:
    """Return the certificate of a batch.

    Args:
        arms: With "live" and "routes".
        table: The rollout's routes.
        live: The trainer's own routes of the same rows; None if they were not recorded.
    """
    mask_N, mu_N = arms.batch.mask_N, arms.batch.logp_mu_N

    def equal(one_N: torch.Tensor, other_N: torch.Tensor) -> int:
        return int(((one_N == other_N) & mask_N).sum())

    num_rows, num_differing = (0, 0) if live is None else differing_rows(table, live)
    return Certificate(
        num_rows=num_rows,
        num_differing_rows=num_differing,
        num_tokens=int(mask_N.sum()),
        num_unchanged=equal(arms["live"].logp_N, arms["routes"].logp_N),
        num_exact=equal(arms["live"].logp_N, mu_N),
        num_exact_replayed=equal(arms[arms.base].logp_N, mu_N),
        is_whole=live is not None,
    )


def differing_rows(table: RouteTable, other: RouteTable) -> tuple[int, int]:
    """Return how many rows times layers both tables cover, and how many differ as sets."""
    other.check_shape(table.shape)
    rows_R = np.flatnonzero(table.covered_T & other.covered_T)
    num_differing = 0
    for start in range(0, len(rows_R), CHUNK_ROWS):
        rows_C = rows_R[start : start + CHUNK_ROWS]
        sorted_pair = [np.sort(t.gather(t.shape.layers, rows_C), axis=-1) for t in (table, other)]
        num_differing += int((sorted_pair[0] != sorted_pair[1]).any(-1).sum())
    return len(rows_R) * len(table.shape.layers), num_differing
