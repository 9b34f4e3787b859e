"""Replay on one GPU, without Transformer Engine and SGLang. HAS NOT BEEN RUN ON A GPU.

`python -m tools.gpu` runs it first. Without CUDA the same tests run on the CPU: a dry run of the
scripts, which proves nothing about GPUs.
"""

import pytest
import torch
from megatron_worlds import run_world, selected
from replay_cases import cases as replay_cases
from tiny_models import tiny_qwen3_moe

from recipes.model.parallel import ParallelLayout

NAMES = [case.name for case in replay_cases(1)]


@pytest.fixture(scope="module")
def matrix(request):
    """The findings of the selected configurations, of one rank."""
    return run_world("gpu_checks:matrix", 1, selected(request, "name"), timeout_s=1200)[0]


@pytest.mark.parametrize("name", NAMES)
def test_replay_is_exact_in_deterministic_mode(matrix, name):
    assert matrix[name] == []


def test_replay_recording_and_agreement_never_wait_for_the_device():
    assert run_world("gpu_checks:syncs", 1) == [True]


def test_passes_without_determinism_are_counted(record_property):
    counts = run_world("gpu_checks:without_determinism", 1, 5)[0]
    for name, count in counts.items():
        record_property(f"{name} passes of 5 that equal the first bitwise", count)
    # Replay adds no noise of its own: it is as reproducible as the stock pass.
    assert counts["replayed"] >= counts["stock"]


def test_a_resumed_step_is_the_uninterrupted_one_with_bfloat16_and_the_distributed_optimizer(
    tmp_path,
):
    generator = torch.Generator().manual_seed(0)
    batch = [[torch.randint(0, 128, (16,), generator=generator) for _ in range(2)]] * 2
    cases = [("one", ParallelLayout(), dtype, True) for dtype in ("bfloat16", "float32")]
    arguments = tiny_qwen3_moe(), str(tmp_path), cases, batch
    (result,) = run_world("resume_checks:resume", 1, *arguments)
    for case in result.values():
        assert case["loaded"]
        assert case["moved"]
        assert case["resumed"]
