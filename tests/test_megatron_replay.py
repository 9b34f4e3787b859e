"""Replay on real Megatron: the matrix's representative part, and every failure with its error."""

import pytest
import replay_cases
import replay_failures
import replay_matrix
from megatron_worlds import run_world, selected

# Representative of `make test-matrix`: each parallelism, each recomputation, each kind of router.
REPRESENTATIVE = {
    1: [
        "padded",
        "recompute_full-packed",
        "recompute_moe-sigmoid_bias-padded",
        "recompute_full-groups-padded",
        "recompute_moe-aux_loss-padded",
        "pre_softmax_scaled-padded",
        "padded-ragged",
        "padded-mtp",
        "recompute_full-groups-padded-latent",
        "padded-hybrid",
    ],
    2: [
        "tp2-recompute_full-packed",
        "pp2-first3-recompute_full-padded-dense0",
        "pp2-vpp2-recompute_full-groups-padded",
        "cp2-recompute_full-packed",
        "ep2-allgather-recompute_full-padded",
        "ep2-recompute_moe-padded",
        "tp2-ep2-etp1-padded",
        "cp2-recompute_full-padded-contiguous",
        "pp2-padded-mtp",
        "tp2-ep2-etp1-recompute_full-groups-padded-latent",
    ],
}


# What the installed megatron-core can run.
WHOLE_MATRIX = {n: [case.name for case in replay_cases.cases(n)] for n in (1, 2, 4)}
IN_MAKE_TEST = {
    n: [name for name in names if name in WHOLE_MATRIX[n]] for n, names in REPRESENTATIVE.items()
}


def each_world(matrix):
    """Parameters of a test for each number of ranks; its id says how many configurations run."""
    ids = [f"{len(names)} configurations on {n} ranks" for n, names in matrix.items()]
    return pytest.mark.parametrize(("num_ranks", "names"), matrix.items(), ids=ids)


def findings(num_ranks, names):
    """What is wrong in these configurations, on all ranks."""
    worlds = run_world(replay_matrix.run_cases, num_ranks, names, num_ranks, timeout_s=3000)
    return [text for of_rank in worlds for text in of_rank]


@pytest.mark.timeout(900)
@each_world(IN_MAKE_TEST)
def test_replay_is_exact_on_representative_configurations(num_ranks, names):
    assert findings(num_ranks, names) == []


def test_every_representative_configuration_runs():
    left_out = {n: sorted({*names} - {*IN_MAKE_TEST[n]}) for n, names in REPRESENTATIVE.items()}
    if any(left_out.values()) and replay_cases.VERSION < "0.19":
        pytest.skip(f"megatron-core {replay_cases.VERSION} cannot run {left_out}")
    assert left_out == {1: [], 2: []}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@each_world(WHOLE_MATRIX)
def test_replay_is_exact_on_the_whole_matrix(num_ranks, names):
    assert findings(num_ranks, names) == []


def test_the_matrix_has_at_least_60_configurations_and_no_name_twice():
    names = [(n, name) for n, names in WHOLE_MATRIX.items() for name in names]
    assert len(names) == len(set(names)) >= 60


@pytest.mark.parametrize(
    "fault", ["shifted_rows", "swapped_layers", "live_recompute", "batch_major_rows"]
)
def test_the_matrix_notices_a_planted_fault(fault):
    [wrong] = run_world(replay_matrix.run_with_fault, 1, fault)
    assert any("(b)" in text for text in wrong), wrong


@pytest.fixture(scope="module")
def raised(request):
    """What the selected failures raised, of one spawned rank: `-k NAME` provokes that one alone."""
    [found] = run_world(replay_failures.provoke, 1, selected(request, "name"))
    return found


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("rows_out_of_range", "ReplayError", "token_rows are out of range; expected -1 (live) or"),
        ("rows_of_the_wrong_length", "ReplayError", "another number of tokens than token_rows"),
        ("rows_on_the_wrong_device", "ReplayError", "expected the CPU; got meta"),
        ("rows_of_the_wrong_type", "ReplayError", "expected an int64 tensor; got int32"),
        ("mask_on_the_wrong_device", "ReplayError", "expected the CPU; got meta"),
        ("mask_of_the_wrong_type", "ReplayError", "expected a bool tensor; got int64"),
        ("mask_of_the_wrong_length", "ReplayError", "expected [2, 16], as token_rows; got [2, 15]"),
        (
            "leaving_a_microbatch_that_was_not_entered",
            "ReplayError",
            "expected replay.enter_microbatch(token_rows) before",
        ),
        ("a_mode_that_nobody_resolved", "ConfigError", "config.resolve(num_mini_batches)"),
        ("a_sequence_without_tokens", "ReplayError", "at least 1; got [4, 0]"),
        (
            "table_of_fewer_layers",
            "TableError",
            "another model: layers differ; expected 4 routed",
        ),
        ("table_of_more_experts", "TableError", "got 4 routed layers 0-3, 16 experts"),
        ("table_of_another_top_k", "TableError", "8 experts, top-3"),
        (
            "recorded_routes_where_the_rollouts_belong",
            "ReplayError",
            "mode R3 replays the rollout engine's routes",
        ),
        (
            "rollout_routes_where_recorded_ones_belong",
            "ReplayError",
            "mode R2 replays the training engine's routes",
        ),
        # Rows 0-14 are the first sequence's: row 6 was covered, as was row 3.
        (
            "a_doubled_expert_in_a_table_changed_afterwards",
            "RoutesError",
            "expected 2 distinct experts below 8; got [5, 5] [row 6, layer 2, memory]",
        ),
        (
            "an_expert_beyond_the_models_in_a_table_changed_afterwards",
            "RoutesError",
            "[row 3, layer 1, memory]",
        ),
        ("nobody_opened_a_scope", "ReplayError", "nothing was replayed or recorded yet"),
        # Four microbatches of 15 + 10 rows; the last, of sequences 6 and 7, was dropped.
        (
            "a_sequence_that_was_never_recorded",
            "ReplayError",
            "expected all 100 rows, each in one microbatch of one rank; got 75 [first row 75, of "
            "sequence 6]",
        ),
        ("model_runs_without_a_microbatch", "ReplayError", "no microbatch was announced"),
        ("model_runs_twice_in_a_microbatch", "ReplayError", "ran twice in one microbatch"),
        ("microbatch_without_the_model", "ReplayError", "announced but no model chunk ran"),
        ("microbatch_within_a_microbatch", "ReplayError", "announced within another"),
        ("scope_within_a_scope", "ReplayError", "a scope is open already"),
        ("scope_without_any_microbatch", "ReplayError", "not every model chunk ran"),
        ("a_router_that_did_not_run", "ReplayError", "0 forward passes"),
        (
            "inner_module_called_past_the_attached_one",
            "ReplayError",
            "outside every announced microbatch",
        ),
        ("backward_after_the_scope", "ReplayError", "recomputed after its scope was closed"),
        ("exception_in_the_forward", "RuntimeError", "the attention broke"),
        ("exception_in_the_backward", "RuntimeError", "the gradient broke"),
        ("attach_twice", "ReplayError", "attached to this model already"),
        ("remove_in_mid_step", "ReplayError", "removed in mid-step"),
        ("use_after_remove", "ReplayError", "was removed from this model"),
        ("a_row_recorded_twice", "ReplayError", "recorded more than once"),
        ("table_of_an_unfinished_recording", "ReplayError", "the recording is not complete"),
        (
            "a_file_for_a_table_that_ranks_do_not_share",
            "ReplayError",
            "a file holds a table that all ranks share",
        ),
        ("only_one_of_two_chunks_runs", "ReplayError", "not every model chunk ran"),
        ("routers_built_twice", "PreflightError", "two routers claim one layer"),
        ("a_chunk_left_out", "PreflightError", "not its MoE layers"),
        ("a_dense_model", "PreflightError", "no router that can replay"),
    ],
)
def test_a_failure_has_one_clear_error_and_leaves_the_model_stock(raised, name, kind, message):
    found_kind, text, is_stock = raised[name]
    assert (found_kind, message in text) == (kind, True), f"{found_kind}: {text}"
    assert is_stock, f"after {name} the model is not stock"


def test_every_provoked_failure_is_expected_above():
    marks = test_a_failure_has_one_clear_error_and_leaves_the_model_stock.pytestmark
    assert {row[0] for row in marks[0].args[1]} == set(replay_failures.FAILURES)
