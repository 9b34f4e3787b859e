"""One patch: a router's `routing` calls a function of ours in place of Megatron's.

`TopKRouter.routing` calls the module's `topk_routing_with_score_function`, and around it does what
must stay: z-loss, aux losses, the counts behind the expert bias. So the router gets Megatron's own
code with that one name bound to ours, as an attribute of the instance; the module and every other
router keep theirs.

Upstream: no seam takes over the weights (`router_replay` is asked for a top-k only, and not at all
by fused routers). Delete this file when one does.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter

from ..errors import PreflightError

NAME = "topk_routing_with_score_function"
# What we read; later versions added `dense_output` and `precomputed_indices`, which routing leaves.
_ARGUMENTS = (
    "logits",
    "topk",
    "use_pre_softmax",
    "num_groups",
    "group_topk",
    "scaling_factor",
    "score_function",
    "expert_bias",
    "fused",
    "router_replay",
)

Route = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def require(router: TopKRouter) -> None:
    """Raise PreflightError if this Megatron routes in a way that the patch was not written for."""
    stock = type(router).routing
    arguments = tuple(inspect.signature(topk_routing_with_score_function).parameters)
    is_known = (
        inspect.isfunction(stock)
        and NAME in stock.__code__.co_names
        and set(_ARGUMENTS) <= set(arguments)
    )
    if not is_known:
        raise PreflightError(
            "the replay kernel does not know this router",
            expected=f"{type(router).__name__}.routing that calls {NAME}({', '.join(_ARGUMENTS)})",
            got=f"{stock} and {NAME}({', '.join(arguments)})",
            fix="Leave `kernel` off: the torch form replays on every supported version",
        )


def install(router: TopKRouter, route: Route) -> None:
    """Let this router's `routing` call `route` with the arguments of Megatron's function."""
    stock = type(router).routing
    patched = types.FunctionType(
        stock.__code__,
        {**stock.__globals__, NAME: route},
        stock.__name__,
        stock.__defaults__,
        stock.__closure__,
    )
    router.routing = types.MethodType(patched, router)


def remove(router: TopKRouter) -> None:
    """Make the router stock again."""
    vars(router).pop("routing", None)
