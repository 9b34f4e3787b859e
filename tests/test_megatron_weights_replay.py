"""The rollout's combine weights in place of the router's (the matrix holds them exact)."""

from types import SimpleNamespace

import numpy as np
import pytest
import replay_weights
import torch
from megatron_worlds import run_world

from routing_replay.errors import ConfigError, PreflightError, RoutesError, TableError
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

ROUTER = {
    "moe_router_topk_scaling_factor": None,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_topk": 2,
}


def rule(**config):
    from routing_replay.megatron.weights import WeightReplay

    return WeightReplay.of(SimpleNamespace(**ROUTER | config), passes_gradient=False)


def table_of(weights_TK):
    weights_TLK = np.array(weights_TK, np.float32)[:, None]
    ids_TLK = np.zeros(weights_TLK.shape, np.uint8)
    ids_TLK[..., 1] = 3
    routes = Routes(
        expert_ids_TLK=ids_TLK, layers=(4,), num_experts=8, combine_weights_TLK=weights_TLK
    )
    return RouteTable.from_routes([routes])


@pytest.mark.parametrize(
    ("config", "weights_K", "is_right"),
    [
        ({}, [0.75, 0.25], True),
        ({}, [0.7516, 0.2504], True),  # rounded to bfloat16
        ({}, [0.6, 0.3], False),  # not renormalised
        ({"moe_router_topk_scaling_factor": 2.5}, [0.75, 0.25], False),  # scaled elsewhere
        ({"moe_router_topk_scaling_factor": 2.5}, [1.5, 1.0], True),
        ({"moe_router_pre_softmax": True}, [0.4, 0.1], True),
        ({"moe_router_pre_softmax": True}, [0.9, 0.2], False),
        ({"moe_router_score_function": "sigmoid"}, [0.9, 0.8], False),
        ({"moe_router_score_function": "sigmoid"}, [0.6, 0.4], True),
    ],
)
def test_weights_add_up_to_what_the_routers_rule_says(config, weights_K, is_right):
    table = table_of([[0.5, 0.5], weights_K])
    # Row 0 may be wrong where no token names it.
    if is_right:
        rule(**config).gather(table, (4,), np.array([1, -1]))
        return
    with pytest.raises(RoutesError, match=r"break the router's rule.*\[row 1, layer 4, memory\]"):
        rule(**config).gather(table, (4,), np.array([1, -1]))


def test_routes_without_weights_are_refused_where_weights_are_replayed():
    routes = Routes(expert_ids_TLK=np.array([[[0, 1]]], np.uint8), layers=(4,), num_experts=8)
    with pytest.raises(TableError, match="no combine weights.*Capture them .level weights."):
        rule().gather(RouteTable.from_routes([routes]), (4,), np.array([0]))


@pytest.mark.parametrize("passes_gradient", [False, True])
def test_values_are_the_rollouts_and_the_gradient_passes_or_ends(passes_gradient):
    from routing_replay.megatron.weights import replace_weights

    probs_TE = torch.tensor([[0.0, 0.6, 0.4, 0.0], [0.3, 0.0, 0.0, 0.7]], requires_grad=True)
    ids_TK, weights_TK = torch.tensor([[2, 1], [0, 1]]), torch.tensor([[0.1, 0.9], [0.5, 0.5]])
    is_replayed_T = torch.tensor([True, False])
    got_TE = replace_weights(probs_TE, ids_TK, weights_TK, is_replayed_T, passes_gradient)
    # Token 0: expert 2 (slot 0) takes 0.1, expert 1 takes 0.9; token 1 is live.
    assert torch.equal(got_TE, torch.tensor([[0.0, 0.9, 0.1, 0.0], [0.3, 0.0, 0.0, 0.7]]))
    upstream_TE = torch.arange(1.0, 9.0).view(2, 4)
    got_TE.backward(upstream_TE)
    first_E = upstream_TE[0] if passes_gradient else torch.zeros(4)
    assert torch.equal(probs_TE.grad, torch.stack([first_E, upstream_TE[1]]))


def test_mode_r2_has_no_weights_to_replay():
    from routing_replay.config import ReplayConfig

    with pytest.raises(ConfigError, match="mode R2 replays no weights"):
        ReplayConfig(mode="R2", weights="frozen")
    with pytest.raises(ConfigError, match="mode R2 replays no weights"):
        ReplayConfig(mode="auto", weights="frozen").resolve(2)
    with pytest.raises(ConfigError, match="straight_through"):
        ReplayConfig(weights="straight_trough")


def test_a_frozen_router_gets_the_gradient_of_its_auxiliary_loss_alone():
    [largest] = run_world(replay_weights.without_router_gradient, 1)
    assert largest["softmax frozen"] == 0 < largest["softmax straight_through"]
    assert 0 < largest["aux_loss frozen"] < largest["aux_loss straight_through"]


def test_weights_in_a_router_with_an_adapter_are_refused():
    from routing_replay.megatron.routers import RouterEntry, require_own_forward

    name = "decoder.layers.3.mlp.router"
    require_own_forward(RouterEntry(router=None, chunk=0, layer=3, name=name))
    with pytest.raises(PreflightError, match=r"a router with an adapter.*\[layer 3\]"):
        require_own_forward(RouterEntry(router=None, chunk=0, layer=3, name=f"{name}.to_wrap"))
