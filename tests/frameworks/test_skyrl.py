"""SkyRL's MegatronModelWrapper with replay, on one rank and on two."""

import pytest
import tiny_batch
import torch
from megatron_worlds import run_world
from tiny_batch import LAYERS, LENGTHS, NUM_ROUTED

LAYOUTS = {"one": 1, "padded": 1, "pp2": 2, "cp2": 2, "tp2": 2}
# SkyRL's own replay is right in these; see the last test for the other.
RIGHT = {layout: size for layout in LAYOUTS for size in [1 if layout == "padded" else 2]}
TOLERANCE = {"rtol": 0, "atol": 2e-5}  # float32; another order of sums


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    checkpoint = tiny_batch.write_checkpoint(tmp_path_factory.mktemp("skyrl") / "tiny")
    return {n: run_world("skyrl_checks:run", n, n, checkpoint, timeout_s=600) for n in (1, 2)}


@pytest.fixture(scope="module")
def results(worlds):
    return {name: [rank[name] for rank in worlds[n]] for name, n in LAYOUTS.items()}


def last(ranks):
    """The ranks with outputs."""
    return [rank for rank in ranks if rank["live"] is not None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_are_those_of_skyrls_own_replay_where_it_is_right(results, layout):
    for rank in last(results[layout]):
        expected = rank[f"skyrl_{RIGHT[layout]}"]
        torch.testing.assert_close(rank[f"ours_{RIGHT[layout]}"], expected, **TOLERANCE)
        assert (expected - rank["live"]).abs().max() > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_skyrls_own_replay(results, layout):
    for rank in results[layout]:
        assert rank["gradients"].keys() == rank["skyrl_gradients"].keys()
        assert any(gradient.abs().max() > 0 for gradient in rank["gradients"].values())
        for name, gradient in rank["gradients"].items():
            expected = rank["skyrl_gradients"][name]
            atol = 1e-4 * float(expected.abs().max()) + 1e-6
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_router_dispatches_exactly_its_rows(results, layout):
    counts = [rank["witness"] for rank in results[layout]]
    assert sum(c["rows"] for c in counts) == NUM_ROUTED * LAYERS
    assert sum(c["wrong"] for c in counts) == 0
    assert sum(c["live"] for c in counts) == (sum(LENGTHS) - NUM_ROUTED) * LAYERS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pass_without_routes_is_stock_again(results, layout):
    for rank in last(results[layout]):
        assert torch.equal(rank["live_again"], rank["live"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_metrics_arrive_beside_skyrls(results, layout):
    for rank in results[layout]:
        for metrics in rank["metrics"]:
            # The last token of a sequence was never fed; nothing else is without routes.
            expected = (sum(LENGTHS) - len(LENGTHS)) * LAYERS
            assert metrics["routing_replay/replayed_rows"] == expected
            assert {f"routing_replay/overlap_layer_{i}" for i in range(LAYERS)} <= metrics.keys()
            assert "loss_metrics/objective/clip_fraction" in metrics


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_r2_replays_what_the_old_policys_pass_recorded(worlds, num_ranks):
    counts = [rank["r2"] for rank in worlds[num_ranks]]
    assert sum(c["rows"] for c in counts) == (sum(LENGTHS) - len(LENGTHS)) * LAYERS
    assert sum(c["wrong"] for c in counts) == 0


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_gradients_add_up_over_two_mini_batches_before_an_update(worlds, num_ranks):
    for rank in worlds[num_ranks]:
        together, apart = rank["accumulated"]["together"], rank["accumulated"]["apart"]
        assert together
        for name, gradient in together.items():
            total = apart[0][name] + apart[1][name]
            torch.testing.assert_close(gradient, total, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_batch_replays_what_a_filter_left_of_it(worlds, num_ranks):
    ranks = [rank["bad"]["after_drop"] for rank in worlds[num_ranks]]
    kept = sum(LENGTHS[i] - 1 for i in (0, 1, 4, 5))
    assert sum(counts["rows"] for counts in ranks) == kept * LAYERS
    assert sum(counts["wrong"] for counts in ranks) == 0


ERRORS = {
    "foreign": "an expert id is out of range",
    "layers": "the expert ids are of another number of layers",
    "none": "a batch of the actor has no routes",
    "uncovered": "has routes: it would train without replay",
    "key": "the policy trains without replay",
    "none_of_these": "no error",
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_bad_input_is_an_error_on_every_rank(worlds, num_ranks, name):
    first, *others = (rank["bad"][name] for rank in worlds[num_ranks])
    assert ERRORS[name] in first
    on_one_rank = name in ("foreign", "none")
    for error in others:
        assert ("another rank could not open the pass" if on_one_rank else ERRORS[name]) in error


def test_skyrls_own_replay_mixes_the_rows_of_a_padded_microbatch(results):
    # Its indices are flattened batch-major, and Megatron's routers see sequence-major tokens:
    # microbatches of two differ from microbatches of one. Ours do not.
    (rank,) = results["padded"]
    torch.testing.assert_close(rank["ours_2"], rank["ours_1"], **TOLERANCE)
    assert (rank["skyrl_2"] - rank["skyrl_1"]).abs().max() > 0.01
