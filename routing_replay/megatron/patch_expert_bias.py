"""One patch: dispatched tokens are counted right under a padding mask, while replay is attached.

megatron-core counts the tokens of every expert to move its bias. With a padding mask it combines
the map [tokens, experts] with the mask [tokens], which fails, or, with as many tokens as experts,
counts wrongly without a word. We mask the map ourselves and hand it to the stock function.

Upstream: NVIDIA/Megatron-LM issue 6111, fixed by pull request 6114, after 0.19.2. Delete this file
with the support of 0.19; on later versions it does nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from megatron.core.transformer.moe.router import TopKRouter
from packaging.version import Version

from ..errors import PreflightError
from .preflight import installed_version

FIXED_IN = Version("0.20")
_SIGNATURE = ["self", "routing_map", "padding_mask"]


def install(router: TopKRouter, is_active: Callable[[], bool]) -> None:
    """Count masked maps right on this router, whenever `is_active`; stock otherwise.

    Raises:
        PreflightError: Megatron's function is not the one that this patch was written for.
    """
    if not router.enable_expert_bias or installed_version() >= FIXED_IN:
        return
    signature = list(inspect.signature(TopKRouter._apply_expert_bias).parameters)
    if signature != _SIGNATURE:
        raise PreflightError(
            "this megatron-core counts expert loads in another way",
            expected=f"TopKRouter._apply_expert_bias({', '.join(_SIGNATURE)})",
            got=signature,
            fix="Install one of the tested versions, or train without a padding mask",
        )
    router._apply_expert_bias = functools.partial(_count, router, is_active)


def remove(router: TopKRouter) -> None:
    """Make the router stock again."""
    vars(router).pop("_apply_expert_bias", None)


def _count(
    router: TopKRouter,
    is_active: Callable[[], bool],
    routing_map: torch.Tensor,
    padding_mask: torch.Tensor | None = None,
) -> None:
    if padding_mask is not None and is_active():
        routing_map, padding_mask = routing_map & ~padding_mask.reshape(-1, 1), None
    TopKRouter._apply_expert_bias(router, routing_map, padding_mask)
