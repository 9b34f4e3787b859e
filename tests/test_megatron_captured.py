"""Routers that a CUDA graph captures: buffers, receipt, refusals. The capture itself needs a GPU.

`test_gpu_graphs.py` captures; here a stand-in runs what a graph would run (captured_checks.py).
"""

import pytest
import torch
from captured_checks import CASES
from megatron_worlds import run_world

from routing_replay.errors import PreflightError
from routing_replay.megatron import captured


@pytest.fixture(scope="module")
def world():
    if torch.cuda.is_available():
        pytest.skip("stand-ins for CUDA graphs, on a machine with the real ones")
    return run_world("captured_checks:all_of_them", 1, CASES, timeout_s=300)[0]


def test_captured_routers_replay_and_record_bitwise_as_routers_that_are_called(world):
    assert world["cases"] == []


def test_a_trace_of_a_router_repeats_on_its_buffers_without_any_python(world):
    assert world["traced"] == []


def test_layers_that_shall_not_replay_route_live_in_a_graph_too(world):
    assert world["edges"]["some layers"] == []
    assert world["edges"]["replayed"] == [False, True, True, False]


def test_a_router_that_no_graph_of_ours_ran_breaks_the_receipt(world):
    kind, message = world["edges"]["skipped"]
    assert kind == "ReplayError" and "0 forward passes" in message


@pytest.mark.parametrize("what", ["watching", "record_live"])
def test_what_needs_a_call_of_the_router_is_refused(world, what):
    kind, message = world["edges"][what]
    assert kind == "ConfigError" and "sees no router that a CUDA graph runs" in message


def test_graphs_that_came_before_the_handle_are_refused(world):
    kind, message = world["edges"]["late"]
    assert kind == "PreflightError" and "captured before replay was attached" in message


def test_older_versions_of_megatron_are_refused(monkeypatch):
    monkeypatch.setattr(captured, "installed_version", lambda: captured.Version("0.18.2"))
    with pytest.raises(PreflightError, match="later megatron-core") as caught:
        captured.buffers_of([], [])
    assert "0.18.2" in str(caught.value)
