"""What a Hugging Face config means in Megatron's terms, by architecture; arithmetic on names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from routing_replay.errors import CheckpointError

# transformers' config classes share no type with the fields that are read here.
HFConfig = Any
Fields = dict[str, Any]


def fields_of(hf: HFConfig) -> Fields:
    """Return the fields of Megatron's configuration that follow from the architecture.

    Args:
        hf: transformers' config of one of `SUPPORTED`.

    Raises:
        CheckpointError: A feature of it that is not supported.
    """
    return _common_fields(hf) | SUPPORTED[hf.model_type](hf)


def _common_fields(hf: HFConfig) -> Fields:
    rope = getattr(hf, "rope_parameters", None) or {"rope_theta": getattr(hf, "rope_theta", None)}
    rope_types = ("default", "yarn") if hf.model_type in LATENT else ("default",)
    if rope.get("rope_type", "default") not in rope_types:
        raise _unsupported(hf, "rope_type", " or ".join(rope_types), rope["rope_type"])
    if hf.hidden_act != "silu":
        raise _unsupported(hf, "hidden_act", "silu", hf.hidden_act)
    return {
        "architecture": hf.model_type,
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        # bfloat16 logits of close experts collide; the selection then depends on top-k's tie rule.
        "moe_router_dtype": "fp32",
        "vocab_size": hf.vocab_size,
        "max_sequence_length": hf.max_position_embeddings,
        "tie_embeddings": bool(hf.tie_word_embeddings),
        "rotary_base": rope["rope_theta"],
        "rotary_percent": rope.get("partial_rotary_factor", 1.0),
    }


def _qwen3_moe_fields(hf: HFConfig) -> Fields:
    if hf.attention_bias:
        raise _unsupported(hf, "attention_bias", False, True)
    if hf.sliding_window is not None:
        raise _unsupported(hf, "sliding_window", None, hf.sliding_window)
    return {
        "num_moe_experts": hf.num_experts,
        "moe_layer_freq": [
            int(i not in hf.mlp_only_layers and (i + 1) % hf.decoder_sparse_step == 0)
            for i in range(hf.num_hidden_layers)
        ],
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not hf.norm_topk_prob,
        "qk_layernorm": True,
    }


def _glm4_moe_fields(hf: HFConfig) -> Fields:
    return _sigmoid_fields(hf) | {"qk_layernorm": hf.use_qk_norm, "add_qkv_bias": hf.attention_bias}


def _sigmoid_fields(hf: HFConfig) -> Fields:
    """The router of DeepSeek-V3, which GLM-4-MoE has too: sigmoid scores, a bias, groups."""
    if not hf.norm_topk_prob:
        raise _unsupported(hf, "norm_topk_prob", True, False)
    # Hugging Face ranks groups by their best 2 experts, Megatron by their best k / group_topk.
    if hf.n_group > 1 and hf.num_experts_per_tok != 2 * hf.topk_group:
        raise _unsupported(
            hf, "topk_group", "num_experts_per_tok / 2 (or n_group 1)", hf.topk_group
        )
    return _shared_expert_fields(hf) | {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        # The bias is the checkpoint's; balancing by updates of it belongs to pretraining.
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": hf.routed_scaling_factor,
        "moe_router_num_groups": hf.n_group if hf.n_group > 1 else None,
        "moe_router_group_topk": hf.topk_group if hf.n_group > 1 else None,
    }


def _shared_expert_fields(hf: HFConfig) -> Fields:
    return {
        "num_moe_experts": hf.n_routed_experts,
        "moe_layer_freq": [int(i >= hf.first_k_dense_replace) for i in range(hf.num_hidden_layers)],
        "moe_shared_expert_intermediate_size": hf.moe_intermediate_size * hf.n_shared_experts,
    }


def _deepseek_v3_fields(hf: HFConfig) -> Fields:
    if not hf.rope_interleave:
        raise _unsupported(hf, "rope_interleave", True, False)
    return _sigmoid_fields(hf) | _latent_fields(hf)


def _latent_fields(hf: HFConfig) -> Fields:
    """Multi-head latent attention, whose keys and values come from one narrow projection."""
    if hf.attention_bias:
        raise _unsupported(hf, "attention_bias", False, True)
    if hf.q_lora_rank is None:
        # Megatron then puts a norm before the queries that DeepSeek-V2-Lite does not have.
        raise _unsupported(hf, "q_lora_rank", "a number", None)
    rope = hf.rope_parameters
    fields = {
        "multi_latent_attention": True,
        "q_lora_rank": hf.q_lora_rank,
        "kv_lora_rank": hf.kv_lora_rank,
        "qk_head_dim": hf.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf.qk_rope_head_dim,
        "v_head_dim": hf.v_head_dim,
        "kv_channels": hf.qk_nope_head_dim + hf.qk_rope_head_dim,
        "num_query_groups": hf.num_attention_heads,
        "qk_layernorm": True,
        "rope_type": "rope",
    }
    if rope.get("rope_type", "default") == "default":
        return fields
    return fields | {
        "rope_type": "yarn",
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "mscale": rope.get("mscale") or 1.0,
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
    }


# Architectures with latent attention.
LATENT = ("deepseek_v3",)
SUPPORTED: dict[str, Callable[[HFConfig], Fields]] = {
    "qwen3_moe": _qwen3_moe_fields,
    "glm4_moe": _glm4_moe_fields,
    "deepseek_v3": _deepseek_v3_fields,
}


def _unsupported(hf: HFConfig, name: str, expected: object, got: object) -> CheckpointError:
    return CheckpointError(
        f"{name} of this {hf.model_type} checkpoint is not supported", expected=expected, got=got
    )
