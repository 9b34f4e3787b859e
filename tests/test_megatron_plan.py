"""recipes.minirl --dry-run: every preset has a plan, with the memory that its layout needs."""

import json
import re

import pytest

from recipes.minirl.command_line import parse_command, preset_names
from recipes.minirl.plan import plan_text
from routing_replay.errors import ConfigError

# Qwen3-30B-A3B's sizes, from its published config.json.
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}


def plan(tmp_path, name, *flags):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    model = ["--model", str(tmp_path)] if "30b" in name else []
    mode = ["--routing-replay-mode", "R3"]
    command = parse_command(["--preset", name, *model, *mode, *flags, "--dry-run"])
    assert command.action == "dry-run"
    return plan_text(command.config)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_plan(name, tmp_path):
    text = plan(tmp_path, name)
    assert re.search(r"Memory per GPU, estimated: [0-9.]+ GiB", text)
    assert "-m recipes.minirl.train RUN_DIR" in text


def test_the_30b_preset_fits_16_gpus_of_80_gb_and_not_8(tmp_path):
    def total(*flags):
        text = plan(tmp_path, "qwen3_30b_a3b_24xh100", *flags)
        return float(re.search(r"estimated: ([0-9.]+) GiB", text).group(1))

    # 80 GB are 74.5 GiB.
    assert total() < 74.5 < total("--nnodes", "1")


def test_a_layout_that_does_not_fit_the_model_is_refused(tmp_path):
    sizes = ["--minibatch-size", "3", "--microbatch-size", "1", "--prompts-per-step", "3"]
    with pytest.raises(ConfigError, match="expert"):
        plan(tmp_path, "tiny_cpu", "--nproc", "3", "--expert-parallel", "3", *sizes)
