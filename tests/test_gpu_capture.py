"""Capture and kernels inside CUDA graphs, every row of many steps. HAS NOT BEEN RUN ON A GPU.

Without CUDA the same steps run one by one on the CPU, and the kernels in Triton's interpreter: a
dry run of the scripts, which proves nothing about GPUs.
"""

import importlib.util

import pytest
import torch
from triton_process import run_check

STEPS = 1000 if torch.cuda.is_available() else 6


def _check(device, name, *arguments):
    import gpu_capture_checks  # imported where the kernel runs

    return getattr(gpu_capture_checks, name)(device, *arguments)


@pytest.mark.parametrize("has_kernel", [False, True], ids=["torch", "kernel"])
@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_every_captured_row_of_overlapping_steps_is_right(function, has_kernel):
    assert run_check(_check, "captured_rows", function, has_kernel, STEPS) == []


@pytest.mark.parametrize("form", ["softmax", "pre_softmax", "sigmoid"])
def test_the_replay_router_in_a_graph_replays_the_rows_of_every_step(form):
    assert run_check(_check, "replayed_rows", form, STEPS) == []


@pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None,
    reason="SGLang is not installed: its own select_experts is not checked in a graph",
)
@pytest.mark.parametrize("num_groups", [None, 4], ids=["softmax", "groups"])
def test_sglangs_own_selection_is_captured_in_a_graph(num_groups):
    from gpu_sglang_checks import selected_rows

    if num_groups and not torch.cuda.is_available():
        pytest.skip("SGLang's grouped selection is a CUDA kernel")
    assert selected_rows(num_groups, STEPS) == []
