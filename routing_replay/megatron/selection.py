"""The mathematics of replay: only the selection changes.

The router's own scores are gathered at the replayed experts, and Megatron normalises, scales and
scatters them as always. So every score function keeps its meaning, and the router its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.moe.moe_utils import group_limited_topk

from ..metrics.agreement import router_probs

if TYPE_CHECKING:
    from .routers import RouterSeam

Selection = tuple[torch.Tensor, torch.Tensor]


class LiveTopK:
    """The stock selection of one router call, for all tokens or for some of them.

    Args:
        scores_TE: What Megatron passes to its top-k (logits, probabilities, or biased scores).
        top_k: Experts per token.
        num_groups: Groups of group-limited routing, or None.
        group_top_k: Groups per token, or None.
        stock: Megatron's own `default_compute_topk`.
    """

    def __init__(
        self,
        scores_TE: torch.Tensor,
        top_k: int,
        num_groups: int | None,
        group_top_k: int | None,
        stock: Callable[..., Selection],
    ):
        self.scores_TE = scores_TE
        self.top_k = top_k
        self.num_groups = num_groups
        self.group_top_k = group_top_k
        self.stock = stock

    def __call__(self) -> Selection:
        """Return scores and ids of every token, exactly as without replay."""
        return self.stock(self.scores_TE, self.top_k, self.num_groups, self.group_top_k)

    @torch.no_grad()
    def ids_of(self, tokens_M: torch.Tensor) -> torch.Tensor:
        """Return ids [M, K] of some tokens; top-k works row by row, so they equal the full call's.

        On CUDA, torch.topk changes its algorithm with the number of rows from 400 experts on, so
        exact ties in bfloat16 may break otherwise there.
        """
        scores_ME = self.scores_TE.detach()[tokens_M]
        if not self.group_top_k:
            return self.stock(scores_ME, self.top_k, self.num_groups, self.group_top_k)[1]
        # Megatron's closure has the number of all tokens built in; the function beneath has not.
        return group_limited_topk(
            scores_ME, self.top_k, *scores_ME.shape, self.num_groups, self.group_top_k
        )[1]


def select(scores_TE: torch.Tensor, ids_TK: torch.Tensor, keep_slots: bool) -> Selection:
    """Return scores and ids of the given experts; gradients flow into the scores.

    Args:
        scores_TE: What the live router would select from.
        ids_TK: int64 ids.
        keep_slots: Leave the slots in the given order. Otherwise they are put into the stock
            order of a training pass, descending score, so that sums over slots round alike.
    """
    if not keep_slots:
        with torch.no_grad():
            order_TK = scores_TE.gather(1, ids_TK).argsort(dim=1, descending=True, stable=True)
            ids_TK = ids_TK.gather(1, order_TK)
    return scores_TE.gather(1, ids_TK), ids_TK


def probabilities(seam: RouterSeam, scores_XE: torch.Tensor) -> torch.Tensor:
    """Return the router's distribution over all experts, from what Megatron passes to its top-k."""
    router = seam.router
    if router.score_function == "softmax":
        form = "probs" if router.config.moe_router_pre_softmax else "logits"
        return router_probs(scores_XE, form)
    return router_probs(scores_XE, "scores", router.expert_bias)
