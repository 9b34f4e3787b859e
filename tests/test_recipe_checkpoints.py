"""recipes.minirl.checkpoints: what an interruption leaves behind never looks like a checkpoint."""

import functools
import shutil
from types import SimpleNamespace

import pytest
import torch
from megatron_worlds import run_world
from safetensors.torch import load_file, save_file
from tiny_models import tiny_qwen3_moe, write_tiny_glm4_moe

from recipes.minirl import checkpoints
from recipes.model.optimizer_state import require_resumable
from recipes.model.parallel import ParallelLayout
from routing_replay.errors import ConfigError


class Killed(BaseException):
    """Stands for the process that dies here."""


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())


def make(tmp_path, *steps):
    for step in steps:
        folder = checkpoints.checkpoint_of_step(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("weights")


def test_a_run_killed_while_it_removes_a_checkpoint_keeps_the_others_and_clears_up_later(
    tmp_path, monkeypatch
):
    make(tmp_path, 1, 2)

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        # The first call clears what an earlier removal left, the second is the removal.
        calls = iter([lambda *_, **__: None, die])
        patched.setattr(shutil, "rmtree", lambda *a, **k: next(calls)(*a, **k))
        checkpoints._remove(checkpoints.checkpoint_of_step(tmp_path, 1))
    assert folders(tmp_path) == [".step_000001.removed", "step_000002"]
    assert checkpoints.newest(tmp_path) == checkpoints.checkpoint_of_step(tmp_path, 2)

    make(tmp_path, 3)
    checkpoints._remove(checkpoints.checkpoint_of_step(tmp_path, 2))
    assert folders(tmp_path) == ["step_000003"]


LAYOUTS = {
    1: {"one": ParallelLayout()},
    2: {
        "dp2": ParallelLayout(),
        "tp2": ParallelLayout(tensor=2),
        "pp2-vpp2": ParallelLayout(pipeline=2, virtual_pipeline=2),
    },
    4: {
        "dp4": ParallelLayout(),
        "dp2-pp2": ParallelLayout(pipeline=2),
        "tp2-ep4": ParallelLayout(tensor=2, expert=4, expert_tensor=1),
    },
}
# Four ranks take a minute of processor time.
CASES = [
    pytest.param(ranks, layout, dtype, is_distributed, marks=[pytest.mark.slow] * (ranks > 2))
    for ranks, layouts in LAYOUTS.items()
    for layout in layouts
    for dtype in ("float32", "bfloat16")
    for is_distributed in (True, False)
]


@pytest.fixture(scope="module")
def resumed_world(tmp_path_factory):
    """Results of a world of so many ranks, each started once."""
    generator = torch.Generator().manual_seed(0)
    batch = [[torch.randint(0, 128, (16,), generator=generator) for _ in range(2)]] * 2

    @functools.cache
    def results(ranks):
        out = tmp_path_factory.mktemp(f"ranks{ranks}")
        arguments = tiny_qwen3_moe(), str(out), LAYOUTS[ranks], batch
        return out, run_world("resume_checks:resume", ranks, *arguments)

    return results


@pytest.mark.parametrize(("ranks", "layout", "dtype", "is_distributed"), CASES)
def test_the_step_after_a_resume_is_the_uninterrupted_one_bit_for_bit(
    resumed_world, ranks, layout, dtype, is_distributed
):
    for result in resumed_world(ranks)[1]:
        case = result[layout, dtype, is_distributed]
        assert case["loaded"]
        assert case["norms"][0] == case["norms"][1]
        assert case["moved"]
        assert case["resumed"]
        assert case["progress"] == checkpoints.Progress(step=1, prompts_consumed=2)


def test_another_number_of_ranks_is_refused_on_every_rank(resumed_world):
    run_dir = resumed_world(1)[0] / "one-float32-True"
    errors = run_world("resume_checks:resume_elsewhere", 2, tiny_qwen3_moe(), str(run_dir), None)
    for error in errors:
        assert error.startswith("the optimizer state is of another parallel layout; expected")
        assert "'ranks': 2" in error
        assert "'ranks': 1" in error


def test_routing_biases_stay_float32_in_a_bfloat16_model_and_what_it_publishes(tmp_path):
    source = write_tiny_glm4_moe(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    # bfloat16 has steps of 1/32 near 5: all eight biases would be 5.0 or 5.03125.
    bias = 5.0 + torch.arange(8) / 256
    names = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert len(names) == 2  # the first of three layers is dense
    save_file(tensors | {n: bias.clone() for n in names}, source / "model.safetensors")
    run_world("resume_checks:routing_biases", 1, source, str(tmp_path))
    for folder in ("saved", "published"):
        written = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(written[name], bias) for name in names)
        assert written["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("option", ["use_precision_aware_optimizer", "optimizer_cpu_offload"])
def test_an_optimizer_whose_state_cannot_be_restored_is_refused(option):
    with pytest.raises(ConfigError, match=rf"a run with {option} cannot be resumed.*Turn the"):
        require_resumable(SimpleNamespace(**{option: True}))
