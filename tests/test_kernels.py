"""Both kernels: what their use requires, and what NVIDIA's compiler makes of them without a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from routing_replay import kernels
from routing_replay.errors import ConfigError

needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None,
    reason="needs Triton's compiler, which TRITON_INTERPRET=1 turns off",
)


def test_a_missing_triton_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="^a kernel is asked for, but Triton is not installed"):
        kernels.require_device(torch.device("cuda"))


def test_a_cpu_is_refused_unless_triton_interprets(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"cannot run on this device.*got cpu.*`kernel` off"):
        kernels.require_device(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels.require_device(torch.device("cpu"))


def test_a_gpu_that_is_too_old_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ConfigError, match=r"too old.*8\.0 or newer; got 7\.5 \(Tesla T4\)"):
        kernels.require_device(torch.device("cuda"))


def test_the_package_loads_triton_only_with_a_kernel():
    code = "import sys, routing_replay.kernels; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_router_compiles_to_one_wide_read_of_the_logits_without_spilling(capability):
    from kernel_compilation import compile_router

    forward, backward = compile_router(capability, num_experts=128, top_k=8, dtype="fp32")
    # 16 float32 values per thread are four loads of 16 bytes; the backward reads gradients too.
    assert forward.num_wide_loads == 4
    assert backward.num_wide_loads == 4 + 4
    assert forward.num_spilled_bytes == backward.num_spilled_bytes == 0


@needs_compiler
@pytest.mark.parametrize(
    ("num_experts", "top_k", "dtype", "form", "num_groups"),
    [
        (256, 8, "fp32", "sigmoid", 8),
        (384, 6, "bf16", "sqrtsoftplus", 0),
        (512, 10, "fp64", "softmax", 0),
        (8, 2, "bf16", "pre_softmax", 4),
    ],
)
def test_live_tokens_biases_and_groups_compile_without_spilling(
    num_experts, top_k, dtype, form, num_groups
):
    from kernel_compilation import compile_router

    forward, backward = compile_router(
        90,
        num_experts=num_experts,
        top_k=top_k,
        dtype=dtype,
        form=form,
        has_live=True,
        num_groups=num_groups,
    )
    assert forward.num_spilled_bytes == backward.num_spilled_bytes == 0


@needs_compiler
def test_the_router_compiles_beside_an_sglang_that_replaces_functions_of_triton():
    # On a machine without CUDA its import puts plain functions in place of Triton's own.
    code = """
import triton
triton.next_power_of_2 = lambda n: 1 << max(n - 1, 0).bit_length()
from kernel_compilation import compile_router
compile_router(90, num_experts=8, top_k=2, dtype="bf16", has_live=True, num_groups=4)
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_compiler
@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_the_gates_kernel_compiles_to_one_wide_read_of_the_logits_without_spilling(function):
    from kernel_compilation import compile_gates

    kernel = compile_gates(90, num_experts=128, top_k=8, dtype="bf16", function=function)
    # 16 bfloat16 values per thread are two loads of 16 bytes.
    assert kernel.num_wide_loads == 2
    assert kernel.num_spilled_bytes == 0
