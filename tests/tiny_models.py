"""Tiny Mixture-of-Experts checkpoints in Hugging Face's format, written by transformers itself."""

import atexit
import functools
import json
import tempfile
from pathlib import Path

import torch

from recipes.model.tiny import tiny_config


def write_tiny_qwen3_moe(
    path,
    *,
    layers=4,
    hidden=64,
    experts=8,
    top_k=2,
    vocab=128,
    heads=4,
    groups=2,
    head_dim=64,
    expert_size=32,
    dense_size=96,
    dense_layers=(),
    norm_topk=True,
    tie_embeddings=False,
    dtype=torch.float32,
    seed=1,
) -> Path:
    """Writes a random Qwen3-MoE checkpoint and returns its folder.

    The weights are wide (standard deviation 0.12): with the usual 0.02 the logits of so small a
    model are flat, and a wrong layer would hardly change them. Head size 64 suits SGLang on a CPU.
    """
    from transformers import Qwen3MoeForCausalLM

    config = tiny_config(
        layers=layers,
        hidden=hidden,
        experts=experts,
        top_k=top_k,
        vocab=vocab,
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        expert_size=expert_size,
        dense_size=dense_size,
        norm_topk_prob=norm_topk,
        mlp_only_layers=list(dense_layers),
        tie_word_embeddings=tie_embeddings,
        initializer_range=0.12,
    )
    return _save(Qwen3MoeForCausalLM, config, path, dtype, seed)


def write_tiny_glm4_moe(
    path, *, layers=3, experts=8, top_k=4, n_group=4, topk_group=2, seed=1
) -> Path:
    """Writes a random GLM-4-MoE checkpoint (sigmoid router with bias and groups, shared expert)."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    config = Glm4MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_group=n_group,
        topk_group=topk_group,
        n_shared_experts=1,
        routed_scaling_factor=1.5,
        first_k_dense_replace=1,
        use_qk_norm=True,
        attention_bias=True,
        num_nextn_predict_layers=0,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.12,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return _save(Glm4MoeForCausalLM, config, path, torch.float32, seed)


def write_tiny_deepseek_v3(path, *, layers=3, experts=8, seed=1) -> Path:
    """Writes a random DeepSeek-V3 checkpoint: latent attention, the router of GLM-4-MoE."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32}
    rope |= {"original_max_position_embeddings": 128, "beta_slow": 1, "mscale": 1.0}
    config = DeepseekV3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_nope_head_dim=24,
        qk_rope_head_dim=16,
        v_head_dim=20,
        n_routed_experts=experts,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        num_mtp_layers=0,
        max_position_embeddings=512,
        rope_parameters=rope | {"mscale_all_dim": 1.0},
        tie_word_embeddings=False,
        initializer_range=0.12,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return _save(DeepseekV3ForCausalLM, config, path, torch.float32, seed)


@functools.cache
def tiny_deepseek_v3(**shape) -> Path:
    """As `tiny_qwen3_moe`, for DeepSeek-V3."""
    return write_tiny_deepseek_v3(tempfile.mkdtemp(dir=_session_folder()), **shape)


@functools.cache
def tiny_qwen3_moe(**shape) -> Path:
    """The folder of such a checkpoint, written once per process for each set of arguments."""
    return write_tiny_qwen3_moe(tempfile.mkdtemp(dir=_session_folder()), **shape)


@functools.cache
def tiny_glm4_moe(**shape) -> Path:
    """As `tiny_qwen3_moe`, for GLM-4-MoE."""
    return write_tiny_glm4_moe(tempfile.mkdtemp(dir=_session_folder()), **shape)


@functools.cache
def _session_folder():
    folder = tempfile.TemporaryDirectory(prefix="tiny-models-")
    atexit.register(folder.cleanup)
    return folder.name


def hf_logits(path, sequences) -> list[torch.Tensor]:
    """transformers' own float32 logits, one [tokens, V] for each sequence of token ids."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return [model.eval()(ids[None]).logits[0] for ids in sequences]


def _save(model_class, config, path, dtype, seed):
    torch.manual_seed(seed)
    model = model_class(config)
    # Norms, biases and the routing bias start at constants; a swap of two of them would not show.
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
    model.to(dtype).save_pretrained(path)
    # Stands in for a tokenizer's files, which a saved checkpoint must carry along.
    (Path(path) / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    return Path(path)
