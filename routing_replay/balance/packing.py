"""Which sequences share a microbatch and a data-parallel rank: those of one bin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from .budget import Budget
from .cells import Cells
from .cost import CostModel
from .exchange import improve
from .layout import PlanLayout

Bins = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The microbatches of every minibatch on every data-parallel rank.

    Args:
        bins: `bins[minibatch][data_rank][microbatch]` are sequences of the step, ascending.
        layout: The parallel sizes.
    """

    bins: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]
    layout: PlanLayout

    @property
    def num_minibatches(self) -> int:
        return len(self.bins)

    def microbatches(self, minibatch: int, data_rank: int) -> list[tuple[int, ...]]:
        """Return the sequences of a rank's microbatches."""
        return list(self.bins[minibatch][data_rank])

    def dispatch(
        self, counts_SLE: np.ndarray, group: int, minibatches: Sequence[int] | None = None
    ) -> np.ndarray:
        """Return how many tokens with routes a group of experts gets.

        Args:
            counts_SLE: Of the step's table.
            group: Number of the group: data-parallel rank // `layout.ranks_per_group`.
            minibatches: Whose microbatches, in this order; all if None.

        Returns:
            int64 [M, L, E], by the model's own expert ids.

        Raises:
            ConfigError: Groups that share sequences by position: only an estimate is known.
        """
        if not self.layout.has_whole_sequences:
            raise ConfigError(
                "groups of experts share sequences by position: their exact counts are not known",
                expected="expert * expert_tensor of at least tensor * context ranks",
                got=self.layout,
            )
        numbers = range(self.num_minibatches) if minibatches is None else minibatches
        cells = [cell for minibatch in numbers for cell in self.cells(minibatch, group)]
        return np.stack([counts_SLE[sequences].sum(0, dtype=np.int64) for sequences in cells])

    def sizes(
        self, counts_SLE: np.ndarray, group: int, minibatches: Sequence[int] | None = None
    ) -> np.ndarray:
        """Return what each data-parallel rank of a group of experts sends; arguments as `dispatch`.

        Returns:
            int64 [M, D, L, E], D being `layout.ranks_per_group`.
        """
        numbers = range(self.num_minibatches) if minibatches is None else minibatches
        size = self.layout.ranks_per_group
        ranks = range(group * size, (group + 1) * size)
        bins = [
            [self.bins[number][rank][m] for rank in ranks]
            for number in numbers
            for m in range(len(self.bins[number][0]))
        ]
        return np.stack(
            [[counts_SLE[list(one)].sum(0, dtype=np.int64) for one in by_rank] for by_rank in bins]
        )

    def cells(self, minibatch: int, group: int = -1) -> list[list[int]]:
        """Return the sequences of every cell of a minibatch, microbatch by microbatch.

        Args:
            minibatch: Its number.
            group: Only the cells of this group of experts; -1: of all groups.
        """
        ranks, size = self.bins[minibatch], self.layout.ranks_per_group
        groups = range(self.layout.num_groups) if group < 0 else [group]
        return [
            [s for rank in ranks[g * size : (g + 1) * size] for s in rank[m]]
            for m in range(len(ranks[0]))
            for g in groups
        ]


def in_order(lengths_S: np.ndarray, order: np.ndarray, budget: Budget, layout: PlanLayout) -> Bins:
    """Return bins that take the sequences in an order: the first bin in which each fits.

    Raises:
        ConfigError: They do not fit the number of microbatches.
    """
    for count in budget.counts_of_microbatches(lengths_S, layout):
        bins = _first_fit(lengths_S, order, budget, count * layout.data)
        if bins is not None:
            return bins
    raise _does_not_fit(budget, lengths_S, layout)


def _first_fit(
    lengths_S: np.ndarray, order: np.ndarray, budget: Budget, num_bins: int
) -> Bins | None:
    # Without a budget of sequences or tokens, equal shares are the only bound.
    most = budget.sequences or (0 if budget.tokens else math.ceil(len(order) / num_bins))
    bins: Bins = [[] for _ in range(num_bins)]
    tokens_B, count_B = np.zeros(num_bins, np.int64), np.zeros(num_bins, np.int64)
    for number, sequence in enumerate(order.tolist()):
        fits_B = np.ones(num_bins, np.bool_)
        if budget.tokens:
            fits_B &= tokens_B + lengths_S[sequence] <= budget.tokens
        if most:
            fits_B &= count_B < most
        if len(order) - number <= int((count_B == 0).sum()):
            fits_B &= count_B == 0
        if not fits_B.any():
            return None
        chosen = int(fits_B.argmax())
        bins[chosen].append(sequence)
        tokens_B[chosen] += lengths_S[sequence]
        count_B[chosen] += 1
    return bins


def deal(bins: Bins, layout: PlanLayout) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Return a minibatch's bins by data-parallel rank: bin b is of rank b modulo their number."""
    return tuple(
        tuple(tuple(sorted(one)) for one in bins[rank :: layout.data])
        for rank in range(layout.data)
    )


def pack(
    loads_RSL: np.ndarray,
    lengths_S: np.ndarray,
    budget: Budget,
    layout: PlanLayout,
    cost: CostModel,
    rounds: int,
    seed: int,
) -> Bins:
    """Return bins of a minibatch with little load on the busiest ranks; bin b is of rank b % data.

    Args:
        loads_RSL: float32, tokens of each sequence for each expert-parallel rank and layer.
        lengths_S: Tokens of each sequence.
        budget: Of a bin.
        layout: The parallel sizes.
        cost: Seconds of tokens on the busiest rank and outside the experts.
        rounds: Exchanges that each cell tries, for each of its sequences.
        seed: Of the exchanges that are tried.

    Raises:
        ConfigError: The sequences do not fit.
    """
    budget.check(lengths_S)
    for count in budget.counts_of_microbatches(lengths_S, layout):
        cells = Cells(
            loads_RSL=loads_RSL,
            lengths_S=lengths_S,
            work_S=cost.work(lengths_S),
            budget=budget,
            num_slots=layout.ranks_per_group,
            num_cells=count * layout.num_groups,
            expert_s=cost.expert_s,
        )
        if cells.fill():
            improve(cells, rounds, seed)
            return _by_rank(cells, layout)
    raise _does_not_fit(budget, lengths_S, layout)


def _by_rank(cells: Cells, layout: PlanLayout) -> Bins:
    """The bins so that bin b is of rank b % data; costly cells are spread over the groups."""
    order = np.lexsort((np.arange(cells.num_cells), -cells.costs()))
    bins: Bins = []
    # Back and forth over the groups, so that none gets the costlier cell of every round.
    for number, start in enumerate(range(0, cells.num_cells, layout.num_groups)):
        row = order[start : start + layout.num_groups]
        for cell in row if number % 2 == 0 else row[::-1]:
            bins += cells.members[cell]
    return bins


def _does_not_fit(
    budget: Budget, lengths_S: Sequence[int] | np.ndarray, layout: PlanLayout
) -> ConfigError:
    return ConfigError(
        "the minibatch does not fit the layout and the budget",
        expected=f"a sequence for each microbatch of {layout.data} data-parallel ranks, within "
        f"{budget}",
        got=f"{len(lengths_S)} sequences, {int(np.sum(lengths_S))} tokens",
        fix="Raise the budget, or take fewer data-parallel ranks or larger minibatches",
    )
