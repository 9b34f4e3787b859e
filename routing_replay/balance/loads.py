"""Tokens that a step sends to each expert, from the counts of its sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import TableError
from ..routes.step_routes import StepRoutes
from .placement import Placement


@dataclass(frozen=True, kw_only=True, eq=False)
class StepLoads:
    """Counts of a step's sequences, and the tokens whose experts nobody knows yet.

    Args:
        counts_SLE: Unsigned integers, tokens of a sequence that select an expert.
        lengths_S: int64, tokens of each sequence that the model is fed with.
        unknown_S: int64, those of them without a covered row: they will be routed live. They count
            as their layer's average token.
    """

    counts_SLE: np.ndarray
    lengths_S: np.ndarray
    unknown_S: np.ndarray

    @classmethod
    def of(
        cls, routes: StepRoutes | np.ndarray, lengths: np.ndarray, top_k: int | None = None
    ) -> StepLoads:
        """Return the loads of a table, or of its counts.

        Args:
            routes: The table, or `table.expert_counts()`.
            lengths: Tokens of each sequence, prompt and response; the last one is not fed.
            top_k: Of the model; needed beside counts.

        Raises:
            TableError: Another number of sequences, or more covered rows than tokens.
        """
        fed_S = np.asarray(lengths, np.int64) - 1
        if isinstance(routes, StepRoutes):
            counts_SLE, top_k = routes.expert_counts(), routes.shape.top_k
        else:
            counts_SLE = np.asarray(routes)
        if counts_SLE.ndim != 3 or fed_S.shape != counts_SLE.shape[:1]:
            raise TableError(
                "the lengths are not those of the counted sequences",
                expected=f"{len(counts_SLE)} lengths",
                got=fed_S.shape,
            )
        if top_k is None:
            raise TableError("counts alone do not say their top-k", fix="Pass top_k=")
        covered_S = np.zeros_like(fed_S)
        if counts_SLE.shape[1]:
            covered_S = counts_SLE[:, 0].sum(1, dtype=np.int64) // top_k
        wrong = np.flatnonzero(covered_S > fed_S)
        if len(wrong):
            raise TableError(
                "a sequence has more routes than tokens that are fed to the model",
                expected=f"at most {fed_S[wrong[0]]} covered rows",
                got=int(covered_S[wrong[0]]),
                where=f"sequence {wrong[0]}",
                fix="Pass the tokens of prompt and response of each sequence",
            )
        return cls(counts_SLE=counts_SLE, lengths_S=fed_S, unknown_S=fed_S - covered_S)

    @property
    def num_layers(self) -> int:
        return int(self.counts_SLE.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.counts_SLE.shape[2])

    @property
    def num_unknown(self) -> int:
        """Tokens that are counted as their layer's average."""
        return int(self.unknown_S.sum())

    def average_LE(self) -> np.ndarray:
        """Return how often an average covered token selects each expert; float64 [L, E]."""
        total_LE = self.counts_SLE.sum(0, dtype=np.int64)
        num_covered = int((self.lengths_S - self.unknown_S).sum())
        if not num_covered:  # nothing is known: all experts alike
            return np.full(total_LE.shape, 1 / max(1, self.num_experts))
        average_LE: np.ndarray = total_LE / num_covered
        return average_LE

    def by_expert(self, sequences: list[int] | np.ndarray) -> np.ndarray:
        """Return the tokens of some sequences for each expert; float64 [L, E]."""
        numbers = np.asarray(sequences)
        is_run = len(numbers) > 1 and bool((np.diff(numbers) == 1).all())
        # A slice of the counts is not copied.
        picked: Any = slice(int(numbers[0]), int(numbers[-1]) + 1) if is_run else numbers
        known_LE = self.counts_SLE[picked].sum(0, dtype=np.int64)
        unknown = int(self.unknown_S[sequences].sum())
        loads_LE: np.ndarray = known_LE.astype(np.float64)
        return loads_LE + unknown * self.average_LE() if unknown else loads_LE

    def by_rank(self, *placements: Placement) -> list[np.ndarray]:
        """Return, for each placement, the tokens of each sequence for each rank; float32 [R, S, L].

        Ranks come first: a maximum over them then runs over whole vectors. One call for several
        placements reads the counts once.
        """
        num_ranks = [placement.num_ranks for placement in placements]
        loads_RSL = np.empty((sum(num_ranks), *self.counts_SLE.shape[:2]), np.float32)
        average_LE = self.average_LE() if self.num_unknown else None
        for layer in range(self.num_layers):
            is_on_ER = np.hstack([placement.is_on_rank_ER(layer) for placement in placements])
            # A product of matrices adds 20 times faster than sums over picked columns.
            loads_SR = self.counts_SLE[:, layer].astype(np.float32) @ is_on_ER
            if average_LE is not None:
                loads_SR += np.outer(self.unknown_S, average_LE[layer] @ is_on_ER)
            loads_RSL[:, :, layer] = loads_SR.T
        return np.split(loads_RSL, np.cumsum(num_ranks)[:-1])
