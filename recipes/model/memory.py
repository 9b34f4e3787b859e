"""Memory per GPU of a parallel layout, estimated before anything is built.

Weights, gradients and optimizer states are counted exactly, up to the padding of Megatron's
buffers; the tests compare them with measured tensors. Activations, logits and routes are estimates:
they assume balanced experts, and leave out the allocator's fragmentation and NCCL's buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from routing_replay.errors import ConfigError

from .model import LatentModelConfig, ModelConfig
from .parallel import ParallelLayout

GIB = 1 << 30
FP32_BYTES = 4
# AdamW keeps two float32 moments; below float32 it also keeps float32 master weights.
MOMENTS_BYTES = 2 * FP32_BYTES
# CUDA's context, NCCL's buffers and fragmentation: what a process cannot use of a GPU.
RESERVED_FRACTION = 0.08


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a layout has to hold beside the model.

    Args:
        num_ranks: Ranks of the trainer.
        microbatch_tokens: Tokens of a microbatch, padding and all context ranks included.
        distributed_optimizer: Whether data-parallel ranks share the optimizer state.
        has_reference: Whether a frozen reference model is held too.
        fp32_logits: Whether a bfloat16 model's logits are copied to float32.
    """

    num_ranks: int
    microbatch_tokens: int
    distributed_optimizer: bool = False
    has_reference: bool = False
    fp32_logits: bool = True


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one GPU, by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    routes: int

    @property
    def total(self) -> int:
        """All parts together, in bytes."""
        return sum(getattr(self, part.name) for part in fields(self))

    def text(self) -> str:
        """Return one line with every part in GiB."""
        parts = [f"{part.name} {getattr(self, part.name) / GIB:.2f}" for part in fields(self)]
        return f"{self.total / GIB:.2f} GiB ({', '.join(parts)})"


def estimate(config: ModelConfig, layout: ParallelLayout, workload: Workload) -> MemoryEstimate:
    """Return the estimate of the pipeline stage that needs most.

    Args:
        config: From `transformer_config`, with the same layout.
        layout: Parallel sizes; they must fit `workload.num_ranks`.
        workload: Ranks, tokens and what else is held.
    """
    layout.check_world(workload.num_ranks)
    stages = [_stage(config, layout, workload, stage) for stage in range(layout.pipeline)]
    return max(stages, key=lambda estimate: estimate.total)


def require_fit(needed: MemoryEstimate, available_bytes: int) -> None:
    """Refuse a layout that cannot fit.

    Args:
        needed: From `estimate`.
        available_bytes: A GPU's memory, such as `device_memory()`.

    Raises:
        ConfigError: Which part needs how much.
    """
    usable = int(available_bytes * (1 - RESERVED_FRACTION))
    if needed.total > usable:
        raise ConfigError(
            "the parallel layout does not fit into a GPU's memory",
            expected=f"at most {usable / GIB:.2f} GiB of {available_bytes / GIB:.2f}",
            got=needed.text(),
            fix="Use more ranks with distributed_optimizer, raise expert_parallel, "
            "tensor_parallel or pipeline_parallel, lower the microbatch, or set recompute: full",
        )


def device_memory() -> int | None:
    """Return the bytes of this rank's GPU, None without one."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def num_parameters(config: ModelConfig, layout: ParallelLayout, stage: int) -> tuple[int, int]:
    """Return how many (dense, expert) parameters a rank of a pipeline stage holds."""
    hidden, tensor = config.hidden_size, layout.tensor
    vocabulary = config.padded_vocab_size * hidden // tensor
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    dense = vocabulary if is_first else 0
    if is_last:
        # Tied embeddings are one parameter where one stage has both ends, else a copy.
        is_shared = config.tie_embeddings and is_first
        dense += hidden + (0 if is_shared else vocabulary)
    layers = moe_layers(config, layout, stage)
    num_moe = sum(layers)
    dense += len(layers) * _attention(config, tensor)
    dense += num_moe * _router_and_shared(config, tensor)
    dense += (len(layers) - num_moe) * 3 * hidden * config.ffn_hidden_size // tensor
    return dense, num_moe * _experts(config, layout)


def _stage(
    config: ModelConfig, layout: ParallelLayout, workload: Workload, stage: int
) -> MemoryEstimate:
    dense, experts = num_parameters(config, layout, stage)
    element = config.params_dtype.itemsize
    models = 1 + workload.has_reference
    ranks = workload.num_ranks // layout.pipeline
    dense_shards, expert_shards = 1, 1
    if workload.distributed_optimizer:
        dense_shards = ranks // layout.tensor  # context ranks share the state too
        expert_shards = ranks // ((layout.expert_tensor or 1) * layout.expert)
    owned = -(-dense // dense_shards) + -(-experts // expert_shards)
    master = FP32_BYTES if element < FP32_BYTES else 0
    return MemoryEstimate(
        weights=models * (dense + experts) * element,
        # Gradients are reduced in float32, whatever the parameters' type.
        gradients=(dense + experts) * FP32_BYTES,
        optimizer=owned * (MOMENTS_BYTES + master),
        activations=_activations(config, layout, workload, stage),
        logits=_logits(config, layout, workload) if stage == layout.pipeline - 1 else 0,
        routes=_routes(config, layout, workload, stage),
    )


def moe_layers(config: ModelConfig, layout: ParallelLayout, stage: int) -> list[int]:
    """Return 1 for each MoE layer of a stage and 0 for each other layer."""
    pattern = config.moe_layer_freq
    if isinstance(pattern, int):
        pattern = [int(i % pattern == 0) for i in range(config.num_layers)]
    return [pattern[layer] for layer in layout.layers_of(config.num_layers, stage)]


def _attention(config: ModelConfig, tensor: int) -> int:
    """Parameters of a layer's attention and of its two norms."""
    if isinstance(config, LatentModelConfig):
        return _latent_attention(config, tensor)
    hidden, head = config.hidden_size, config.kv_channels
    queries = config.num_attention_heads * head
    qkv = queries + 2 * config.num_query_groups * head
    bias = qkv // tensor if config.add_qkv_bias else 0
    norms = 2 * hidden + (2 * head if config.qk_layernorm else 0)
    return int(hidden * (qkv + queries) // tensor + bias + norms)


def _latent_attention(config: LatentModelConfig, tensor: int) -> int:
    """The same of latent attention; its down projections are whole on every tensor rank."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    query_head = config.qk_head_dim + config.qk_pos_emb_head_dim
    whole = hidden * (config.kv_lora_rank + config.qk_pos_emb_head_dim) + config.kv_lora_rank
    split = heads * (config.qk_head_dim + config.v_head_dim) * config.kv_lora_rank
    split += heads * config.v_head_dim * hidden
    whole += config.q_lora_rank * (hidden + 1)
    split += config.q_lora_rank * heads * query_head
    return int(whole + split // tensor + 2 * hidden)


def _router_and_shared(config: ModelConfig, tensor: int) -> int:
    shared = config.moe_shared_expert_intermediate_size or 0
    return int(config.hidden_size * (config.num_moe_experts + 3 * shared // tensor))


def _experts(config: ModelConfig, layout: ParallelLayout) -> int:
    own = config.num_moe_experts // layout.expert
    return int(own * 3 * config.hidden_size * config.moe_ffn_hidden_size) // (
        layout.expert_tensor or 1
    )


def _activations(
    config: ModelConfig, layout: ParallelLayout, workload: Workload, stage: int
) -> int:
    """What the backward pass needs, of all microbatches in flight, and one layer's working set."""
    element = config.params_dtype.itemsize
    # Sequence parallelism: a tensor rank stores its share of the tokens of its context rank.
    tokens = workload.microbatch_tokens // (layout.context * layout.tensor)
    hidden, head = config.hidden_size, config.kv_channels
    boundary = tokens * hidden * element
    heads = 2 * config.num_attention_heads + 2 * config.num_query_groups
    attention = tokens * (3 * hidden + heads * head) * element
    # Each token comes K times to balanced experts: input, both halves, their product, output.
    width = config.moe_ffn_hidden_size // (layout.expert_tensor or 1)
    moe = tokens * config.moe_router_topk * (2 * hidden + 3 * width) * element
    if config.recompute_granularity == "full":
        stored = boundary
    elif config.recompute_granularity == "selective":
        stored = boundary + attention
    else:
        stored = boundary + attention + moe
    in_flight = layout.pipeline - stage  # 1F1B: the first stage holds most
    num_layers = len(moe_layers(config, layout, stage))
    return int(num_layers * stored * in_flight + attention + 2 * moe)


def _logits(config: ModelConfig, layout: ParallelLayout, workload: Workload) -> int:
    """Logits, their gradient, and the float32 copy of a bfloat16 model's."""
    element = config.params_dtype.itemsize
    copy = FP32_BYTES if workload.fp32_logits and element < FP32_BYTES else 0
    tokens = workload.microbatch_tokens // layout.context
    return int(tokens * (config.padded_vocab_size // layout.tensor) * (2 * element + copy))


def _routes(config: ModelConfig, layout: ParallelLayout, workload: Workload, stage: int) -> int:
    """A microbatch's expert ids as stored, and one layer's as int64 for the gather."""
    stored = 1 if config.num_moe_experts <= 256 else 2
    tokens = workload.microbatch_tokens // (layout.context * layout.tensor)
    per_layer = tokens * config.moe_router_topk
    num_moe = sum(moe_layers(config, layout, stage))
    return int(per_layer * (num_moe * stored + torch.int64.itemsize))
