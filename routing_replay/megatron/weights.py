"""The rollout's combine weights in place of the router's own.

They replace the weights after the router is done, so normalisation, scaling and every score
function are the engine's. The map and the auxiliary losses stay Megatron's: the aux losses' own
gradients pass through, the gradient of the experts' outputs passes or ends here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import RoutesError, TableError
from ..routes.step_routes import StepRoutes

# A weight that was kept in bfloat16 is off by at most half a unit of its 8-bit significand, and so
# is a sum of them. Weights of another rule (not renormalised, not scaled) are further off.
SUM_SLACK = 2.0**-8


@dataclass(frozen=True, kw_only=True)
class WeightReplay:
    """How weights are replayed, and what those of one token must add up to.

    Args:
        passes_gradient: The router gets the gradient of the experts' outputs at its live weights
            (straight-through). Otherwise it gets none from them (frozen).
        smallest_sum: Of a token's weights.
        largest_sum: Equal to the smallest where the router renormalises.
    """

    passes_gradient: bool
    smallest_sum: float
    largest_sum: float

    @classmethod
    def of(cls, config: Any, passes_gradient: bool) -> WeightReplay:
        """Return the rule of a router: Megatron's TransformerConfig says how it normalises."""
        scale = float(config.moe_router_topk_scaling_factor or 1.0)
        function = config.moe_router_score_function
        if function == "softmax":
            is_normalised = not config.moe_router_pre_softmax
        else:
            is_normalised = config.moe_router_topk > 1
        largest = np.inf if function == "sqrtsoftplus" and not is_normalised else scale
        return cls(
            passes_gradient=passes_gradient,
            smallest_sum=scale if is_normalised else 0.0,
            largest_sum=float(largest),
        )

    def gather(self, table: StepRoutes, layers: tuple[int, ...], rows_T: np.ndarray) -> np.ndarray:
        """Return the checked weights [L, T, K] of a microbatch; rows of -1 hold anything.

        Raises:
            TableError: The table holds no weights.
            RoutesError: Weights that this router's rule cannot give.
        """
        weights_LTK = table.gather_weights(layers, rows_T)
        if weights_LTK is None:
            raise TableError(
                "the routes have no combine weights",
                expected="weights beside the ids",
                got="ids alone",
                where=table.where,
                fix="Capture them (level weights), or replay ids with weights='live'",
            )
        sums_LT = weights_LTK.sum(-1)
        is_right_LT = sums_LT >= self.smallest_sum * (1 - SUM_SLACK)
        is_right_LT &= sums_LT <= self.largest_sum * (1 + SUM_SLACK)  # nan is neither
        is_wrong_LT = ~is_right_LT & (rows_T >= 0)
        if is_wrong_LT.any():
            self._refuse(table, layers, rows_T, sums_LT, np.argwhere(is_wrong_LT))
        return weights_LTK

    def _refuse(
        self,
        table: StepRoutes,
        layers: tuple[int, ...],
        rows_T: np.ndarray,
        sums_LT: np.ndarray,
        wrong_N2: np.ndarray,
    ) -> None:
        index, token = wrong_N2[0]
        is_fixed = self.smallest_sum == self.largest_sum
        low, high = f"{self.smallest_sum:g}", f"{self.largest_sum:g}"
        raise RoutesError(
            f"combine weights of {len(wrong_N2)} tokens and layers break the router's rule",
            expected=f"weights that add up to {low if is_fixed else f'{low} .. {high}'}",
            got=f"{sums_LT[index, token]:g}",
            where=f"row {rows_T[token]}, layer {layers[index]}, {table.where}",
            fix="Compare the trainer's moe_router_topk_scaling_factor, moe_router_pre_softmax and "
            "score function with the model that the server runs",
        )


def replace_weights(
    probs_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    is_replayed_T: torch.Tensor | None,
    passes_gradient: bool,
) -> torch.Tensor:
    """Return the router's weights with those of replayed tokens replaced.

    Args:
        probs_TE: Combine weights of the router, 0 where an expert is not selected.
        ids_TK: int64 experts, distinct in each row; for replayed tokens those of `probs_TE`.
        weights_TK: Their weights, of any float dtype.
        is_replayed_T: bool, the tokens to replace; None for all.
        passes_gradient: As in `WeightReplay`.
    """
    weighted_TE: torch.Tensor = _Replacement.apply(
        probs_TE, ids_TK, weights_TK, is_replayed_T, passes_gradient
    )
    return weighted_TE


class _Replacement(torch.autograd.Function):
    """Other values forward; backward the gradient as it comes, or none where values are others."""

    @staticmethod
    def forward(
        ctx: Any,
        probs_TE: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        is_replayed_T: torch.Tensor | None,
        passes_gradient: bool,
    ) -> torch.Tensor:
        weights_TK = weights_TK.to(probs_TE.dtype)
        if is_replayed_T is not None:
            own_TK = probs_TE.gather(1, ids_TK)
            weights_TK = torch.where(is_replayed_T[:, None], weights_TK, own_TK)
        ctx.is_replayed_T, ctx.passes_gradient = is_replayed_T, passes_gradient
        return probs_TE.scatter(1, ids_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TE: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        # Zeros, not None: what Megatron hung onto these weights (aux losses) waits for a gradient.
        if ctx.passes_gradient:
            return grad_TE, None, None, None, None
        if ctx.is_replayed_T is None:
            return torch.zeros_like(grad_TE), None, None, None, None
        return grad_TE.masked_fill(ctx.is_replayed_T[:, None], 0.0), None, None, None, None
