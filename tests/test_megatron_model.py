"""recipes.model: which modules are built where, and what a layout costs in memory."""

import itertools
import re

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


def megatron_layers(layout, num_layers, stage):
    """The 0-based layers of a stage, chunk after chunk, by Megatron's own functions."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    is_interleaved = layout.virtual_pipeline > 1
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if is_interleaved else None,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
    )
    layers = []
    for chunk in range(layout.virtual_pipeline) if is_interleaved else [None]:
        first = get_transformer_layer_offset(config, chunk, stage)
        layers += range(first, first + get_num_layers_to_build(config, chunk, stage))
    return layers


@pytest.mark.parametrize(
    ("num_layers", "sizes"),
    [
        (94, {"pipeline": 4, "first_stage_layers": 23, "last_stage_layers": 23}),
        (61, {"pipeline": 4, "first_stage_layers": 16}),
        (61, {"pipeline": 8, "first_stage_layers": 7, "last_stage_layers": 6}),
        (7, {"pipeline": 2, "last_stage_layers": 3}),
        (7, {"pipeline": 2, "first_stage_layers": 3, "last_stage_layers": 4}),
        (22, {"pipeline": 3, "virtual_pipeline": 2, "first_stage_layers": 6}),
        (12, {"pipeline": 3, "virtual_pipeline": 2}),
        (5, {}),
    ],
)
def test_the_layers_of_a_stage_are_those_that_megatron_builds(num_layers, sizes):
    layout = ParallelLayout(**sizes)
    stages = [layout.layers_of(num_layers, stage) for stage in range(layout.pipeline)]
    assert stages == [megatron_layers(layout, num_layers, s) for s in range(layout.pipeline)]
    assert sorted(itertools.chain(*stages)) == list(range(num_layers))


def test_the_division_that_an_error_names_is_one():
    for num_layers, pipeline, virtual in itertools.product((61, 62, 94), (2, 4, 5, 8), (1, 2)):
        layout = ParallelLayout(pipeline=pipeline, virtual_pipeline=virtual)
        try:
            layout.stage_layers(num_layers)
        except ConfigError as error:
            named = re.findall(r"--(first|last)-stage-layers (\d+)", str(error))
            # An odd number of layers has no two equal rounds.
            assert bool(named) == (num_layers % virtual == 0), error
            if named:
                ends = {f"{end}_stage_layers": int(layers) for end, layers in named}
                sizes = {"pipeline": pipeline, "virtual_pipeline": virtual}
                ParallelLayout(**sizes, **ends).stage_layers(num_layers)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pipeline": 4}, "94 layers in 4 stages.*--first-stage-layers 23 and --last-stage-layers"),
        ({"pipeline": 4, "first_stage_layers": 95}, "do not divide the model's num_layers"),
        ({"pipeline": 2, "first_stage_layers": 40, "last_stage_layers": 40}, "do not divide"),
        ({"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 45}, "virtual_pipeline 2"),
        ({"first_stage_layers": 40}, "needs a pipeline; expected pipeline > 1"),
        ({"pipeline": 2, "last_stage_layers": -1}, "last_stage_layers is out of range"),
    ],
)
def test_stages_that_do_not_divide_the_layers_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        ParallelLayout(**sizes).stage_layers(94)


LAYOUTS = {
    "dp2": ParallelLayout(),
    "tp2": ParallelLayout(tensor=2),
    "tp2-etp1-ep2": ParallelLayout(tensor=2, expert=2, expert_tensor=1),
    "ep2": ParallelLayout(expert=2),
    "pp2-first1": ParallelLayout(pipeline=2, first_stage_layers=1),
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
