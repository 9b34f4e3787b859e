"""The replay router against Megatron's own functions; runs where the kernel runs."""

import numpy as np
import oracles_kernels
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from replay_cases import ROUTERS
from router_kernel_checks import error_of, is_as_exact, tokens_of

from routing_replay.kernels.router import RoutingRule, replay_routing
from routing_replay.megatron.selection import LiveTopK, select

ARGUMENTS = {  # of Megatron's function, by the field of its configuration
    "moe_router_pre_softmax": "use_pre_softmax",
    "moe_router_num_groups": "num_groups",
    "moe_router_group_topk": "group_topk",
    "moe_router_topk_scaling_factor": "scaling_factor",
    "moe_router_score_function": "score_function",
}


class Seam:
    """Replays ids as `ReplayingPass` does, the marked tokens live."""

    def __init__(self, ids_TK, live_tokens_F):
        self.ids_TK, self.live_tokens_F = ids_TK, live_tokens_F

    def get_replay_topk(self, scores, topk, num_groups, group_topk, stock):
        live = LiveTopK(scores, topk, num_groups, group_topk, stock)
        ids_MK = live.ids_of(self.live_tokens_F)
        ids_TK = self.ids_TK.index_copy(0, self.live_tokens_F, ids_MK)
        return select(scores, ids_TK, keep_slots=True)


def inputs(num_experts, top_k, dtype, device):
    """Logits distinct within each row, exact in every dtype: no tie decides a selection."""
    generator = np.random.default_rng(num_experts + top_k)
    shape = (tokens_of(num_experts), num_experts)
    logits_TE = (generator.random(shape).argsort(1) - num_experts // 2) / 32
    ids_TK = generator.random(shape).argsort(1)[:, :top_k]
    grad_TE = torch.from_numpy(generator.standard_normal(shape))
    bias_E = torch.from_numpy(0.3 * generator.standard_normal(num_experts)).float()
    is_live_T = torch.from_numpy(np.arange(shape[0]) % 4 == 3)
    logits_TE, ids_TK = torch.from_numpy(logits_TE), torch.from_numpy(ids_TK)
    tensors = (logits_TE.to(dtype), ids_TK, grad_TE.to(dtype), bias_E, is_live_T)
    return [tensor.to(device) for tensor in tensors]


def check_router(device, router, num_experts, dtype, top_k=None):
    """Map, weights and gradient of the kernel, against stock Megatron with our selection."""
    fields = ROUTERS[router]
    top_k = top_k or fields.get("moe_router_topk", 4)
    arguments = {ours: fields[name] for name, ours in ARGUMENTS.items() if name in fields}
    logits_TE, ids_TK, grad_TE, bias_E, is_live_T = inputs(num_experts, top_k, dtype, device)
    bias_E = bias_E if "moe_router_enable_expert_bias" in fields else None

    stock_logits_TE = logits_TE.clone().requires_grad_()
    seam = Seam(ids_TK, is_live_T.nonzero().flatten())
    stock_TE, stock_map_TE = topk_routing_with_score_function(
        stock_logits_TE, top_k, expert_bias=bias_E, router_replay=seam, **arguments
    )
    stock_TE.backward(grad_TE)

    our_logits_TE = logits_TE.clone().requires_grad_()
    group_top_k = arguments.pop("group_topk", None)
    rule = RoutingRule(top_k=top_k, group_top_k=group_top_k, **arguments)
    compact_TK = ids_TK.to(torch.uint8 if num_experts <= 256 else torch.int16)
    options = {"is_live_T": is_live_T, "expert_bias_E": bias_E}
    weights_TE, map_TE = replay_routing(our_logits_TE, compact_TK, rule, **options)
    weights_TE.backward(grad_TE)

    exact_logits_TE = logits_TE.double().requires_grad_()
    exact_TE = oracles_kernels.combine_weights(exact_logits_TE, compact_TK.long(), rule)
    exact_TE.backward(grad_TE.double())
    wrong = [] if torch.equal(map_TE, stock_map_TE) else ["map"]
    for name, ours, stock, exact in (
        ("weights", weights_TE, stock_TE, exact_TE.detach()),
        ("gradient", our_logits_TE.grad, stock_logits_TE.grad, exact_logits_TE.grad),
    ):
        error, own_error = error_of(ours, exact), error_of(stock, exact)
        if ours.dtype != stock.dtype or not is_as_exact(error, own_error, exact):
            wrong.append((name, error, own_error))
    return wrong
