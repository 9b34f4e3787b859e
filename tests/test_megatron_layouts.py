"""Recorded in one parallel layout and microbatch split, replayed in another: the same routes.

One world per number of ranks computes everything (`replay_layouts.run`); the tests read it.
"""

import functools
import tempfile

import numpy as np
import pytest
import torch
from megatron_worlds import run_world
from replay_layouts import LENGTHS, PLANS, STARTS, UNCOVERED
from tiny_models import tiny_qwen3_moe

# Two float32 forwards that sum in different orders; log-probs of size about 5. A token with a wrong
# expert is off by far more: the test of drawn routes shows it.
TOLERANCE = 5e-5
# One chunk of pp2-vpp2 has no expert at all: layer 1 is dense.
SHAPE = {"layers": 4, "hidden": 64, "head_dim": 16, "dense_layers": (1,)}
# Four ranks cost a world of their own: only in `make test-matrix`.
CASES = [
    pytest.param(n, plan.name, marks=[pytest.mark.slow] * (n > 2))
    for n in PLANS
    for plan in PLANS[n]
]
each_plan = pytest.mark.parametrize(("num_ranks", "plan"), CASES)


@functools.cache
def world(num_ranks):
    with tempfile.TemporaryDirectory() as out:
        folder = str(tiny_qwen3_moe(**SHAPE))
        return run_world("replay_layouts:run", num_ranks, folder, out, num_ranks, timeout_s=900)


def results(num_ranks, plan):
    """The plan's results, and those of the plan that recorded; alike on every rank."""
    of_ranks = [found[plan] for found in world(num_ranks)]
    for found in of_ranks[1:]:
        assert torch.equal(found["replayed"], of_ranks[0]["replayed"])
    return of_ranks[0], world(num_ranks)[0][PLANS[num_ranks][0].name]


def error(one, other):
    return (one - other).abs().max().item()


@each_plan
def test_every_router_dispatched_exactly_the_recorded_rows(num_ranks, plan):
    found, _ = results(num_ranks, plan)
    assert found["wrong"] == dict.fromkeys(found["wrong"], 0) and len(found["wrong"]) == 3


@each_plan
def test_replayed_log_probs_are_those_of_the_recording_pass(num_ranks, plan):
    found, recorded = results(num_ranks, plan)
    assert error(found["replayed"], recorded["recording"]) < TOLERANCE
    assert error(found["trained"], recorded["recording"]) < TOLERANCE


@each_plan
def test_every_layout_records_the_same_table(num_ranks, plan):
    found, recorded = results(num_ranks, plan)
    # 3 routed layers, a row for every token but each sequence's last.
    assert found["own_ids"].shape[:2] == (3, sum(LENGTHS) - len(LENGTHS))
    assert np.array_equal(found["own_ids"], recorded["own_ids"])
    assert np.array_equal(found["live_ids_under_drawn"], recorded["live_ids_under_drawn"])


@each_plan
def test_drawn_routes_give_the_same_log_probs_and_uncovered_tokens_route_live(num_ranks, plan):
    found, recorded = results(num_ranks, plan)
    assert error(found["drawn"], recorded["drawn"]) < TOLERANCE
    gaps = (found["drawn"] - recorded["recording"]).abs()
    uncovered = slice(STARTS[UNCOVERED], STARTS[UNCOVERED] + LENGTHS[UNCOVERED])
    assert gaps[uncovered].max() < TOLERANCE
    # What the tolerance must resolve: other routes move nearly every other log-prob far more.
    gaps[uncovered] = torch.nan
    assert (gaps[~gaps.isnan()] > 100 * TOLERANCE).float().mean() > 0.95


@each_plan
def test_the_receipts_of_all_ranks_add_up_to_the_table(num_ranks, plan):
    for found in (of_rank[plan] for of_rank in world(num_ranks)):
        # 3 routed layers; every covered row was replayed once in each, on exactly one rank.
        assert found["metrics"]["routing_replay/replayed_rows"] == 3 * found["num_covered"]
        assert 0 < found["metrics"]["routing_replay/coverage"] < 1


@each_plan
def test_an_updated_model_replays_the_record_and_its_live_routes_would_differ(num_ranks, plan):
    found, recorded = results(num_ranks, plan)
    assert error(found["moved_replayed"], recorded["moved_replayed"]) < TOLERANCE
    assert error(found["moved_replayed"], found["moved_live"]) > 0.1
