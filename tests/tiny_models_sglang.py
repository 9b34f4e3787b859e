"""Tiny checkpoints of further families.

OLMoE has a softmax router without renormalisation; SGLang has no dots1 of its own.
"""

from pathlib import Path

import torch


def write_tiny_olmoe(path, *, layers=2, experts=12, top_k=3, vocab=128, seed=1) -> Path:
    """Writes a random OLMoE checkpoint and returns its folder; head size 64 suits SGLang."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=False,
        max_position_embeddings=512,
        initializer_range=0.12,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    OlmoeForCausalLM(config).float().save_pretrained(path)
    return Path(path)


def write_tiny_dots1(path, *, layers=2, experts=8, top_k=2, vocab=128, seed=1) -> Path:
    """Write a random dots1 checkpoint and return its folder."""
    from transformers import Dots1Config, Dots1ForCausalLM

    config = Dots1Config(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_shared_experts=1,
        max_position_embeddings=512,
        initializer_range=0.12,
    )
    torch.manual_seed(seed)
    Dots1ForCausalLM(config).float().save_pretrained(path)
    return Path(path)
