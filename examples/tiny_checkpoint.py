"""A random Qwen3-MoE checkpoint of a megabyte, for examples that run without a GPU."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB = 256


def write_tiny_checkpoint(folder: Path) -> Path:
    """Write the checkpoint and return its folder."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        # With the usual 0.02 the logits of so small a model are flat, and all experts are alike.
        initializer_range=0.12,
    )
    torch.manual_seed(1)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder
