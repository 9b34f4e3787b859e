"""A loop under `Job`: R3 and R2 on two ranks with tables of their own, and bad input."""

import subprocess
import sys

import adapter_jobs
import pytest
from megatron_worlds import run_world


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    return run_world(adapter_jobs.run, 2, str(folder)), folder


@pytest.fixture(scope="module", params=[0, 1])
def results(ranks, request):
    return ranks[0][request.param]


def test_every_pass_of_the_actor_dispatches_exactly_the_rollouts_experts(results):
    assert results["R3"]["wrong"] == [0, 0]
    assert results["R3"]["differs from live"]


def test_the_log_probs_are_those_of_a_loop_of_our_own(results):
    assert results["R3"]["equals our own loop"]


def test_a_reference_pass_is_bitwise_stock(results):
    assert results["R3"]["the reference is stock"]


def test_the_metrics_count_both_ranks_tables(results):
    metrics = results["R3"]["metrics"]
    assert metrics["routing_replay/replayed_rows"] == adapter_jobs.NUM_ROWS * adapter_jobs.LAYERS
    assert 0 < metrics["routing_replay/overlap"] < 1
    assert "routing_replay/overlap_layer_1" in metrics


def test_an_update_is_a_line_in_the_last_ranks_file(ranks):
    (line,) = (ranks[1] / "metrics.jsonl").read_text().splitlines()
    assert '"step": 0' in line and "routing_replay/replayed_rows" in line


def test_uncovered_rows_are_a_metric_over_all_ranks_by_their_cause(results):
    metrics = results["gaps"]["metrics at the bound"]
    # 4 of rank 1's 24 rows; rank 0 has 25.
    assert metrics["routing_replay/uncovered_absent"] == pytest.approx(4 / 49)
    assert [name for name in metrics if "uncovered" in name] == ["routing_replay/uncovered_absent"]
    assert not [name for name in results["R3"]["metrics"] if "uncovered" in name]


def test_too_many_uncovered_rows_on_one_rank_end_both(ranks):
    assert [rank["gaps"]["at the bound"] for rank in ranks[0]] == [None, None]
    messages = [rank["gaps"]["above it"] for rank in ranks[0]]
    assert "another rank could not open the pass" in messages[0]
    assert "too many rows are not covered by routes" in messages[1]
    assert "16.67%: absent 4" in messages[1]


def test_r2_replays_what_the_old_policys_pass_chose(results):
    assert results["R2"]["own routes are the stock pass"]
    assert results["R2"]["moved routers take the recorded experts"]


def test_r2_without_an_old_policys_pass_is_refused(results):
    assert "no pass of the old policy was recorded" in results["R2"]["without a recording"]


def test_routes_missing_on_one_rank_end_both(ranks):
    messages = [rank["failures"]["one rank"] for rank in ranks[0]]
    assert "another rank could not open the pass" in messages[0]
    assert "a batch of the actor has no routes" in messages[1]


def test_a_batch_that_cannot_be_read_on_one_rank_ends_both(ranks):
    messages = [rank["failures"]["filtered"] for rank in ranks[0]]
    assert "another rank could not open the pass" in messages[0]
    assert "tokens and routes are of different numbers of sequences" in messages[1]


def test_a_pass_without_a_replayed_row_is_an_error_at_any_time(results):
    assert "no token of the first pass has routes" in results["failures"]["first"]
    assert "no token of a pass of the actor has routes" in results["failures"]["mid"]
    assert "ended without a single replayed row" in results["failures"]["end"]


def test_a_second_model_needs_a_job_of_its_own(results):
    assert "another model" in results["failures"]["other"]


ENDS_AT_ONCE = """
from recipes.model import cpu
from routing_replay.adapters.job import Job
from routing_replay.adapters.settings import AdapterSettings
Job(AdapterSettings(mode="R2"), "framework 1.0").require_replayed_at_exit()
"""


def test_a_process_that_ends_without_a_replayed_row_fails():
    done = subprocess.run([sys.executable, "-c", ENDS_AT_ONCE], text=True, capture_output=True)
    assert done.returncode == 1
    assert "error: the job ended without a single replayed row" in done.stderr
    failed = ENDS_AT_ONCE + "raise ValueError('another error')"
    done = subprocess.run([sys.executable, "-c", failed], text=True, capture_output=True)
    assert done.returncode == 1
    assert "another error" in done.stderr and "replayed row" not in done.stderr
