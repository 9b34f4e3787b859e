"""recipes.model: which modules are built where, and what a layout costs in memory."""

import pytest
import torch
from megatron_worlds import run_world
from tiny_models import tiny_qwen3_moe

from recipes.model.memory import Workload, estimate, require_fit
from recipes.model.model import _fusion_fields, resolve_spec, transformer_config
from recipes.model.parallel import ParallelLayout
from recipes.model.tiny import tiny_config
from routing_replay.errors import ConfigError

FUSIONS = ("moe_permute_fusion", "apply_rope_fusion", "bias_activation_fusion", "moe_grouped_gemm")


@pytest.mark.parametrize(
    ("spec", "has_te", "has_cuda", "expected"),
    [
        ("auto", True, True, "te"),
        ("auto", True, False, "local"),
        ("auto", False, False, "local"),
        ("local", False, True, "local"),
        ("local", True, True, "local"),
        ("te", True, True, "te"),
    ],
)
def test_transformer_engine_is_taken_where_it_runs(spec, has_te, has_cuda, expected):
    assert resolve_spec(spec, has_te=has_te, has_cuda=has_cuda) == expected


@pytest.mark.parametrize("spec", ["auto", "te"])
def test_cuda_without_transformer_engine_is_refused_unless_local_is_asked_for(spec):
    message = r"Transformer Engine is not installed.*routing_replay\[te\].*layer_spec: local"
    with pytest.raises(ConfigError, match=message):
        resolve_spec(spec, has_te=False, has_cuda=True)


def test_the_transformer_engine_spec_needs_a_device():
    with pytest.raises(ConfigError, match="cannot run here; expected a CUDA device"):
        resolve_spec("te", has_te=True, has_cuda=False)


def test_an_unknown_spec_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown layer spec.*Did you mean 'local'"):
        resolve_spec("locl", has_te=False, has_cuda=False)


@pytest.mark.parametrize(("spec", "is_on"), [("te", True), ("local", False)])
def test_fusions_come_with_transformer_engine(spec, is_on):
    fields = _fusion_fields(spec)
    assert [fields[name] for name in FUSIONS] == [is_on] * len(FUSIONS)


LAYOUTS = {
    "dp2": ParallelLayout(),
    "tp2": ParallelLayout(tensor=2),
    "tp2-etp1-ep2": ParallelLayout(tensor=2, expert=2, expert_tensor=1),
    "ep2": ParallelLayout(expert=2),
    "pp2": ParallelLayout(pipeline=2),
    "pp2-vpp2": ParallelLayout(pipeline=2, virtual_pipeline=2),
}


@pytest.fixture(scope="module")
def measured():
    folder = tiny_qwen3_moe(dense_layers=(1,), vocab=131)
    return run_world("memory_checks:measure", 2, folder, LAYOUTS, None, timeout_s=500)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_estimate_of_weights_and_gradients_is_what_each_rank_holds(measured, layout):
    for rank in measured:
        for (name, *_), parts in rank.items():
            if name == layout:
                assert parts["weights"][0] == parts["weights"][1]
                assert parts["gradients"][0] == parts["gradients"][1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_distributed", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_of_the_optimizer_is_what_the_ranks_hold(
    measured, layout, dtype, is_distributed
):
    parts = [rank[layout, dtype, is_distributed]["optimizer"] for rank in measured]
    held, estimated = (sum(values) for values in zip(*parts, strict=True))
    # A shard's end is rounded up for each of 2 ranks, dense and expert: 4 elements of 12 bytes.
    assert held <= estimated <= held + 4 * 12
    for rank_held, rank_estimated in parts:
        # Buckets are cut in equal parts with their padding, so ranks differ a little.
        assert rank_held == pytest.approx(rank_estimated, rel=0.1 if is_distributed else 0)


def qwen3_30b():
    """The published sizes of Qwen3-30B-A3B."""
    return transformer_config(
        tiny_config(
            layers=48,
            hidden=2048,
            experts=128,
            top_k=8,
            vocab=151936,
            heads=32,
            groups=4,
            head_dim=128,
            expert_size=768,
            dense_size=6144,
        ),
        LAYOUT_30B,
        dtype=torch.bfloat16,
        recompute="full",
    )


LAYOUT_30B = ParallelLayout(tensor=2, expert=8, expert_tensor=1)


def test_a_layout_that_does_not_fit_is_refused_and_more_ranks_fit():
    gpu_bytes = 80 * 10**9
    config = qwen3_30b()

    def needed(num_ranks):
        workload = Workload(
            num_ranks=num_ranks, microbatch_tokens=17408, distributed_optimizer=True
        )
        return estimate(config, LAYOUT_30B, workload)

    # 30.5e9 parameters; 29e9 are experts, of which a rank holds an eighth: 3.62e9. Adam, masters
    # and moments of them alone are 12 * 3.62e9 = 43.5 GB on 8 ranks, half of it on 16.
    assert needed(8).optimizer == pytest.approx(43.5e9 + 12 * 1.54e9 / 8, rel=0.05)
    assert needed(8).weights == pytest.approx(2 * (3.62e9 + 0.77e9), rel=0.02)
    with pytest.raises(ConfigError, match=r"does not fit.*got \d+\.\d+ GiB \(weights 8\.\d+, grad"):
        require_fit(needed(8), gpu_bytes)
    require_fit(needed(16), gpu_bytes)


def test_a_full_recomputation_and_bfloat16_logits_lower_the_estimate():
    shape = {"num_ranks": 16, "microbatch_tokens": 17408, "distributed_optimizer": True}
    config = qwen3_30b()
    full = estimate(config, LAYOUT_30B, Workload(**shape))
    # Logits of 17,408 tokens x 75,968: 2 + 2 bytes each with the gradient, 4 for the copy.
    assert full.logits == 17408 * 75968 * 8
    narrow = estimate(config, LAYOUT_30B, Workload(**shape, fp32_logits=False))
    assert narrow.logits == full.logits // 2
    config.recompute_granularity = None
    assert estimate(config, LAYOUT_30B, Workload(**shape)).activations > 10 * full.activations
