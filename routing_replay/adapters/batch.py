"""`StepBatch`: the sequences of one pass as a framework holds them, and R2's memory of them.

Rows are numbered by the batch alone, before any table exists: the framework lays out these numbers
with its own function, as it lays out tokens, and 0 pads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import ReplayError, RoutesError
from ..routes.origin import Origin
from ..routes.shape import MoEShape
from ..routes.table import RouteTable
from .content import ContentIndex
from .routes import Routed, routes_of, sequences


class StepBatch:
    """This data-parallel rank's sequences of a pass, alike on all ranks beside it.

    Pass the same object again for passes over the same sequences: its table is made once.

    Args:
        tokens: Prompt and response tokens of each sequence, without padding.
        routed: The rollout's routes of each, in any form of `routes_of`; None: the framework
            carries none, which R2 does not need.
        missing: An id that stands for "no route" in them.

    Raises:
        RoutesError: Tokens that are no lines of integers, or routes of another number of sequences.
    """

    def __init__(
        self,
        tokens: Sequence[Any],
        routed: Sequence[Routed] | None = None,
        missing: int | None = None,
    ):
        self.tokens = sequences(tokens)
        self.routed = routed
        self.missing = missing
        self._table: RouteTable | None = None
        if routed is not None and len(routed) != len(self.tokens):
            raise RoutesError(
                "tokens and routes are of different numbers of sequences",
                expected=len(self.tokens),
                got=len(routed),
                fix="Filter, truncate and repeat both alike",
            )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(tokens) for tokens in self.tokens]

    def numbers(self) -> list[torch.Tensor]:
        """Return for each sequence the row of each token plus 1; int64 [n] on the CPU.

        The last token has 0, as padding: no engine fed it to the model.
        """
        numbers, start = [], 1
        for length in self.lengths:
            numbers.append(torch.arange(start, start + length))
            numbers[-1][-1:] = 0
            start += max(length - 1, 0)
        return numbers

    def table(self, shape: MoEShape) -> RouteTable:
        """Return the rollout's routes of the sequences (R3).

        Raises:
            ReplayError: The framework carries no routes.
            PayloadError, RoutesError: A sequence's routes cannot be true; its number is named.
        """
        if self.routed is None:
            raise ReplayError(
                "a batch of the actor has no routes: its tokens would route live, unnoticed",
                expected="the rollout's routes beside the tokens",
                got="none",
                fix="Turn on the framework's capture for every rollout, or use mode R2",
            )
        if self._table is None:
            pairs = zip(self.tokens, self.routed, strict=True)
            self._table = RouteTable.from_routes(
                [routes_of(routed, len(tokens), shape, self.missing) for tokens, routed in pairs]
            )
        return self._table


class RecordedRoutes:
    """R2: routes of the old policy's passes, found again by the tokens of a sequence.

    Mini-batches of the update may take the sequences in another order than the old policy's pass.
    Rows on which equal sequences disagree route live, and coverage counts them.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[RouteTable, list[np.ndarray]]] = []
        self._index: ContentIndex | None = None

    def add(self, table: RouteTable, tokens: Sequence[np.ndarray]) -> None:
        """Add a recorded pass; the first one after an update starts anew."""
        if self._index is not None:
            self._parts.clear()
            self._index = None
        self._parts.append((table, list(tokens)))

    def table(self, batch: StepBatch) -> RouteTable:
        """Return the recorded routes of a batch's sequences.

        Raises:
            ReplayError: Nothing was recorded, or not a sequence of the batch.
        """
        if not self._parts:
            raise ReplayError(
                "no pass of the old policy was recorded: R2 has no routes to replay",
                expected="a pass over the actor's old log-probs before the update",
                got="an update",
                fix="Let the framework recompute old log-probs in the trainer, or use mode R3",
            )
        if self._index is None:
            self._index = self._build()
        index = self._index
        found = [self._rows(index, number, t) for number, t in enumerate(batch.tokens)]
        rows_T = np.concatenate(found)
        table = RouteTable.empty(index.table.shape, batch.lengths)
        layers = table.shape.layers
        is_covered_T = rows_T >= 0
        table.expert_ids_LTK[:, is_covered_T] = index.table.gather(layers, rows_T[is_covered_T])
        table.covered_T[:] = is_covered_T
        table.origin_T[is_covered_T] = Origin.PREFILL
        return table

    @staticmethod
    def _rows(index: ContentIndex, number: int, tokens: np.ndarray) -> np.ndarray:
        fed_T = tokens[:-1]
        rows_T: np.ndarray = index.rows(fed_T[None])[0]
        if len(rows_T) and index.sequence_of(fed_T) is None:
            raise ReplayError(
                "a sequence of the update was not in the old policy's pass",
                expected="the tokens of a recorded sequence",
                got=f"{len(tokens)} other tokens",
                where=f"sequence {number}",
                fix="Pad and truncate the sequences alike in both passes",
            )
        return rows_T

    def _build(self) -> ContentIndex:
        """One table of the sequences that were recorded; a part may hold others' empty rows."""
        table, tokens = self._parts[0]
        if len(self._parts) == 1 and table.num_rows and table.covered_T.all():
            return ContentIndex(table, np.concatenate([t[:-1] for t in tokens]))
        routes, fed = [], []
        for table, tokens in self._parts:
            for one, tokens_T in zip(table.sequences(), tokens, strict=True):
                if one.covered_T.any():
                    routes.append(one)
                    fed.append(tokens_T[:-1])
        if not routes:
            raise ReplayError(
                "the old policy's pass recorded no row",
                expected="at least one sequence of two tokens",
                fix="Announce the microbatches of that pass with their own rows",
            )
        return ContentIndex(RouteTable.from_routes(routes, "training"), np.concatenate(fed))
