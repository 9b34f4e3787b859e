"""Floating-point operations of a token, for estimates of time."""

from __future__ import annotations

from . import memory
from .model import LatentModelConfig, ModelConfig
from .parallel import ParallelLayout


def active_parameters(config: ModelConfig) -> int:
    """Return how many parameters a token is multiplied with; the embedding is only looked up."""
    dense, experts = memory.num_parameters(config, ParallelLayout(), 0)
    looked_up = 0 if config.tie_embeddings else config.padded_vocab_size * config.hidden_size
    return int(dense - looked_up + experts * config.moe_router_topk // config.num_moe_experts)


def forward_flops(config: ModelConfig, sequence_tokens: int) -> float:
    """Return the operations of one token's forward pass, averaged over a causal sequence.

    A multiplication and an addition per active parameter; in attention as many per head channel for
    the scores and again for the weighted sum, over half of the sequence.
    """
    values = config.v_head_dim if isinstance(config, LatentModelConfig) else config.kv_channels
    channels = config.num_attention_heads * (config.kv_channels + values) / 2
    attention = 2 * 2 * config.num_layers * channels * sequence_tokens / 2
    return float(2 * active_parameters(config) + attention)
