"""The cells of a minibatch while sequences are put into them.

A cell is one microbatch of one group of experts: the sequences of its data-parallel ranks meet at
the group's experts, so a layer of the cell takes as long as its busiest expert-parallel rank. A
slot is the part of a cell that one data-parallel rank feeds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .budget import Budget


@dataclass(kw_only=True, eq=False)
class Cells:
    """The cells of one minibatch while they are filled.

    Args:
        loads_RSL: float32, tokens of each sequence for each expert-parallel rank and layer.
        lengths_S: Tokens of each sequence.
        work_S: Seconds of each sequence outside the experts.
        budget: Of a bin.
        num_slots: Bins of a cell.
        num_cells: Cells of the minibatch.
        expert_s: Seconds for a token on the busiest rank.
    """

    loads_RSL: np.ndarray
    lengths_S: np.ndarray
    work_S: np.ndarray
    budget: Budget
    num_slots: int
    num_cells: int
    expert_s: float
    members: list[list[list[int]]] = field(init=False)

    def __post_init__(self) -> None:
        num_ranks, _, num_layers = self.loads_RSL.shape
        shape = (self.num_cells, self.num_slots)
        self.loads_RCL = np.zeros((num_ranks, self.num_cells, num_layers), np.float32)
        self.tokens_CD, self.work_CD = np.zeros(shape, np.int64), np.zeros(shape)
        self.count_CD = np.zeros(shape, np.int64)
        self.members = [[[] for _ in range(self.num_slots)] for _ in range(self.num_cells)]

    def costs(self) -> np.ndarray:
        """Return the seconds of each cell: busiest rank of each layer, and busiest slot."""
        return np.array([self.costs_of((cell,)) for cell in range(self.num_cells)])

    def costs_of(self, cells: tuple[int, ...]) -> float:
        """Return the seconds of some cells together."""
        chosen = list(cells)
        busiest_CL = self.loads_RCL[:, chosen].max(0)
        return self.expert_s * float(busiest_CL.sum()) + float(self.work_CD[chosen].max(1).sum())

    def fill(self) -> bool:
        """Put every sequence, longest first, where its cell stays cheapest; False if one fits none.

        Longest first, least loaded: Graham's rule for machines (1969), on vectors of loads.
        """
        order = np.lexsort((np.arange(len(self.lengths_S)), -self.lengths_S))
        for number, sequence in enumerate(order.tolist()):
            if not self._put(sequence, len(order) - number):
                return False
        return True

    def add(self, sequence: int, cell: int, slot: int, sign: int = 1) -> None:
        """Add a sequence's loads to a bin, or take them away; `members` are the caller's."""
        self.loads_RCL[:, cell] += sign * self.loads_RSL[:, sequence]
        self.tokens_CD[cell, slot] += sign * self.lengths_S[sequence]
        self.work_CD[cell, slot] += sign * self.work_S[sequence]
        self.count_CD[cell, slot] += sign

    def _put(self, sequence: int, num_left: int) -> bool:
        fits_CD = self._fits(sequence, num_left)
        loads_RCL = self.loads_RCL + self.loads_RSL[:, sequence, None]
        busiest_CL = loads_RCL.max(0)
        fits_C = fits_CD.any(1)
        if self.budget.expert_tokens:
            fits_C &= busiest_CL.max(1, initial=0) <= self.budget.expert_tokens
        if not fits_C.any():
            return False
        # The slot with the least work, then the fewest tokens: without a cost of work all tie.
        key_CD = self.work_CD * 1e9 + self.tokens_CD
        slot_C = np.where(fits_CD, key_CD, np.inf).argmin(1)
        work_C = np.maximum(
            self.work_CD.max(1),
            self.work_CD[np.arange(self.num_cells), slot_C] + self.work_S[sequence],
        )
        cost_C = self.expert_s * busiest_CL.sum(1) + work_C
        cell = int(np.where(fits_C, cost_C, np.inf).argmin())
        self.members[cell][slot_C[cell]].append(sequence)
        self.add(sequence, cell, int(slot_C[cell]))
        return True

    def _fits(self, sequence: int, num_left: int) -> np.ndarray:
        fits_CD = np.ones(self.count_CD.shape, np.bool_)
        if self.budget.tokens:
            fits_CD &= self.tokens_CD + self.lengths_S[sequence] <= self.budget.tokens
        if self.budget.sequences:
            fits_CD &= self.count_CD < self.budget.sequences
        is_empty_CD = self.count_CD == 0
        if num_left <= int(is_empty_CD.sum()):  # no bin may stay empty
            fits_CD &= is_empty_CD
        return fits_CD
