"""Seconds of the legs of a step, from stated rates."""

import pytest

from recipes.minirl.launch.durations import ModelCost, legs, step_seconds
from recipes.minirl.settings.command_line import parse

COST = ModelCost(forward_flops=10e9, checkpoint_bytes=60 * 10**9, route_slots=48 * 8, id_bytes=1)
SIZES = ["--prompts-per-step", "10", "--samples-per-prompt", "10", "--minibatch-size", "100"]
SIZES += ["--microbatch-size", "1", "--max-new-tokens", "4000", "--measure-live-every", "0"]
RATES = ["--plan-response-tokens", "900", "--plan-prompt-tokens", "100"]
RATES += ["--plan-trainer-tflops", "100", "--plan-rollout-tokens-per-s", "1000"]
FLAGS = [*SIZES, *RATES, "--routing-replay-mode", "R3", "--nproc", "4"]


def seconds(*flags):
    return {leg.name: leg.seconds for leg in legs(parse([*FLAGS, *flags]), COST, 2)}


def test_the_legs_follow_from_the_rates():
    legs = seconds("--microbatch-tokens", "8000", "--recompute", "full")
    assert legs == pytest.approx(
        {
            "rollout": 45.0,  # 100 responses x 900 tokens / (2 GPUs x 1000 tokens/s)
            "routes": 0.0768,  # 100,000 tokens x 384 slots x 1 byte, written and read once
            "score": 2.5,  # 100,000 tokens x 1e10 FLOP / (4 GPUs x 1e14 FLOP/s)
            "update": 10.0,  # four forwards of it
            "weights": 120.0,  # 60 GB written and read once at 1 GB/s
        }
    )


def test_padded_sequences_cost_their_longest():
    # 100 x (100 + 4000) tokens in place of 100,000.
    padded, packed = seconds(), seconds("--microbatch-tokens", "8000")
    assert padded["score"] == pytest.approx(4.1 * packed["score"])
    assert padded["rollout"] == packed["rollout"]


def test_without_replay_no_routes_travel_and_without_recomputation_an_update_is_cheaper():
    stock = seconds("--routing-replay-mode", "disabled")
    assert "routes" not in stock
    assert stock["update"] == pytest.approx(3 * stock["score"])


def test_a_pipeline_waits_for_its_first_and_last_microbatch():
    # 100,000 tokens on 4 / 2 ranks: 7 packs of 8,000. One of two stages waits for one pack.
    packs = ["--microbatch-tokens", "8000", "--recompute", "full"]
    alone, staged = seconds(*packs), seconds(*packs, "--pipeline-parallel", "2")
    assert staged["score"] == pytest.approx(alone["score"] * (7 + 1) / 7)
    # Two chunks per stage wait half as long.
    padded = ["--pipeline-parallel", "2"]
    once, twice = seconds(*padded), seconds(*padded, "--virtual-pipeline", "2")
    # 100 sequences are 50 microbatches on each data-parallel rank.
    assert once["update"] / twice["update"] == pytest.approx((50 + 1) / (50 + 0.5))


def test_a_rollout_ahead_hides_the_training_or_is_hidden_by_it():
    packs = ["--microbatch-tokens", "8000", "--recompute", "full"]
    config = parse([*FLAGS, *packs])
    # 45 + 0.0768 + 2.5 + 10 + 120, as above.
    assert step_seconds(config, list(legs(config, COST, 2))) == pytest.approx(177.5768)
    ahead = parse([*FLAGS, *packs, "--ahead", "1"])
    assert step_seconds(ahead, list(legs(ahead, COST, 2))) == pytest.approx(45 + 120)
    # Several steps share the servers: the same work in a step.
    pool = parse([*FLAGS, *packs, "--ahead", "3", "--publish-pause", "retract"])
    assert step_seconds(pool, list(legs(pool, COST, 2))) == pytest.approx(45 + 120)
    # Ten times the GPUs sample in 4.5 s: what is trained meanwhile takes 12.5768.
    assert step_seconds(ahead, list(legs(ahead, COST, 20))) == pytest.approx(12.5768 + 120)
