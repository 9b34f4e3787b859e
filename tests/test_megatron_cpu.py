"""Stock megatron-core without a CUDA device: what is redirected, and that training really works."""

import subprocess
import sys

import pytest
import torch
from megatron_batches import hf_loss
from megatron_worlds import RankError, run_world
from tiny_models import tiny_qwen3_moe

from routing_replay.errors import ConfigError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="redirects only without CUDA")


@pytest.fixture(scope="module")
def reference():
    """A batch, and transformers' loss and gradient norm of it."""
    from transformers import AutoModelForCausalLM

    folder = tiny_qwen3_moe(layers=2)
    generator = torch.Generator().manual_seed(0)
    batch = [[torch.randint(0, 128, (16,), generator=generator) for _ in range(2)]]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss = hf_loss(model, batch)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    return folder, batch, loss.item(), norm.item()


@pytest.fixture(scope="module")
def world(reference):
    folder, batch, _, norm = reference
    return run_world("cpu_checks:run", 2, folder, batch, norm)


def test_enable_cpu_can_be_called_again(world):
    assert [result["again"] for result in world] == [True, True]


def test_cuda_names_mean_the_cpu_and_type_names_stay_for_others(world):
    for result in world:
        assert result["names"] == ({"cpu"}, "torch.FloatTensor")


def test_recomputation_restores_dropout_and_ranks_draw_their_own(world):
    for result in world:
        assert result["dropout"][0] == 0.0
    assert world[0]["dropout"][1] != world[1]["dropout"][1]


@pytest.mark.parametrize("packed", [False, True], ids=["stacked", "packed"])
def test_attention_over_context_parallel_ranks_is_causal_attention(world, packed):
    # float32 sums of at most 16 terms of size about 1.
    for result in world:
        assert max(result["attention"][packed]) < 2e-6


def test_parts_of_unequal_sizes_are_gathered_and_their_gradients_summed(world):
    for rank, result in enumerate(world):
        whole, gradient = result["uneven"]
        assert whole == [[1.0, 1.0]] * 3 + [[2.0, 2.0]]
        # Rank r weighs the whole by r + 1, so every part's gradient is 1 + 2.
        assert gradient == [[3.0, 3.0]] * (3, 1)[rank]


@pytest.mark.parametrize("layout", ["one", "tp2", "ep2", "cp2"])
def test_megatrons_optimizer_sees_the_gradient_norm_of_transformers(world, reference, layout):
    norm = reference[3]
    for result in world:
        norms, _ = result["training"][layout, torch.float32]
        assert norms[0] == pytest.approx(norm, rel=1e-4)
        assert norms[1] != pytest.approx(norm, rel=1e-3)  # the step changed the weights
        bf16_norms, _ = result["training"][layout, torch.bfloat16]
        # 8 bits of mantissa through two layers; a top-k flip may move one token.
        assert bf16_norms[0] == pytest.approx(norm, rel=0.1)


def test_a_failed_rank_ends_the_world_with_its_traceback():
    with pytest.raises(RankError, match=r"rank 1 of 2 failed(.|\n)*ValueError: planted"):
        run_world(fail_on_rank_one, 2, timeout_s=120)


def fail_on_rank_one(rank):
    if rank == 1:
        raise ValueError("planted")
    torch.distributed.barrier()  # would wait for ever


def test_a_layout_that_does_not_fit_names_the_fix():
    from recipes.model.parallel import ParallelLayout

    with pytest.raises(ConfigError, match=r"multiple of tensor \* pipeline \* context = 4 ranks"):
        ParallelLayout(tensor=2, pipeline=2).check_world(2)
    with pytest.raises(ConfigError, match=r"expert_tensor \* expert \* pipeline = 8 ranks"):
        ParallelLayout(tensor=2, expert=4).check_world(4)
    with pytest.raises(ConfigError, match="Raise pipeline, or leave virtual_pipeline at 1"):
        ParallelLayout(virtual_pipeline=2)
    with pytest.raises(ConfigError, match=r"size expert is out of range; expected an integer"):
        ParallelLayout(expert=0)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor": 4}, "tensor does not divide the model's num_query_groups"),
        ({"expert": 3}, "expert does not divide the model's num_moe_experts"),
        ({"pipeline": 3}, "do not divide the model's num_layers"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(reference, layout, message):
    from recipes.model.model import transformer_config
    from recipes.model.parallel import ParallelLayout

    with pytest.raises(ConfigError, match=message):
        transformer_config(reference[0], ParallelLayout(**layout))


def test_a_process_without_torchrun_is_a_world_of_one():
    program = (
        "from recipes.model import parallel\n"
        "parallel.initialize(parallel.ParallelLayout(), seed=1)\n"
        "import torch\n"
        "print(torch.distributed.get_world_size())\n"
        "parallel.destroy()\n"
        "print(torch.distributed.is_initialized())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240
    )
    assert result.stdout.split() == ["1", "False"], result.stderr


IMPORTED_FIRST = """
import torch
from megatron.core.fusions.fused_bias_swiglu import swiglu
from recipes.model.cpu import enable_cpu

print(enable_cpu())
print(swiglu(torch.tensor([[0.0, 2.0]], requires_grad=True)).item())
print(sum(torch._dynamo.utils.counters["frames"].values()))
"""


def test_megatron_may_be_imported_first_and_is_still_not_compiled():
    result = subprocess.run(
        [sys.executable, "-c", IMPORTED_FIRST], capture_output=True, text=True, timeout=240
    )
    # silu(0) * 2 = 0, and torch.compile has seen no frame.
    assert result.stdout.split() == ["True", "0.0", "0"], result.stderr
