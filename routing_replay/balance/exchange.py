"""Exchanges of sequences between cells that lower the load of the busiest ranks."""

from __future__ import annotations

import numpy as np

from .cells import Cells

# Sequences of each of two cells whose exchanges are compared at once: 64 pairs keep the loads of
# 48 layers and 8 ranks in the cache.
TRIED = 8


def improve(cells: Cells, rounds: int, seed: int) -> None:
    """Exchange pairs of sequences between cells while that lowers the sum of their costs.

    Args:
        cells: Filled; changed in place.
        rounds: Exchanges that are tried for each sequence, on average over the cells.
        seed: Of the pairs.
    """
    generator = np.random.default_rng(seed)
    if cells.num_cells < 2:
        return
    num_tries = rounds * max(1, len(cells.lengths_S) // TRIED)
    for _ in range(num_tries):
        first, second = generator.choice(cells.num_cells, 2, replace=False).tolist()
        own, other = (_sample(cells, cell, generator) for cell in (first, second))
        pair = _best_pair(cells, first, second, own, other)
        if pair is not None:
            _exchange(cells, first, second, own[pair[0]], other[pair[1]])


def _sample(cells: Cells, cell: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Some sequences of a cell with their slots."""
    members = [(s, slot) for slot, ss in enumerate(cells.members[cell]) for s in ss]
    if len(members) <= TRIED:
        return members
    return [members[i] for i in generator.choice(len(members), TRIED, replace=False)]


def _best_pair(
    cells: Cells,
    first: int,
    second: int,
    own: list[tuple[int, int]],
    other: list[tuple[int, int]],
) -> tuple[int, int] | None:
    """Indices of the exchange that saves most; None if none saves."""
    a, b = np.array([s for s, _ in own]), np.array([s for s, _ in other])
    change_RABL = cells.loads_RSL[:, None, b] - cells.loads_RSL[:, a, None]
    cost_AB = np.zeros((len(a), len(b)))
    fits_AB = np.ones((len(a), len(b)), np.bool_)
    length_AB = cells.lengths_S[b][None] - cells.lengths_S[a][:, None]
    work_AB = cells.work_S[b][None] - cells.work_S[a][:, None]
    slots_a, slots_b = np.array([d for _, d in own]), np.array([d for _, d in other])
    for cell, sign, slots_AB in ((first, 1, slots_a[:, None]), (second, -1, slots_b[None])):
        busiest_ABL = (cells.loads_RCL[:, cell, None, None] + sign * change_RABL).max(0)
        cost_AB += cells.expert_s * busiest_ABL.sum(2)
        cost_AB += _busiest_work(cells.work_CD[cell], slots_AB, sign * work_AB)
        if cells.budget.tokens:
            tokens_AB = cells.tokens_CD[cell][slots_AB] + sign * length_AB
            fits_AB &= tokens_AB <= cells.budget.tokens
        if cells.budget.expert_tokens:
            fits_AB &= busiest_ABL.max(2, initial=0) <= cells.budget.expert_tokens
    cost_AB[~fits_AB] = np.inf
    best = int(cost_AB.argmin())
    before = cells.costs_of((first, second))
    # Sums of float32 round: what saves less than that may save nothing.
    if cost_AB.flat[best] >= before * (1 - 1e-6):
        return None
    return best // len(b), best % len(b)


def _busiest_work(work_D: np.ndarray, slots_AB: np.ndarray, change_AB: np.ndarray) -> np.ndarray:
    """The work of a cell's busiest slot after a change in one slot; [A, B]."""
    if len(work_D) == 1:
        only_AB: np.ndarray = work_D[0] + change_AB
        return only_AB
    second, first = np.partition(work_D, -2)[-2:]
    rest_D = np.where(np.arange(len(work_D)) == work_D.argmax(), second, first)
    result_AB: np.ndarray = np.maximum(rest_D[slots_AB], work_D[slots_AB] + change_AB)
    return result_AB


def _exchange(
    cells: Cells, first: int, second: int, own: tuple[int, int], other: tuple[int, int]
) -> None:
    for (sequence, slot), cell, (incoming, _) in ((own, first, other), (other, second, own)):
        members = cells.members[cell][slot]
        members[members.index(sequence)] = incoming
        cells.add(sequence, cell, slot, -1)
        cells.add(incoming, cell, slot)
