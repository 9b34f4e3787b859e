"""`kernel=True` at one router: Megatron's own `routing`, a real pass, no model and no ranks."""

import types

import numpy as np
import torch
from megatron.core.transformer.moe.router import TopKRouter
from replay_cases import ROUTERS

from routing_replay.errors import ReplayError
from routing_replay.megatron.attachment import Attachment
from routing_replay.megatron.passes import LiveRecord
from routing_replay.megatron.replaying_pass import ReplayingPass
from routing_replay.megatron.routers import RouterEntry, RouterSeam
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

EXPERTS, TOP_K, TOKENS = 16, 4, 40


class Tracker:
    """Says which pass runs; a test moves it on to the recomputation."""

    def __init__(self, forward_pass):
        self.forward_pass, self.is_recompute = forward_pass, False

    def find(self):
        return self.forward_pass, self.is_recompute


def router_of(fields):
    """A TopKRouter with what its `routing` reads; building one needs process groups."""
    router = TopKRouter.__new__(TopKRouter)
    torch.nn.Module.__init__(router)
    unset = ("num_groups", "group_topk", "topk_scaling_factor")
    defaults = {f"moe_router_{name}": None for name in unset} | {
        "num_moe_experts": EXPERTS,
        "moe_router_pre_softmax": False,
        "moe_router_fusion": False,
        "moe_expert_capacity_factor": None,
        "moe_z_loss_coeff": None,
    }
    router.config = types.SimpleNamespace(**(defaults | fields))
    router.topk, router.routing_type = TOP_K, "none"
    router.score_function = fields.get("moe_router_score_function", "softmax")
    router.enable_expert_bias = fields.get("moe_router_enable_expert_bias", False)
    router.expert_bias = torch.linspace(-0.3, 0.3, EXPERTS) if router.enable_expert_bias else None
    router.local_tokens_per_expert = torch.zeros(EXPERTS)
    router.router_replay = None
    router.is_aux_loss_enabled = lambda: False
    return router


def random_table():
    """31 tokens of one sequence, every fifth row uncovered."""
    shape = MoEShape(layers=(0,), num_experts=EXPERTS, top_k=TOP_K)
    table = RouteTable.empty(shape, [31], source="rollout")
    scores = np.random.default_rng(0).random((1, table.num_rows, EXPERTS))
    table.expert_ids_LTK[:] = scores.argsort(-1)[..., :TOP_K]
    table.covered_T[:] = np.arange(table.num_rows) % 5 != 4
    return table


def passed(fields, logits_TE, has_kernel):
    """Weights, maps and gradients of forward and recomputation, and what else a pass leaves."""
    table, router = random_table(), router_of(fields)
    rows_T = np.full(TOKENS, -1)
    rows_T[: table.num_rows] = np.where(table.covered_T, np.arange(table.num_rows), -1)
    forward_pass = ReplayingPass(
        number=0,
        chunk=0,
        layers=(0,),
        rows_T=rows_T,
        table=table,
        num_experts=EXPERTS,
        device=logits_TE.device,
        record=LiveRecord((0,), EXPERTS),
    )
    attachment = Attachment.__new__(Attachment)
    attachment.step, attachment.watcher = types.SimpleNamespace(dispatch=None), None
    attachment._has_captured = False
    attachment._tracker = Tracker(forward_pass)
    entry = RouterEntry(router=router, chunk=0, layer=0, name="router")
    seam = RouterSeam(entry, attachment._select)
    seam.install()
    if has_kernel:
        seam.take_over(attachment._route)
    routed = []
    for attachment._tracker.is_recompute in (False, True):
        leaf_TE = logits_TE.clone().requires_grad_()
        weights_TE, map_TE = router.routing(leaf_TE.view(TOKENS, 1, EXPERTS))
        (weights_TE * torch.linspace(-1, 1, EXPERTS)).square().sum().backward()
        routed.append((weights_TE.detach(), map_TE, leaf_TE.grad))
    recorded_TK = forward_pass.recorded()[0].clone()
    num_replayed = forward_pass.num_replayed(0)
    forward_pass.close()
    try:
        router.routing(logits_TE.view(TOKENS, 1, EXPERTS))
        is_late_refused = False
    except ReplayError:
        is_late_refused = True
    seam.hand_back()
    is_stock = "routing" not in vars(router)
    counts = (num_replayed, is_late_refused, is_stock)
    return routed, counts, recorded_TK, router.local_tokens_per_expert


def check_seam(device, router, dtype):
    """The kernel in the router's place against the torch form in it; what is wrong comes back."""
    generator = torch.Generator().manual_seed(1)
    logits_TE = (2 * torch.randn(TOKENS, EXPERTS, generator=generator)).to(dtype)
    fields = ROUTERS[router]
    torch_form, kernel = (passed(fields, logits_TE, has_kernel) for has_kernel in (False, True))
    wrong = []
    for when, one, other in zip(("forward", "recompute"), torch_form[0], kernel[0], strict=True):
        if not torch.equal(one[1], other[1]):
            wrong.append(f"map of the {when}")
        for name, values, ours in (("weights", one[0], other[0]), ("gradient", one[2], other[2])):
            # Values up to 3; float32 sums of a few terms in another order.
            if not torch.allclose(values, ours, rtol=1e-5, atol=2e-6):
                wrong.append(f"{name} of the {when}: {(values - ours).abs().max():.1e}")
    # 30 rows of 31 tokens, a fifth of them uncovered.
    if not torch_form[1] == kernel[1] == (24, True, True):
        wrong.append(f"{torch_form[1]} and {kernel[1]}")
    if not torch.equal(torch_form[2], kernel[2]):
        wrong.append("recorded live experts")
    if not torch.equal(torch_form[3], kernel[3]):
        wrong.append("loads that move the expert bias")
    return wrong
