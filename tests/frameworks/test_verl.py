"""verl's TrainingWorker and Megatron engine with replay, on one rank and on two."""

import pytest
import tiny_batch
import torch
from megatron_worlds import run_world
from tiny_batch import CUT, LAYERS, LENGTHS, NUM_CAPTURED, NUM_ROUTED

LAYOUTS = {"one": 1, "pp2": 2, "ep2": 2, "cp2": 2, "tp2": 2}
NUM_TOKENS = sum(LENGTHS)
KEPT = [0, 2, 3, 5]  # as verl_checks.KEPT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_batch.write_checkpoint(tmp_path_factory.mktemp("verl") / "tiny")


@pytest.fixture(scope="module")
def worlds(checkpoint):
    return {n: run_world("verl_checks:run", n, n, checkpoint, timeout_s=600) for n in (1, 2)}


@pytest.fixture(scope="module")
def results(worlds):
    """For each layout the results of its ranks."""
    return {name: [rank[name] for rank in worlds[n]] for name, n in LAYOUTS.items()}


def outputs(ranks, name):
    """What the ranks with outputs returned, one item for each data-parallel rank."""
    return [rank[name] for rank in ranks if rank[name] is not None]


def total(ranks, name, count):
    return sum(rank[name][count] for rank in ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verl_chooses_our_engine_by_the_entry_point(results, layout):
    assert {rank["engine"] for rank in results[layout]} == {"RoutingReplayEngine"}
    assert {rank["stock_engine"] for rank in results[layout]} == {"StockEngine"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reference_is_bitwise_stock(results, layout):
    for rank in results[layout]:
        if rank["stock"] is not None:
            assert torch.equal(rank["reference"], rank["stock"])
            assert not torch.equal(rank["replayed"], rank["stock"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("witness", ["witness", "witness_update"])
def test_every_router_dispatches_exactly_its_rows(results, layout, witness):
    ranks = results[layout]
    # A pipeline stage has its layers, a context or sequence-parallel rank its tokens; two
    # data-parallel ranks have sequences of their own.
    num_data = 2 if layout == "ep2" else 1
    assert total(ranks, witness, "rows") == num_data * NUM_ROUTED * LAYERS
    assert total(ranks, witness, "wrong") == 0
    assert total(ranks, witness, "live") == num_data * (NUM_TOKENS - NUM_ROUTED) * LAYERS
    assert total(ranks, witness, "short") == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_are_those_of_our_own_loop(results, layout):
    compared = [r for r in results[layout] if r["loop"] is not None and r["one_by_one"] is not None]
    assert compared
    for rank in compared:
        require_close(rank["loop"], rank["one_by_one"][rank["loop_places"]], layout, "log-probs")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "cp2"])
def test_gradients_are_those_of_our_own_loop(results, layout):
    for rank in results[layout]:
        require_close_by_name(rank["loop_gradients"], rank["gradients_one_by_one"], layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_and_gradients_are_those_of_verls_own_replay(results, layout):
    for rank in results[layout]:
        if rank["verl"] is not None:
            require_close(rank["whole"], rank["verl"], layout, "log-probs")
        require_close_by_name(rank["gradients"], rank["verl_gradients"], layout)


def require_close_by_name(gradients, expected, layout):
    assert gradients.keys() == expected.keys()
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        require_close(gradient, expected[name], layout, name)


def require_close(values, expected, layout, name):
    """Bitwise on one rank; on two up to one rounding of bfloat16, 2**-8 of the largest value."""
    values, expected = values.float(), expected.float()
    difference = float((values - expected).abs().max())
    bound = 0.0 if layout == "one" else 2**-8 * float(expected.abs().max())
    assert difference <= bound, f"{name}: {difference} of {float(expected.abs().max())}"


def test_verls_own_replay_sends_uncaptured_rows_to_expert_0(results):
    # The truncated sequence's rows without routes are zeros: expert 0 in every slot.
    (rank,) = results["one"]
    uncaptured = LENGTHS[tiny_batch.CUT] - 1 - tiny_batch.NUM_CAPTURED
    assert rank["verl_witness"]["short"] == uncaptured * LAYERS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_metrics_arrive_in_verls_trainer(results, layout):
    num_data = 2 if layout == "ep2" else 1
    for metrics in outputs(results[layout], "metrics"):
        # Two mini-batches: verl's trainer logs the mean over them.
        expected = num_data * NUM_ROUTED * LAYERS / 2
        assert metrics["routing_replay/replayed_rows"] == expected
        assert 0 < metrics["routing_replay/overlap"] < 1
        assert all(0 <= metrics[f"routing_replay/overlap_layer_{i}"] <= 1 for i in range(LAYERS))
        assert {"loss", "grad_norm"} <= metrics.keys()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_r2_replays_what_the_old_policys_pass_recorded(worlds, num_ranks):
    ranks = [rank["r2"] for rank in worlds[num_ranks]]
    rows = (NUM_TOKENS - len(LENGTHS)) * LAYERS
    assert total(ranks, "update", "rows") == rows
    assert total(ranks, "update", "wrong") == 0
    assert total(ranks, "live", "wrong") > rows / 2  # the routers were turned upside down
    for metrics in outputs(ranks, "metrics"):
        assert metrics["routing_replay/replayed_rows"] == rows


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_verls_padded_layout_replays_its_rows(worlds, num_ranks):
    ranks = [rank["padded"] for rank in worlds[num_ranks]]
    # Two data-parallel ranks have sequences of their own.
    assert total(ranks, "witness", "rows") == num_ranks * NUM_ROUTED * LAYERS
    assert total(ranks, "witness", "wrong") == 0


ERRORS = {
    "foreign": "an expert id is out of range",
    "longer": "they have more rows than the sequence has tokens",
    "layers": "the expert ids are of another number of layers",
    "none": "a batch of the actor has no routes",
    "uncovered": "has routes: it would train without replay",
    "own_replay": "verl's own router replay is on",
    "dynamic_cp": "dynamic context parallelism moves sequences",
}
ON_ONE_RANK = {"foreign", "longer", "none"}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_bad_input_is_an_error_on_every_rank(worlds, num_ranks, name):
    first, *others = (rank["bad"]["errors"][name] for rank in worlds[num_ranks])
    assert ERRORS[name] in first
    for error in others:
        assert (
            "another rank could not open the pass" if name in ON_ONE_RANK else ERRORS[name]
        ) in error


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_gradients_add_up_over_two_batches_before_an_update(worlds, num_ranks):
    for rank in worlds[num_ranks]:
        together, apart = rank["accumulated"]["together"], rank["accumulated"]["apart"]
        for name, gradient in together.items():
            total = apart[0][name] + apart[1][name]
            torch.testing.assert_close(gradient, total, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_resumed_job_replays_as_the_one_before_it(worlds, num_ranks):
    ranks = [r["resumed"] for r in worlds[num_ranks] if r["resumed"]["first"] is not None]
    assert ranks
    for rank in ranks:
        assert torch.equal(rank["after"], rank["before"])
        assert not torch.equal(rank["before"], rank["first"])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_batch_replays_what_a_filter_left_of_it(worlds, num_ranks):
    ranks = [rank["bad"]["after_drop"] for rank in worlds[num_ranks]]
    kept = sum(LENGTHS[i] - 1 for i in KEPT) - (LENGTHS[CUT] - 1 - NUM_CAPTURED)
    assert sum(counts["rows"] for counts in ranks) == num_ranks * kept * LAYERS
    assert sum(counts["wrong"] for counts in ranks) == 0


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_job_goes_on_after_an_error_and_beside_another_actor(worlds, num_ranks):
    layout = {1: "one", 2: "ep2"}[num_ranks]
    for rank in worlds[num_ranks]:
        for again in (*rank["bad"]["first_actor"], rank["bad"]["second_actor"]):
            assert torch.equal(again, rank[layout]["replayed"])
