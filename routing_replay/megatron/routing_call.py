"""A router call as the replay kernel sees it: the logits, before any score or selection."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    group_limited_topk,
    topk_routing_with_score_function,
)

from .selection import LiveTopK, Selection

if TYPE_CHECKING:
    from ..kernels.router import RoutingRule

Routed = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class RoutingCall:
    """Arguments of one call of Megatron's `topk_routing_with_score_function`.

    Args:
        logits_TE: Router logits.
        top_k: Experts per token.
        options: All other arguments, by Megatron's names.
    """

    logits_TE: torch.Tensor
    top_k: int
    options: dict[str, Any]

    @classmethod
    def of(cls, logits_TE: torch.Tensor, top_k: int, options: dict[str, Any]) -> RoutingCall:
        """Return the call with Megatron's defaults for the options that it left out."""
        bound = inspect.signature(topk_routing_with_score_function).bind_partial(**options)
        bound.apply_defaults()
        return cls(logits_TE=logits_TE, top_k=top_k, options=bound.arguments)

    def stock(self, may_fuse: bool) -> Routed:
        """Return Megatron's weights and map; only the unfused function asks the seam."""
        options = self.options | {"fused": may_fuse and self.options["fused"]}
        routed: Routed = topk_routing_with_score_function(self.logits_TE, self.top_k, **options)
        return routed

    @property
    def expert_bias_E(self) -> torch.Tensor | None:
        """Added to independent scores for the selection, as float32; softmax routers have none."""
        bias_E: torch.Tensor | None = self.options["expert_bias"]
        is_used = bias_E is not None and self.options["score_function"] != "softmax"
        return bias_E.float() if bias_E is not None and is_used else None

    def rule(self) -> RoutingRule:
        """Return the kernel's form of the options."""
        from ..kernels.router import RoutingRule

        return RoutingRule(
            top_k=self.top_k,
            score_function=self.options["score_function"],
            use_pre_softmax=self.options["use_pre_softmax"],
            num_groups=self.options["num_groups"],
            group_top_k=self.options["group_topk"],
            scaling_factor=self.options["scaling_factor"],
        )

    def replay(self, ids_TK: torch.Tensor, is_live_T: torch.Tensor | None) -> Routed:
        """Return weights and map of the given experts, in one kernel.

        Args:
            ids_TK: Compact ids; the rows of live tokens are overwritten with their selection.
            is_live_T: Tokens to select anew; None for none.
        """
        from ..kernels.router import replay_routing

        return replay_routing(
            self.logits_TE,
            ids_TK,
            self.rule(),
            is_live_T=is_live_T,
            expert_bias_E=self.expert_bias_E,
        )


class LiveLogits(LiveTopK):
    """The stock selection of a call that the kernel served; its scores are computed if asked for.

    Args:
        call: The router call.
    """

    def __init__(self, call: RoutingCall):
        self._call = call
        self.top_k = call.top_k
        self.num_groups = call.options["num_groups"]
        self.group_top_k = call.options["group_topk"]
        self.stock = _top_k

    @functools.cached_property
    @torch.no_grad()
    def scores_TE(self) -> torch.Tensor:  # type: ignore[override]
        """What Megatron would have passed to its top-k."""
        logits_TE, options = self._call.logits_TE, self._call.options
        if options["score_function"] == "softmax":
            if options["use_pre_softmax"]:
                return logits_TE.softmax(-1, dtype=torch.float32)
            return logits_TE
        if options["score_function"] == "sigmoid":
            scores_TE = logits_TE.float().sigmoid()
        else:
            scores_TE = torch.nn.functional.softplus(logits_TE.float()).sqrt()
        bias_E = self._call.expert_bias_E
        return scores_TE if bias_E is None else scores_TE + bias_E


def _top_k(
    scores_TE: torch.Tensor, top_k: int, num_groups: int | None, group_top_k: int | None
) -> Selection:
    """Megatron's own selection, which is a closure there."""
    if group_top_k:
        selection: Selection = group_limited_topk(
            scores_TE, top_k, *scores_TE.shape, num_groups, group_top_k
        )
        return selection
    return torch.topk(scores_TE, top_k, dim=1, sorted=torch.is_grad_enabled())
