"""Configurations of tiny Mixture-of-Experts models: for tests, benchmarks and the tiny recipe."""

from __future__ import annotations

from typing import Any


def tiny_config(
    *,
    layers: int = 4,
    hidden: int = 64,
    experts: int = 8,
    top_k: int = 2,
    vocab: int = 128,
    heads: int = 4,
    groups: int = 2,
    head_dim: int = 64,
    expert_size: int = 32,
    dense_size: int = 96,
    **fields: Any,
) -> Any:
    """Return a small Qwen3MoeConfig.

    Args:
        layers, hidden, vocab: Sizes of the model.
        experts, top_k, expert_size: Sizes of the routed experts.
        heads, groups, head_dim: Sizes of attention; SGLang on a CPU needs a head size of 64.
        dense_size: Width of the layers without experts.
        **fields: Any other field of Qwen3MoeConfig.
    """
    from transformers import Qwen3MoeConfig

    defaults: dict[str, Any] = {
        "norm_topk_prob": True,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=dense_size,
        moe_intermediate_size=expert_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        num_experts=experts,
        num_experts_per_tok=top_k,
        **(defaults | fields),
    )
