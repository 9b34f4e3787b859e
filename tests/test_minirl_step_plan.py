"""The recipe's plan of a step: rank 0 plans, the microbatches stay those of each update."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_table import random_routes

from recipes.minirl.policy.microbatches import Sharding
from recipes.minirl.policy.step_plan import plan_layout, plan_step
from recipes.minirl.rollout.batch import Batch, Sample
from recipes.minirl.settings.config import RecipeConfig
from recipes.minirl.settings.sections import TrainingSettings
from routing_replay.errors import ConfigError
from routing_replay.routes.table import RouteTable

ROWS = (7, 3, 12, 5, 9, 4, 11, 6)


@pytest.fixture
def alone():
    """A world of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def a_step():
    """Eight sequences, every third row of them without routes."""
    samples = [
        Sample(prompt_ids=(1, 2), response_ids=(3,) * (rows - 1), logp_mu=(-1.0,) * (rows - 1))
        for rows in ROWS
    ]
    table = RouteTable.from_routes([random_routes(rows, rows, gates=False) for rows in ROWS])
    return Batch.from_samples(samples, 2), table


def settings(**values):
    return TrainingSettings(minibatch_size=4, plan="both", **values)


@pytest.mark.parametrize("budget", [{"microbatch_size": 2}, {"microbatch_tokens": 20}])
def test_every_update_keeps_its_sequences_and_every_microbatch_its_budget(alone, budget):
    batch, table = a_step()
    t = settings(**budget)
    sharding = Sharding(minibatch_size=4, **budget)
    planned = plan_step(t, sharding, batch, table, None)
    for number in range(2):
        bins = planned.packing.microbatches(number, 0)
        assert sorted(s for one in bins for s in one) == list(range(4 * number, 4 * number + 4))
        if "microbatch_size" in budget:
            assert [len(one) for one in bins] == [2, 2]
        else:
            assert all(sum(ROWS[s] for s in one) <= 20 for one in bins)
    # The sharding of a planned step is the plan's, for every pass over it.
    bins = tuple(ranks[0] for ranks in planned.packing.bins)
    followed = Sharding(minibatch_size=4, planned=bins, **budget)
    assert followed.plan(batch.lengths_S) == [list(minibatch) for minibatch in bins]


def test_a_sequence_longer_than_the_budget_still_fits(alone):
    batch, table = a_step()
    sharding = Sharding(minibatch_size=4, microbatch_tokens=8)
    planned = plan_step(settings(microbatch_tokens=8), sharding, batch, table, None)
    assert sorted(s for ranks in planned.packing.bins for one in ranks[0] for s in one) == [
        *range(8)
    ]


def test_the_dispatch_of_a_scope_is_the_counts_of_its_microbatches(alone):
    batch, table = a_step()
    sharding = Sharding(minibatch_size=4, microbatch_size=2)
    planned = plan_step(settings(microbatch_size=2), sharding, batch, table, None)
    of_update = planned.counts(0, [1])["dispatch"]
    expected = [table.counts_SLE[list(one)].sum(0) for one in planned.packing.bins[1][0]]
    np.testing.assert_array_equal(of_update, expected)
    # The old policy's pass runs the microbatches of all updates in one scope.
    np.testing.assert_array_equal(planned.counts(0)["dispatch"][2:], of_update)


def test_metrics_describe_the_plan_and_the_natural_order_by_layer(alone):
    batch, table = a_step()
    sharding = Sharding(minibatch_size=4, microbatch_size=2)
    metrics = plan_step(settings(microbatch_size=2), sharding, batch, table, None).metrics
    for suffix in ("", "_natural"):
        peak = metrics[f"routing_replay/ep_peak_over_mean{suffix}"]
        assert peak.layers == dict.fromkeys(table.shape.layers, 1.0) and peak.mean == 1.0
        assert metrics[f"routing_replay/ep_load_rank_0{suffix}"].layers == peak.layers
    # No position is padded but those of each microbatch, which the plan does not count.
    assert metrics["routing_replay/plan_unknown_tokens"] == int((~table.covered_T).sum())
    assert metrics["routing_replay/plan_moved_experts"] == 0


def test_the_plans_layout_is_the_trainers():
    layout = plan_layout(TrainingSettings(tensor_parallel=2, expert_parallel=4), world_size=8)
    assert (layout.data, layout.ranks_per_group, layout.num_groups) == (4, 2, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"routing_replay_mode": "R2"}, "can be planned only by routes that are known"),
        ({"routing_replay_mode": "disabled"}, "can be planned only by routes that are known"),
        ({"routing_replay_soft_ratio": 0.5}, "can be planned only by routes that are known"),
        ({"placement_horizon": 0}, "the setting 'placement_horizon' is out of range"),
        ({"placement_move_tokens": -1}, "the setting 'placement_move_tokens' is out of range"),
    ],
)
def test_a_plan_that_could_not_be_followed_is_refused_before_the_run(values, message):
    with pytest.raises(ConfigError, match=message):
        RecipeConfig.from_mapping({"plan": "both"} | values)


def test_torch_is_not_asked_to_share_a_plan_of_a_rank_that_failed(alone):
    batch, _ = a_step()
    other = RouteTable.from_routes([random_routes(3, 0, gates=False)])
    sharding = Sharding(minibatch_size=4, microbatch_size=2)
    with pytest.raises(Exception, match="the lengths are not those of the counted sequences"):
        plan_step(settings(microbatch_size=2), sharding, batch, other, None)
    assert torch.distributed.get_world_size() == 1
