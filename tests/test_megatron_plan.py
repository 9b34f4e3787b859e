"""recipes.minirl --dry-run: every preset has a plan that fits; a contradiction is an error."""

import json
import re
from dataclasses import replace

import pytest
import torch

from recipes.minirl.launch import plan
from recipes.minirl.policy import models
from recipes.minirl.settings.command_line import parse_command, preset_names
from recipes.model import flops, fp8, memory, meta
from recipes.model.model import transformer_config
from recipes.model.parallel import ParallelLayout
from recipes.model.tiny import tiny_config
from routing_replay.errors import CheckpointError, ConfigError

MODE = ["--routing-replay-mode", "R3"]
H100_PRESETS = [name for name in preset_names() if name.endswith("xh100")]
GPU_PRESETS = [*H100_PRESETS, "qwen3_30b_a3b_8xb200", "deepseek_v3_288xh200"]


def plan_of(name, *flags):
    command = parse_command(["--preset", name, *MODE, *flags, "--dry-run"])
    assert command.action == "dry-run"
    return plan.plan_text(command.config)


def total_gib(text):
    return float(re.search(r"Memory per GPU, estimated: ([0-9.]+) GiB", text).group(1))


@pytest.fixture(scope="module")
def plans():
    return {name: plan_of(name) for name in preset_names()}


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_plan(name, plans):
    text = plans[name]
    assert total_gib(text) > 0
    # Trainers on several machines start by a command that waits for the other machines.
    assert re.search(r"-m recipes\.minirl\.(train|node) RUN_DIR", text)
    for leg in ("rollout", "score", "update", "weights"):
        assert re.search(rf"^  {leg} [0-9.]+ s = ", text, re.MULTILINE)


@pytest.mark.parametrize("name", GPU_PRESETS)
def test_a_preset_for_gpus_leaves_memory_free_and_says_that_it_has_not_run(name, plans):
    # 80 GB are 74.5 GiB, 141 and 180 GB are 131.3 and 167.6; 8 % of them are not usable.
    capacity = {"h100": 74.5, "h200": 131.3, "b200": 167.6}[name[-4:]]
    assert total_gib(plans[name]) < 0.92 * capacity
    assert "Has not been run" in " ".join(
        (plan.ARCHITECTURES.parent / f"{name}.yaml").read_text().replace("#", "").split()
    )


def test_the_memory_of_the_30b_preset_is_that_of_the_review(plans):
    # 16 ranks, EP 8, TP 2: per rank 128 / 8 experts x 48 layers x 3 x 2048 x 768 = 3,623,878,656.
    text = plans["qwen3_30b_a3b_24xh100"]
    assert "(experts 3623878656)" in text
    # Weights 2 B, gradients 4 B; AdamW 12 B, over 2 expert replicas and 8 dense ones.
    dense = 4400822272 - 3623878656
    optimizer = 12 * (3623878656 / 2 + dense / 8)
    assert f"optimizer {optimizer / 2**30:.2f}" in text


@pytest.mark.parametrize("name", GPU_PRESETS)
def test_the_estimate_counts_the_parameters_that_megatron_builds(name, plans):
    config = parse_command(["--preset", name, *MODE]).config
    layout = models.parallel_layout(config.training)
    model = plan._model_config(config, layout)
    built = re.findall(r"(\d+) \(experts (\d+)\)", plans[name])
    assert len(built) == layout.pipeline
    for stage, (total, experts) in enumerate(built):
        counted = memory.num_parameters(model, layout, stage)
        assert (int(total) - int(experts), int(experts)) == counted


def test_a_pipeline_of_94_layers_has_four_stages_and_the_time_to_fill_them(plans):
    text = plans["qwen3_235b_a22b_160xh100"]
    # 16 ranks of a stage share 128 experts of 23, 24, 24 and 23 layers: 8 x 3 x 4096 x 1536 each.
    experts = [int(n) for n in re.findall(r"\(experts (\d+)\)", text)]
    assert experts == [8 * layers * 3 * 4096 * 1536 for layers in (23, 24, 24, 23)]
    # 1,024 responses of 7,024 tokens on 8 data-parallel ranks: 52 packs of 17,408 tokens. Three
    # stages wait for the first pack, and the first for the last: (52 + 3) / 52.
    assert "x 1.06 to fill 4 stages" in text


def test_meta_counts_interleaved_stages_and_ends_its_world():
    layout = ParallelLayout(tensor=2, pipeline=2, virtual_pipeline=2, expert=2, expert_tensor=1)
    model = transformer_config(tiny_config(layers=4), layout)
    counts = meta.parameters_by_stage(model, layout, 4)
    expected = [memory.num_parameters(model, layout, stage) for stage in range(2)]
    assert [(c.dense, c.experts) for c in counts] == expected
    assert not torch.distributed.is_initialized()
    assert torch.cuda.current_device() != torch.device("meta")


def test_flops_of_the_30b_model_are_those_of_its_active_parameters():
    config = parse_command(["--preset", "qwen3_30b_a3b_24xh100", *MODE]).config
    model = plan._model_config(config, models.parallel_layout(config.training))
    # 3.3e9 active parameters, of which the embedding's 0.31e9 are looked up.
    assert flops.active_parameters(model) == pytest.approx(3.03e9, rel=0.01)
    # Attention at 17,408 tokens: 4 x 32 heads x 128 x 48 layers x 8,704 keys = 6.8e9.
    attention = flops.forward_flops(model, 17408) - 2 * flops.active_parameters(model)
    assert attention == pytest.approx(4 * 32 * 128 * 48 * 8704)


def test_a_model_without_a_config_names_those_that_need_none():
    with pytest.raises(CheckpointError, match="no config.json.*Qwen3-235B-A22B.*--model"):
        plan_of("qwen3_30b_a3b_24xh100", "--model", "elsewhere/Qwen3-14B")


def test_the_deepseek_plan_counts_671_billion_parameters_and_serves_them_in_fp8(plans):
    text = plans["deepseek_v3_288xh200"]
    # 64 ranks of a stage have 4 of 256 experts in each MoE layer. Of 61 layers the first three are
    # dense: stages of 13, 15, 15 and 15 MoE layers.
    experts = [int(n) for n in re.findall(r"\(experts (\d+)\)", text)]
    assert experts == [4 * layers * 3 * 7168 * 2048 for layers in (13, 15, 15, 15)]
    # 671.03e9 parameters without the prediction layer: one byte each, the vocabulary's 2 x 129280
    # x 7168 two: 672.9 GB. A server's 8 GPUs hold 78.3 GiB each.
    assert "672.9 GB x (1 write + 4 reads)" in text
    assert "weights 78.3 GiB" in text


def test_the_cache_of_latent_attention_holds_one_latent_per_token_on_every_gpu(plans):
    # 141e9 x 0.85 bytes less 84.1e9 of weights, over 61 layers x (512 + 64) x 2 bytes.
    tokens = int(re.search(r"its cache holds (\d+) tokens", plans["deepseek_v3_288xh200"]).group(1))
    assert tokens == pytest.approx((141e9 * 0.85 - 672.88e9 / 8) / (61 * 576 * 2), rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nnodes", "1"], "does not fit into a GPU's memory.*distributed_optimizer"),
        (["--no-distributed-optimizer"], "does not fit into a GPU's memory"),
        (["--recompute", "none"], "does not fit into a GPU's memory.*recompute: full"),
        (["--plan-gpu-gb", "40"], "does not fit into a GPU's memory.*expert_parallel"),
        (["--tensor-parallel", "8"], "tensor does not divide the model's num_query_groups"),
        (["--expert-parallel", "6"], "expert does not divide the model's num_moe_experts"),
        (["--expert-parallel", "32"], "does not fit the number of ranks.*= 32 ranks"),
        (
            ["--nnodes", "10", "--pipeline-parallel", "5", "--minibatch-size", "1024"],
            "num_layers.*--first-stage-layers 9 and --last-stage-layers 9",
        ),
        (["--first-stage-layers", "20"], "stage of its own size needs a pipeline"),
        (["--pipeline-parallel", "3"], "must divide nnodes \\* nproc"),
        (["--virtual-pipeline", "2"], "virtual pipeline stages need a pipeline"),
        (["--nproc", "16", "--nnodes", "1"], "fewer GPUs than trainer processes"),
        (
            ["--pipeline-parallel", "2", "--virtual-pipeline", "2"],
            "packed microbatches cannot be interleaved",
        ),
        (["--max-new-tokens", "40960"], "longer than the model's positions.*got 1024 \\+ 40960"),
        (["--plan-disk-gb-per-s", "0"], "'plan_disk_gb_per_s' is out of range"),
    ],
)
def test_a_trainer_that_contradicts_itself_is_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        plan_of("qwen3_30b_a3b_24xh100", *flags)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tp 3", "--tp does not fit the model; expected a divisor of.*num_attention_heads 32"),
        ("--tp=4 --ep 3", "--ep does not fit the model; expected a divisor of --tp 4; got 3"),
        ("--tp 8 --dp 2", "more GPUs than it has; expected .* at most 8 .*; got 8 \\* 1 \\* 2"),
        ("--tp two", "server argument cannot be read; got .*two"),
        ("--tp 0", "--tp is out of range"),
        ("--tp 4 --quantization fp8", "cannot load the weights.*rollout_weights: fp8"),
        ("--tp 4 --enable-dp-attention", "other tokens' routes"),
        ("--tp 1 --mem-fraction-static 0.7", "cannot hold the weights.*Raise --tp"),
    ],
)
def test_a_server_that_contradicts_itself_is_refused(arguments, message):
    command = parse_command(["--preset", "qwen3_30b_a3b_24xh100", *MODE])
    rollout = replace(command.config.rollout, server_arguments=tuple(arguments.split()))
    with pytest.raises(ConfigError, match=message):
        plan.plan_text(replace(command.config, rollout=rollout))


@pytest.fixture
def fp8_model(tmp_path):
    config = json.loads((plan.ARCHITECTURES / "Qwen3-30B-A3B" / "config.json").read_text())
    text = json.dumps(config | {fp8.CONFIG_KEY: fp8.CONFIG})
    (tmp_path / "config.json").write_text(text)
    return tmp_path


def fp8_plan(arguments, *flags):
    flags = ["--rollout-weights", "fp8", *flags, "--dry-run"]
    config = parse_command(["--preset", "qwen3_30b_a3b_24xh100", *MODE, *flags]).config
    rollout = replace(config.rollout, server_arguments=tuple(arguments.split()))
    return plan.plan_text(replace(config, rollout=rollout))


def test_fp8_servers_start_from_a_quantized_checkpoint_with_half_of_the_weights(fp8_model):
    text = fp8_plan("--tp 4 --ep 4 --quantization fp8", "--rollout-model", str(fp8_model))
    assert f"--model-path {fp8_model}" in text
    # 30.5e9 bytes and once more the vocabulary's 2 x 151936 x 2048, on 4 GPUs; 14.2 GiB in bf16.
    assert "weights 7.3 GiB" in text


@pytest.mark.parametrize(
    ("arguments", "has_model", "message"),
    [
        ("--tp 4 --ep 4", False, "not in block FP8.*recipes.model.fp8 SOURCE TARGET"),
        # 768 / 4 = 192 rows are a block and a half.
        ("--tp 4", True, "inside of an FP8 block; expected a multiple of 128.*768 / 4.*--ep"),
        ("--tp 4 --ep 4 --quantization awq", True, "cannot load the weights"),
    ],
)
def test_fp8_servers_that_contradict_themselves_are_refused(
    fp8_model, arguments, has_model, message
):
    flags = ["--rollout-model", str(fp8_model)] if has_model else []
    with pytest.raises((ConfigError, CheckpointError), match=message):
        fp8_plan(arguments, *flags)


def test_a_disk_that_is_too_slow_for_the_client_is_a_warning():
    # 61 GB, written and read once: 122 s at 1 GB/s, 611 s at 0.2 GB/s.
    name = "qwen3_30b_a3b_24xh100"
    assert "Warning" not in plan_of(name)
    assert "given 600 s to load" in plan_of(name, "--plan-disk-gb-per-s", "0.2")


def test_server_and_trainer_may_not_share_gpus():
    with pytest.raises(ConfigError, match="share GPUs"):
        plan_of("qwen3_30b_a3b_8xb200", "--trainer-gpus", "0,1,2,3")


def test_a_layout_that_does_not_fit_the_model_is_refused():
    sizes = ["--minibatch-size", "3", "--microbatch-size", "1", "--prompts-per-step", "3"]
    with pytest.raises(ConfigError, match="expert"):
        plan_of("tiny_cpu", "--nproc", "3", "--expert-parallel", "3", *sizes)
