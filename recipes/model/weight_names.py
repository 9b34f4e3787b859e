"""Which slices of which Hugging Face tensors make up a Megatron parameter: arithmetic on names.

A Megatron parameter is described as a list of Pieces: slices of Hugging Face tensors which, one
below the other, are the parameter's shard on this rank. Loading reads the pieces; saving writes
them back. Names of the local spec and of Transformer Engine's modules mean the same pieces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from routing_replay.errors import CheckpointError

if TYPE_CHECKING:
    from .model import ModelConfig

# Values of `model_type` in config.json whose names are known here.
MODEL_TYPES = ("deepseek_v3", "glm4_moe", "qwen3_moe")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A slice of one Hugging Face tensor.

    Args:
        name: The tensor's name in the checkpoint.
        shape: The whole tensor's shape.
        axis: The sliced axis.
        start, stop: Bounds on that axis, 0 <= start <= stop <= shape[axis].
    """

    name: str
    shape: tuple[int, ...]
    axis: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Size along the sliced axis."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class ShardPosition:
    """Where a rank stands: its shard of dense tensors, of experts' tensors, and its experts.

    Args:
        tensor_rank, tensor_size: Of dense tensors.
        expert_tensor_rank, expert_tensor_size: Of the tensors of experts.
        first_expert: The rank holds this one and those after it.
        placed_experts: By layer the experts that the rank holds instead, slot by slot.
    """

    tensor_rank: int = 0
    tensor_size: int = 1
    expert_tensor_rank: int = 0
    expert_tensor_size: int = 1
    first_expert: int = 0
    placed_experts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def expert(self, layer: int, slot: int) -> int:
        """Return the checkpoint's number of a local expert."""
        placed = self.placed_experts.get(layer)
        return self.first_expert + slot if placed is None else placed[slot]


# Transformer Engine puts a norm into the linear that follows it, and all experts of a rank into one
# module with a parameter for each.
_TE_NAMES = [
    (r"self_attention\.linear_qkv\.layer_norm_weight$", "input_layernorm.weight"),
    (
        r"self_attention\.linear_(q|kv)_up_proj\.layer_norm_weight$",
        r"self_attention.\1_layernorm.weight",
    ),
    (r"mlp\.linear_fc1\.layer_norm_weight$", "pre_mlp_layernorm.weight"),
    (
        r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$",
        r"mlp.experts.local_experts.\2.\1.weight",
    ),
]

# Tensors that every rank of a stage holds whole: Megatron's name in a layer -> Hugging Face's.
_WHOLE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
}

# Of latent attention, where they differ.
_WHOLE_LATENT = {
    "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
}

_LATENT_HEADS = {
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
}

_MLP = re.compile(
    r"mlp\.(?P<kind>shared_experts\.|experts\.local_experts\.(?P<expert>\d+)\.|)"
    r"linear_fc(?P<half>[12])\.weight$"
)


def require_supported(model_type: str | None, where: object = None) -> None:
    """Refuse a checkpoint of an architecture whose weights are unknown here.

    Args:
        model_type: From its config.json.
        where: That file.

    Raises:
        CheckpointError: Which architectures are supported.
    """
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            "the checkpoint's architecture is not supported",
            expected=" or ".join(MODEL_TYPES),
            got=repr(model_type),
            where=where,
        )


def is_expert(name: str) -> bool:
    """Return whether a parameter belongs to routed experts, and so to the expert groups."""
    return ".mlp.experts." in name


def is_weight(name: str) -> bool:
    """Return whether a tensor takes the dtype asked for: in bfloat16 a bias would select others."""
    return not name.endswith("e_score_correction_bias")


def is_whole(name: str) -> bool:
    """Return whether every tensor-parallel rank holds the whole of this Megatron parameter."""
    local = _local_spec_name(name)
    in_layer = _in_layer(local)[1]
    is_of_layer = in_layer in _WHOLE or in_layer in _WHOLE_LATENT
    return local == "decoder.final_layernorm.weight" or is_of_layer


def pieces(name: str, config: ModelConfig, position: ShardPosition) -> list[Piece]:
    """Return the pieces of one Megatron parameter on one rank, in order.

    Args:
        name: Megatron's name with the layer's global index, of either spec; an expert's index is
            the rank's own.
        config: The model's ModelConfig.
        position: The rank's shards.

    Raises:
        CheckpointError: No Hugging Face tensor corresponds to this parameter.
    """
    local = _local_spec_name(name)
    if local == "embedding.word_embeddings.weight":
        return [_vocabulary("model.embed_tokens.weight", config, position)]
    if local == "output_layer.weight":
        name = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
        return [_vocabulary(name, config, position)]
    if local == "decoder.final_layernorm.weight":
        return [_whole("model.norm.weight", (config.hidden_size,))]
    layer, local = _in_layer(local)
    layer_pieces = [] if layer is None else _layer_pieces(local, layer, config, position)
    if not layer_pieces:
        raise CheckpointError(
            "a Megatron parameter has no counterpart in the Hugging Face checkpoint",
            got=name,
            where=f"architecture {config.architecture}",
            fix="Leave out the module that owns it, or extend recipes/model/weight_names.py",
        )
    return layer_pieces


def _layer_pieces(
    local: str, layer: int, config: ModelConfig, position: ShardPosition
) -> list[Piece]:
    prefix = f"model.layers.{layer}."
    if config.multi_latent_attention and local in _WHOLE_LATENT:
        return [_whole(prefix + _WHOLE_LATENT[local], _latent_shape(local, config))]
    if config.multi_latent_attention and local in _LATENT_HEADS:
        rank, size = position.tensor_rank, position.tensor_size
        shape = _latent_shape(local, config)
        return [_split(prefix + _LATENT_HEADS[local], shape, 0, rank, size)]
    if local in _WHOLE:
        return [_whole(prefix + _WHOLE[local], _whole_shape(local, config))]
    if local in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        return _qkv(prefix + "self_attn.", local.rpartition(".")[2], config, position)
    if local == "self_attention.linear_proj.weight":
        head = config.v_head_dim if config.multi_latent_attention else config.kv_channels
        shape = (config.hidden_size, config.num_attention_heads * head)
        rank, size = position.tensor_rank, position.tensor_size
        return [_split(prefix + "self_attn.o_proj.weight", shape, 1, rank, size)]
    match = _MLP.match(local)
    return _mlp(match, layer, config, position) if match else []


def _mlp(
    match: re.Match[str], layer: int, config: ModelConfig, position: ShardPosition
) -> list[Piece]:
    prefix = f"model.layers.{layer}."
    rank, size = position.tensor_rank, position.tensor_size
    if match["expert"] is not None:
        rank, size = position.expert_tensor_rank, position.expert_tensor_size
        prefix += f"mlp.experts.{position.expert(layer, int(match['expert']))}."
        width = config.moe_ffn_hidden_size
    elif match["kind"]:
        prefix += "mlp.shared_experts."
        width = config.moe_shared_expert_intermediate_size
    else:
        prefix += "mlp."
        width = config.ffn_hidden_size
    if match["half"] == "2":
        shape = (config.hidden_size, width)
        return [_split(prefix + "down_proj.weight", shape, 1, rank, size)]
    shape = (width, config.hidden_size)
    return [
        _split(prefix + half, shape, 0, rank, size)
        for half in ("gate_proj.weight", "up_proj.weight")
    ]


def _qkv(prefix: str, kind: str, config: ModelConfig, position: ShardPosition) -> list[Piece]:
    """Megatron keeps a group's queries, key and value together; shards hold whole groups."""
    groups, head = config.num_query_groups, config.kv_channels
    rows = {"q": config.num_attention_heads // groups * head, "k": head, "v": head}  # of a group
    own = groups // position.tensor_size
    first = position.tensor_rank * own
    columns = (config.hidden_size,) if kind == "weight" else ()
    return [
        Piece(
            name=f"{prefix}{part}_proj.{kind}",
            shape=(groups * rows[part], *columns),
            axis=0,
            start=group * rows[part],
            stop=(group + 1) * rows[part],
        )
        for group in range(first, first + own)
        for part in ("q", "k", "v")
    ]


def _vocabulary(name: str, config: ModelConfig, position: ShardPosition) -> Piece:
    # The last ranks hold padding rows below (or instead of) the checkpoint's.
    rows = config.padded_vocab_size // position.tensor_size
    start = position.tensor_rank * rows
    return Piece(
        name=name,
        shape=(config.vocab_size, config.hidden_size),
        axis=0,
        start=min(start, config.vocab_size),
        stop=min(start + rows, config.vocab_size),
    )


def _split(name: str, shape: tuple[int, ...], axis: int, rank: int, size: int) -> Piece:
    length = shape[axis] // size
    return Piece(name=name, shape=shape, axis=axis, start=rank * length, stop=(rank + 1) * length)


def _whole(name: str, shape: tuple[int, ...]) -> Piece:
    return _split(name, shape, 0, 0, 1)


def _whole_shape(local: str, config: ModelConfig) -> tuple[int, ...]:
    if local == "mlp.router.weight":
        return (config.num_moe_experts, config.hidden_size)
    if local == "mlp.router.expert_bias":
        return (config.num_moe_experts,)
    if local.startswith("self_attention."):
        return (config.kv_channels,)
    return (config.hidden_size,)


def _latent_shape(local: str, config: Any) -> tuple[int, ...]:
    """The shape of a tensor of latent attention; `config` is a LatentModelConfig."""
    query, key_value = config.q_lora_rank, config.kv_lora_rank
    heads, hidden = config.num_attention_heads, config.hidden_size
    query_head = config.qk_head_dim + config.qk_pos_emb_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "q_layernorm": (query,),
        "kv_layernorm": (key_value,),
        "linear_q_down_proj": (query, hidden),
        "linear_kv_down_proj": (key_value + config.qk_pos_emb_head_dim, hidden),
        "linear_q_up_proj": (heads * query_head, query),
        "linear_kv_up_proj": (heads * (config.qk_head_dim + config.v_head_dim), key_value),
    }
    return shapes[local.split(".")[1]]


def _local_spec_name(name: str) -> str:
    for pattern, replacement in _TE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _in_layer(name: str) -> tuple[int | None, str]:
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    return (int(match[1]), match[2]) if match else (None, name)
