"""Modules of the local layer spec: what megatron-core has for Transformer Engine only.

The stock torch norm refuses sequence parallelism; the stock local attention refuses packed
sequences and context parallelism. These two accept all three, on any device and any backend.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from routing_replay.errors import ConfigError
from routing_replay.routes.token_rows import context_positions

from . import cpu  # noqa: F401  (makes Megatron importable)

# isort: split
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """RMSNorm in float32 whose weight is marked for the gradient reduction of sequence parallelism.

    Args:
        config: Megatron's TransformerConfig.
        hidden_size: Size of the last axis.
        eps: Added to the mean of squares.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ):
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        # Megatron reads this attribute of a parameter.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shape = (hidden.shape[-1],)
        return functional.rms_norm(hidden.float(), shape, self.weight.float(), self.eps).to(
            hidden.dtype
        )


class DuplicatedLinear(torch.nn.Module):
    """A linear layer without bias that every tensor-parallel rank holds whole.

    Args:
        sharded: Megatron's column-parallel layer in whose place it stands.
    """

    def __init__(self, sharded: ColumnParallelLinear):
        super().__init__()
        weight: torch.Tensor = sharded.weight
        shape = (sharded.output_size, weight.shape[1])
        self.weight = torch.nn.Parameter(
            torch.empty(shape, dtype=weight.dtype, device=weight.device)
        )
        sharded.config.init_method(self.weight)
        # With sequence parallelism a rank sees a part of the tokens; Megatron adds the gradients.
        setattr(self.weight, "sequence_parallel", sharded.config.sequence_parallel)  # noqa: B010

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return functional.linear(hidden, self.weight), None


class AllGatherAttention(torch.nn.Module):
    """Causal attention that gathers keys and values over the context-parallel group.

    Invariant: a query attends to the keys of its own sequence at positions up to its own, wherever
    they live. Sequences are cut as Megatron cuts them: into 2 * C chunks, of which rank c of C
    holds chunks c and 2 * C - 1 - c.

    Args:
        config: Megatron's TransformerConfig.
        layer_number: 1-based number of the layer.
        attn_mask_type, attention_type: Part of Megatron's interface; the mask is causal.
        attention_dropout: Probability; None takes the config's.
        softmax_scale: None takes 1 / sqrt(head size).
        k_channels, v_channels: Part of Megatron's interface; the tensors have these head sizes.
        cp_comm_type: Part of Megatron's interface; the communication is always an all-gather.
        pg_collection: Megatron's process groups; its `cp` group is used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__()
        self.scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ConfigError(
                "the local attention has no dropout", expected=0.0, got=dropout, where="attention"
            )
        assert pg_collection is not None  # Megatron always gives it
        self.group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend; shapes are Megatron's.

        Args:
            query: [s, b, heads, d], or packed [t, heads, d].
            key, value: [s, b, groups, d], or packed [t, groups, d].
            attention_mask: None, or bool [b, 1, s, s] with True where a key is hidden (in addition
                to the causal rule); only unpacked and without context parallelism.
            attn_mask_type, attention_bias: Part of Megatron's interface; a bias is refused.
            packed_seq_params: Bounds of the packed sequences (padded bounds where given).

        Returns:
            [s, b, heads * d], or packed [t, heads * d].

        Raises:
            ConfigError: A mask or a bias that it would have to ignore.
        """
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        ranks = self.group.size()
        if attention_bias is not None or (attention_mask is not None and (packed or ranks > 1)):
            raise ConfigError(
                "the local attention is causal by position and takes no mask here",
                expected="attention_mask=None with packing or context parallelism, no bias",
                got="a mask or a bias",
                fix="Drop it: padding at the end of a sequence cannot reach the tokens before it",
            )
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        lengths = _local_lengths(packed_seq_params, ranks) if packed else [query.shape[0]]
        key, value = (self._gather(x) for x in (key, value))  # [ranks, s, b, groups, d]
        outputs, start = [], 0
        for length in lengths:
            rows = slice(start, start + length)
            outputs.append(self._attend(query[rows], key[:, rows], value[:, rows], attention_mask))
            start += length
        output = torch.cat(outputs)
        return output.squeeze(1) if packed else output

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        if self.group.size() == 1:
            return x.unsqueeze(0)
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        # All-gather forward, reduce-scatter backward: every rank's queries add to a key's gradient.
        return gather_from_sequence_parallel_region(x, group=self.group).unflatten(
            0, (self.group.size(), -1)
        )

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        hidden: torch.Tensor | None,
    ) -> torch.Tensor:
        ranks, length = key.shape[:2]
        repeat = query.shape[2] // key.shape[3]
        positions = [zigzag_positions(rank, ranks, length, query.device) for rank in range(ranks)]
        visible = positions[self.group.rank()][:, None] >= torch.cat(positions)[None, :]
        if hidden is not None:
            visible = visible & ~hidden
        key, value = (
            x.flatten(0, 1).permute(1, 2, 0, 3).repeat_interleave(repeat, dim=1)
            for x in (key, value)
        )
        output = functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3), key, value, attn_mask=visible, scale=self.scale
        )
        return output.permute(2, 0, 1, 3).flatten(2)


def zigzag_positions(
    rank: int, ranks: int, length: int, device: torch.device | None = None
) -> torch.Tensor:
    """Return the positions of the tokens that one context-parallel rank holds of a sequence.

    Args:
        rank: Rank in the context-parallel group.
        ranks: Size of the group; 1 gives 0, 1, ..., length - 1.
        length: Tokens of the sequence on this rank; even if `ranks` > 1.
        device: Device of the result.

    Returns:
        int64 [length].
    """
    positions = context_positions([0, ranks * length], rank, ranks)
    return torch.from_numpy(positions).to(device)


def _local_lengths(packed_seq_params: PackedSeqParams, ranks: int) -> list[int]:
    bounds = packed_seq_params.cu_seqlens_q_padded
    if bounds is None:
        bounds = packed_seq_params.cu_seqlens_q
    return (bounds.diff() // ranks).tolist()
