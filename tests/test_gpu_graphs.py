"""CUDA graphs of routers, and pipelines by hand, on one GPU. HAS NOT BEEN RUN ON A GPU.

Without CUDA stand-ins run in place of the graphs (captured_checks.py): a dry run of the scripts.
"""

import pytest
from megatron_worlds import run_kernel_world, run_world
from replay_cases import Case

CASES = [Case(), Case(router="groups", is_packed=True), Case(router="sigmoid_bias")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_captured_routers_replay_and_record_the_rows_of_every_microbatch(case):
    assert run_world("gpu_checks:captured", 1, case, False) == [[]]


def test_captured_routers_replay_with_the_kernel():
    assert run_kernel_world("gpu_checks:captured", 1, Case(), True) == [[]]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["F1F2B1B2", "F1F2B2B1"])
def test_a_graphs_backward_is_of_its_own_microbatch_whatever_ran_in_between(order):
    assert run_world("gpu_checks:interleaved_graphs", 1, order) == [[]]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["F1F2B1B2", "F1F2B2B1"])
def test_a_pipelines_recomputations_replay_their_own_microbatch(order):
    (found,) = run_world("gpu_checks:interleaved_chunks", 1, order)
    assert found["dispatched"] == []
    assert found["receipt"] and found["lines"] == 2 * 4  # microbatches x layers
