"""Soft replay: implausible experts are replaced by live ones, once, in the forward."""

import numpy as np
import pytest
import replay_soft
import torch
from megatron_worlds import run_world
from oracles import soft_selection
from replay_cases import Case

from recipes.model.parallel import ParallelLayout
from routing_replay.config import ReplayConfig
from routing_replay.errors import ConfigError, ReplayError
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

CASES = {
    1: [
        Case(recompute="full"),
        Case(router="pre_softmax_scaled"),
        Case(router="sigmoid_bias", recompute="moe"),
        Case(router="groups", recompute="full"),
        Case(router="top_4", is_ragged=True),
    ],
    2: [
        Case(layout=ParallelLayout(tensor=2), recompute="full"),
        Case(layout=ParallelLayout(pipeline=2, virtual_pipeline=2), recompute="full"),
        Case(layout=ParallelLayout(expert=2), recompute="moe"),
    ],
}


def rule(**thresholds):
    from routing_replay.megatron.soft import SoftRule

    config = ReplayConfig(**{f"soft_{name}": value for name, value in thresholds.items()})
    return SoftRule.of(config, table_of([0]), weight_version=5)


def table_of(versions):
    ids_TLK = np.tile(np.array([0, 1], np.uint8), (len(versions), 1, 1))
    version_T = np.array(versions, np.int64)
    routes = Routes(expert_ids_TLK=ids_TLK, layers=(0,), num_experts=4, weight_version_T=version_T)
    return RouteTable.from_routes([routes])


@pytest.mark.parametrize(
    "thresholds",
    [
        {"ratio": 0.5},
        {"ratio": 1.0},
        {"mass": 0.6},
        {"margin": 0.4},
        {"ratio": 0.3, "mass": 0.4, "margin": 1.5},
    ],
)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (16, 4), (5, 5), (6, 1)])
def test_the_choice_is_the_naive_one_of_every_token(thresholds, num_experts, top_k):
    from routing_replay.megatron.soft import keep_plausible

    generator = torch.Generator().manual_seed(num_experts)
    probs_TE = (2 * torch.randn(300, num_experts, generator=generator)).softmax(-1)
    # A biased router chooses by other values than its probabilities.
    biased_TE = probs_TE + 0.1 * torch.randn(num_experts, generator=generator)
    live_TK = biased_TE.topk(top_k).indices
    replayed_TK = torch.rand(300, num_experts, generator=generator).topk(top_k).indices
    ids_TK, is_kept_TK = keep_plausible(probs_TE, replayed_TK, live_TK, rule(**thresholds))
    for token in range(300):
        arguments = (probs_TE[token].tolist(), replayed_TK[token].tolist(), live_TK[token].tolist())
        ids, kept = soft_selection(*arguments, **thresholds)
        assert (ids_TK[token].tolist(), is_kept_TK[token].tolist()) == (ids, kept)
        assert len(set(ids)) == top_k


def test_older_routes_are_held_to_a_stricter_ratio():
    # Age 0: 0.25; age 1: 0.25 ** 0.5; age 2: 0.25 ** 0.25.
    ratio_T = rule(ratio=0.25, decay=0.5).ratio_of(table_of([5, 4, 3]), np.array([0, 1, 2, -1]))
    np.testing.assert_allclose(ratio_T[:3], [0.25, 0.5, 0.25**0.25], rtol=1e-6)


@pytest.mark.parametrize("versions", [[5, -1], [5, 6]])
def test_a_row_of_unknown_age_is_refused_where_the_age_matters(versions):
    with pytest.raises(ReplayError, match=r"needs the age.*0..5; got -?\d \[row 1, memory\]"):
        rule(ratio=0.25, decay=0.5).ratio_of(table_of(versions), np.array([0, 1]))
    rule(ratio=0.25, decay=0.5).ratio_of(table_of(versions), np.array([0, -1]))
    assert rule(ratio=0.25).ratio_of(table_of(versions), np.array([0, 1])) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"soft_ratio": 1.5}, "soft_ratio of routing replay is out of range; expected 0 .. 1"),
        ({"soft_mass": -0.1}, "soft_mass of routing replay is out of range"),
        ({"soft_margin": float("nan")}, "soft_margin of routing replay is out of range"),
        ({"soft_ratio": 0.5, "soft_decay": 0.0}, "soft_decay of routing replay is out of range"),
        ({"soft_decay": 0.5}, "soft_decay has no ratio to change"),
        ({"soft_ratio": 0.5, "kernel": True}, "the replay kernel does not replay softly"),
        ({"weights": "frozen", "captured_routers": True}, "captured routers replay ids only"),
    ],
)
def test_thresholds_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ReplayConfig(**settings)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", CASES)
def test_every_forward_takes_the_plausible_experts_and_its_recomputation_the_same(num_ranks):
    results = run_world(replay_soft.soft_findings, num_ranks, CASES[num_ranks], timeout_s=500)
    assert [text for of_rank in results for text in of_rank] == []


def test_thresholds_that_keep_everything_or_nothing_are_hard_and_live_replay():
    [found] = run_world(replay_soft.one_kept_token, 1)
    assert found == {"all is hard": True, "none is stock": True}
