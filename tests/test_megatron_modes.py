"""Modes and handles of replay, what a step costs, and tables of data-parallel ranks."""

import numpy as np
import pytest
from megatron_worlds import run_world, selected

from recipes.model.parallel import ParallelLayout

LAYERS, MICROBATCHES = 4, 4
LAYOUTS = {
    "tp2": ParallelLayout(tensor=2),
    "pp2": ParallelLayout(pipeline=2),
    "cp2": ParallelLayout(context=2),
    "dp4": ParallelLayout(),
}


@pytest.fixture(scope="module")
def checks(request):
    """What the checks of the selected tests returned, of one spawned rank."""
    [result] = run_world("replay_modes:run", 1, selected(request, "found"))
    return result


@pytest.fixture
def found(request, checks):
    return checks[request.param]


def of(name):
    """The test looks at this function of replay_modes.py."""
    return pytest.mark.parametrize("found", [name], indirect=True)


@of("disabled")
def test_mode_disabled_leaves_the_model_stock_and_its_scopes_do_nothing(found):
    assert found["seams"] == ["NoneType"] * LAYERS and found["hooks"] == 0
    assert found["recording"] and found["replaying"]
    assert (found["covered"], found["covered_beside"], found["yields"]) == (0, 0, None)
    assert found["metrics"] == {} and found["shape"].layers == tuple(range(LAYERS))


@of("disabled_on_a_dense_model")
def test_mode_disabled_takes_a_dense_model(found):
    assert found == (True, ())


@of("entering_and_leaving")
def test_a_microbatch_may_be_entered_and_left_by_plain_calls(found):
    is_same, has_same_receipt, outside_scopes = found
    assert is_same and has_same_receipt
    assert outside_scopes == (None, None)


@of("live_rows_in_a_recomputation")
def test_a_recomputation_takes_the_live_experts_of_its_forward(found):
    # Two sequences of 16 and 11 tokens, padded to 32: 5 of padding, 2 last tokens, and every fifth
    # of their 25 rows.
    assert found == {"live": 12, "layers": LAYERS, "moved": 0}


@of("copies_to_the_host")
def test_recorded_routes_come_home_in_one_copy_for_each_microbatch(found):
    assert found == {"recording": MICROBATCHES, "replaying": MICROBATCHES, "same": True}


@of("router_shift")
def test_the_router_shift_is_its_definition_and_remembers_one_byte_for_an_expert(found):
    np.testing.assert_allclose(found["gamma"], found["expected"], rtol=1e-5)
    # Every fifth row is uncovered.
    assert np.isnan(found["gamma"]).mean() == pytest.approx(0.2, abs=0.01)
    assert (found["ids"], found["index"]) == ("uint8", "int32")


@pytest.fixture(scope="module")
def tables(request):
    """Of each rank, what the layouts of the selected tests gave."""
    layouts = {name: LAYOUTS[name] for name in selected(request, "layout")}
    return run_world("replay_modes:tables_of_data_parallel_ranks", 4, layouts, timeout_s=600)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_metrics_of_a_table_for_each_data_parallel_rank_are_those_of_one_table_for_all(
    tables, layout
):
    ranks = [of_rank[layout] for of_rank in tables]
    assert len({of_rank["num_rows"] for of_rank in ranks}) > 1
    for of_rank in ranks:
        assert of_rank["own"] == pytest.approx(of_rank["shared"], nan_ok=True)
        assert of_rank["own"] == pytest.approx(ranks[0]["own"], nan_ok=True)
    assert ranks[0]["own"]["routing_replay/any_layer_differs"] > 0.5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_data_parallel_rank_records_a_table_of_its_own(tables, layout):
    for of_rank in (of_rank[layout] for of_rank in tables):
        assert of_rank["alone"] and of_rank["again"]
        assert of_rank["part"] and of_rank["others_are_empty"]
        kind, message = of_rank["different_lengths"]
        assert kind == "ReplayError" and "is_shared=False" in message


@of("some_layers")
def test_only_the_named_layers_replay_and_the_others_route_live(found):
    assert found["none is stock"] and found["all is the default"]
    assert found["some is between"] == [False, False]
    replayed = [found[f"{name} replayed"] for name in ("none", "some", "all", "default")]
    assert replayed == [[], [1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert found["error"].startswith("layers to replay that have no router; expected some of")
    assert "got [4]" in found["error"]
