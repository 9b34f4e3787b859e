"""Traps of stock Megatron: each is refused, corrected or delegated, and that is seen on a model."""

import numpy as np
import pytest
import replay_traps
import torch
from megatron_worlds import run_world, selected

LAYERS, MICROBATCHES = 4, 4


@pytest.fixture(scope="module")
def traps(request):
    """What the traps of the selected tests returned, of one spawned rank."""
    [result] = run_world("replay_traps:provoke", 1, selected(request, "trap"))
    return result


@pytest.fixture
def trap(request, traps):
    return traps[request.param]


def of(name):
    """The test looks at this function of replay_traps.py."""
    return pytest.mark.parametrize("trap", [name], indirect=True)


@of("expert_bias_under_a_padding_mask")
def test_loads_under_a_padding_mask_are_those_of_the_unmasked_tokens(trap):
    # 32 tokens in a microbatch, 8 experts: the stock mask [32] does not fit the map [32, 8].
    for when in ("stock", "outside", "after"):
        assert trap[when][0] == "RuntimeError" and "must match" in trap[when][1]
    assert trap["routers_are_clean"]
    beyond = trap["loads"] - trap["expected"]
    # The last token of each of 8 sequences has no row and routes live: 2 experts in every layer.
    assert (beyond >= 0).all()
    assert beyond.sum(1).tolist() == [2 * trap["num_last"]] * LAYERS == [16] * LAYERS


@of("megatron_counts_in_another_way")
def test_a_megatron_that_counts_loads_in_another_way_is_refused_where_it_matters(trap):
    kind, message = trap["with_bias"]
    assert kind == "PreflightError" and "counts expert loads in another way" in message
    assert trap["without_bias"] is None
    assert trap["is_clean"]
    assert all(map(torch.equal, trap["stock"], trap["after"]))


@of("which_routes_a_statistic_counts")
def test_the_aux_loss_counts_live_routes_and_the_dispatched_load_is_the_replayed_one(trap):
    (stock_loss, stock_load), (loss, load) = trap["stock"], trap["replayed"]
    # 4 microbatches of 32 tokens with 2 experts each.
    assert len(loss) == len(load) == MICROBATCHES and {sum(x) for x in loss + load} == {64}
    assert stock_loss == stock_load == loss
    assert all(a != b for a, b in zip(loss, load, strict=True))


@of("as_many_tokens_as_experts")
def test_with_as_many_tokens_as_experts_the_stock_count_is_silently_wrong_and_ours_right(trap):
    # 8 tokens chose expert 2, of which 2 are padding. Stock masks experts 6 and 7 instead.
    assert trap == [8, 6]


@of("stock_replay_object")
def test_an_idle_stock_replay_object_does_not_disturb_ours(trap):
    wrong, calls = trap["idle"]
    assert wrong == [] and calls == LAYERS * MICROBATCHES


@of("stock_replay_object")
@pytest.mark.parametrize("action", ["RECORD", "REPLAY_FORWARD"])
def test_stock_replay_that_is_switched_on_inside_a_scope_is_refused(trap, action):
    for kind, message in trap[action]:
        assert kind == "ReplayError"
        assert "Megatron's own routing replay is switched on inside a scope" in message
        assert action in message and "--moe-enable-routing-replay" in message


@of("stock_replay_object")
def test_outside_scopes_the_stock_replay_object_works_as_without_us(trap):
    # Its one slot per router holds the last microbatch: 2 sequences of 16 tokens.
    assert trap["delegated"] == [32] * LAYERS and trap["same"]


@of("wrapped_model")
def test_a_model_inside_its_data_parallel_wrapper_is_replayed(trap):
    assert trap["layers"] == tuple(range(LAYERS)) and trap["wrong"] == []
    assert trap["calls"] == 2 * LAYERS * MICROBATCHES  # each forward, and its recomputation


@of("two_models_in_one_process")
def test_replay_in_one_model_leaves_another_of_the_same_process_live(trap):
    assert trap == {"wrong": [], "same": True, "of_other": None}


@of("unset_router_fusion")
def test_a_fused_router_is_refused_or_unset_inside_scopes(trap):
    assert trap["refused"][0] == "PreflightError" and "router-fusion" in trap["refused"][1]
    wrong, calls = trap["replayed"]
    assert wrong == [] and calls == LAYERS * MICROBATCHES
    # Outside scopes the model is stock, so fused: its kernel is missing here, and says so.
    for when in ("stock", "outside", "after"):
        assert trap[when][0] == "ValueError" and "fused_topk" in trap[when][1]
    assert trap["configs_are_shared_again"]
    # A recomputation after the scope would take the fused kernel, which asks no seam.
    assert trap["late"][0] == "ReplayError" and "after its scope was closed" in trap["late"][1]


@of("coverage_counts_what_the_caller_counts")
@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("all", lambda rows: np.ones(rows.shape, bool)),
        ("response", lambda rows: replay_traps.response(rows).bool()),
    ],
)
def test_coverage_is_over_the_tokens_that_count(trap, name, counted):
    coverage, fallback, replayed = trap[name]
    expected = replay_traps.naive_coverage(trap["rows"], lambda rows: np.asarray(counted(rows)))
    assert coverage == pytest.approx(expected, abs=1e-12)
    assert fallback == pytest.approx(1 - expected, abs=1e-12)
    # What was replayed does not depend on what is counted.
    assert replayed == LAYERS * sum(int((rows >= 0).sum()) for rows in trap["rows"])


@of("coverage_counts_what_the_caller_counts")
def test_padding_would_have_lowered_the_coverage(trap):
    assert trap["response"][0] > trap["all"][0]
