"""Combine weights as the engine used them: the factors of the experts' outputs in a layer's sum.

SGLang's routers renormalise, and most backends scale, before `_post_process_topk_ids`; the columns
of the routed experts pass it unchanged. Where the scaling comes later, on the layer's sum, it is
multiplied in here: a trainer knows one factor for each expert only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class RouterArguments:
    """What SGLang's post-processing of a selection is called with.

    Args:
        logits_TE: Router logits; no rows where a kernel scored and selected at once.
        weights_TX: Combine weights of the routed experts, then of fused shared experts.
        topk_config: SGLang's `TopKConfig` of the layer.
    """

    logits_TE: torch.Tensor
    weights_TX: torch.Tensor
    topk_config: Any


class CombineWeights:
    """One step's combine weights of all layers, float32 on the device, allocated once.

    Args:
        ids_TLX: SGLang's own buffer of a step's ids: its tokens, layers and device.
        top_k: Routed experts per token.
    """

    def __init__(self, ids_TLX: torch.Tensor, top_k: int):
        # float32 as the routers compute them; narrower ones widen without loss.
        shape = (*ids_TLX.shape[:2], top_k)
        self.step_TLK = torch.zeros(shape, dtype=torch.float32, device=ids_TLX.device)

    @property
    def device_bytes(self) -> int:
        return self.step_TLK.nbytes

    def write(self, layer: int, num_tokens: int, router: RouterArguments | None) -> None:
        """Write one layer's weights of the step, nan where they are unknown.

        Runs inside CUDA graphs: static shapes and no sync.
        """
        weights_TK = self.step_TLK[:num_tokens, layer]
        if router is None:  # a router that reports its ids past the post-processing
            weights_TK.fill_(torch.nan)
            return
        weights_TK.copy_(router.weights_TX[:, : weights_TK.shape[1]])
        scale = later_scale(router.topk_config)
        if scale != 1.0:
            weights_TK.mul_(scale)


def later_scale(topk_config: Any) -> float:
    """Return the factor with which the engine scales the experts' sum after these weights."""
    factor = topk_config.routed_scaling_factor
    is_applied = topk_config.apply_routed_scaling_factor_on_output
    return 1.0 if factor is None or is_applied else float(factor)
