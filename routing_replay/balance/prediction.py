"""What a packing and a placement will dispatch, and what the step costs by it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .cost import CostModel
from .loads import StepLoads
from .packing import Packing


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """Loads of a step's cells: minibatch by minibatch, microbatch by microbatch, group by group.

    Args:
        loads_CLR: float64, tokens of each cell for each layer and expert-parallel rank.
        minibatch_C, group_C: int64, where the cells are.
        features: Busiest ranks' tokens over layers and microbatches, tokens of the busiest
            data-parallel ranks, their squared lengths, microbatches: what `CostModel` weighs. Of
            the group of experts that has most.
    """

    loads_CLR: np.ndarray
    minibatch_C: np.ndarray
    group_C: np.ndarray
    features: np.ndarray

    @classmethod
    def of(
        cls, loads: StepLoads, packing: Packing, loads_RSL: np.ndarray, cost: CostModel
    ) -> Prediction:
        """Return the prediction of a step.

        Args:
            loads: Of its sequences.
            packing: Where the sequences are.
            loads_RSL: Of `loads.by_rank`.
            cost: Finds the group of experts that takes longest.
        """
        cells = [
            (minibatch, number % packing.layout.num_groups, sequences)
            for minibatch in range(packing.num_minibatches)
            for number, sequences in enumerate(packing.cells(minibatch))
        ]
        loads_CLR = np.stack([loads_RSL[:, s].sum(1, dtype=np.float64).T for _, _, s in cells])
        group_C = np.array([group for _, group, _ in cells])
        return cls(
            loads_CLR=loads_CLR,
            minibatch_C=np.array([minibatch for minibatch, _, _ in cells]),
            group_C=group_C,
            features=_features(loads, packing, loads_CLR, group_C, cost),
        )

    @property
    def busiest_CL(self) -> np.ndarray:
        """Tokens of the busiest rank in each cell and layer."""
        busiest_CL: np.ndarray = self.loads_CLR.max(2)
        return busiest_CL

    @property
    def peak_over_mean_L(self) -> np.ndarray:
        """Busiest rank's tokens over the mean rank's, summed over the cells; 1 is balanced."""
        mean_L = self.loads_CLR.mean(2).sum(0)
        peak_over_mean_L: np.ndarray = self.busiest_CL.sum(0) / np.maximum(mean_L, 1e-30)
        return peak_over_mean_L

    @property
    def peak_over_mean(self) -> float:
        """The same over all layers."""
        return float(self.busiest_CL.sum() / max(float(self.loads_CLR.mean(2).sum()), 1e-30))

    @property
    def most_expert_tokens(self) -> int:
        """The largest number of tokens on one rank in one layer of one cell."""
        return int(np.ceil(self.loads_CLR.max(initial=0)))


def _features(
    loads: StepLoads,
    packing: Packing,
    loads_CLR: np.ndarray,
    group_C: np.ndarray,
    cost: CostModel,
) -> np.ndarray:
    """The features of the group of experts that takes longest; float64 [4]."""
    busiest_C = loads_CLR.max(2).sum(1)
    size = packing.layout.ranks_per_group
    features = []
    for group in range(packing.layout.num_groups):
        tokens = squares = count = 0.0
        for ranks in packing.bins:
            for bins in zip(*ranks[group * size : (group + 1) * size], strict=True):
                parts = [loads.lengths_S[list(one)] for one in bins]
                longest = max(parts, key=lambda part_S: float(cost.work(part_S).sum()))
                tokens += float(longest.sum())
                squares += float(np.square(longest, dtype=np.float64).sum())
                count += 1
        busiest = float(busiest_C[group_C == group].sum())
        features.append(np.array([busiest, tokens, squares, count]))
    return max(features, key=cost.seconds)


def lower_bound_L(loads: StepLoads, num_ranks: int) -> np.ndarray:
    """Return a load that no packing and no placement can go below, over the mean; [L].

    The busiest rank has at least the mean, and at least what the rank of the heaviest expert has:
    that expert and as many of the lightest ones as share a rank with it.
    """
    total_LE = np.sort(loads.by_expert(np.arange(len(loads.lengths_S))), axis=1)
    mean_L = np.maximum(total_LE.sum(1) / num_ranks, 1e-30)
    num_local = loads.num_experts // num_ranks
    heaviest_L = total_LE[:, -1] + total_LE[:, : num_local - 1].sum(1)
    bound_L: np.ndarray = np.maximum(1.0, heaviest_L / mean_L)
    return bound_L
