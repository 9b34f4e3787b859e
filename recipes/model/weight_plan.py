"""Which rank holds which part of a Hugging Face tensor, and gathering the parts on rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from routing_replay.errors import CheckpointError

from . import cpu, weight_names  # noqa: F401  (cpu makes Megatron importable)

# isort: split
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer

# isort: split
from routing_replay.megatron.placement import experts_of

from .model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One Megatron parameter of this rank and the pieces that it is made of.

    Args:
        name: Megatron's, with the layer's global index.
        stored: The module's parameter, or its buffer.
        pieces: Slices of Hugging Face tensors, one below the other.
        is_own_shard: Whether no other tensor-parallel rank or pipeline stage holds the same.
        copies: The data-parallel ranks with the same content, in their order.
    """

    name: str
    stored: torch.Tensor
    pieces: list[weight_names.Piece]
    is_own_shard: bool
    copies: tuple[int, ...]

    @property
    def is_primary(self) -> bool:
        """Whether this rank saves it, of all ranks with the same content."""
        return self.is_own_shard and self.copies[0] == torch.distributed.get_rank()

    @property
    def tensor(self) -> torch.Tensor:
        """The values, outside of autograd."""
        return self.stored.data


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece, and the rank and parameter that hold it.

    Args:
        rank: Global rank.
        parameter: Number among that rank's parameters.
        index: Number among the parameter's pieces.
        piece: Where it belongs.
        dtype: Of the parameter.
        copies: The ranks that hold it under the same numbers; `rank` is the first.
    """

    rank: int
    parameter: int
    index: int
    piece: weight_names.Piece
    dtype: torch.dtype
    copies: tuple[int, ...]

    @property
    def shape(self) -> list[int]:
        """Of the part's values."""
        shape = list(self.piece.shape)
        shape[self.piece.axis] = self.piece.length
        return shape


def local_parameters(model_chunks: list[torch.nn.Module]) -> list[Parameter]:
    """Return this rank's parameters (and routing biases), each with its pieces.

    Raises:
        CheckpointError: A parameter has no Hugging Face counterpart.
    """
    chunks = [unwrap(chunk) for chunk in model_chunks]
    position = _position(chunks)
    copies = {is_expert: _copies(is_expert) for is_expert in (False, True)}
    parameters = []
    for chunk in chunks:
        tied_copy = chunk.config.tie_embeddings and not chunk.pre_process
        for name, stored in _named_tensors(chunk):
            is_own_shard = _is_own_shard(name) and not (tied_copy and "output_layer" in name)
            parameter = Parameter(
                name=name,
                stored=stored,
                pieces=weight_names.pieces(name, chunk.config, position),
                is_own_shard=is_own_shard,
                copies=copies[weight_names.is_expert(name)],
            )
            parameters.append(parameter)
    return parameters


def _named_tensors(chunk: GPTModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and the routing bias (a buffer), under the layers' global indices."""
    offset = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
    buffers = [(n, b) for n, b in chunk.named_buffers() if n.endswith("router.expert_bias")]
    for name, tensor in [*chunk.named_parameters(), *buffers]:
        if name.startswith("decoder.layers."):
            index, _, rest = name.removeprefix("decoder.layers.").partition(".")
            name = f"decoder.layers.{int(index) + offset}.{rest}"
        if tensor is not None:
            yield name, tensor


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    """Return the GPTModel inside DDP and precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.get_submodule("module")
    return chunk


def _position(chunks: list[GPTModel]) -> weight_names.ShardPosition:
    config: ModelConfig = chunks[0].config
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    experts = config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
    return weight_names.ShardPosition(
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        expert_tensor_rank=parallel_state.get_expert_tensor_parallel_rank(),
        expert_tensor_size=parallel_state.get_expert_tensor_parallel_world_size(),
        first_expert=expert_rank * experts,
        placed_experts=_placed_experts(chunks),
    )


def _placed_experts(chunks: list[GPTModel]) -> dict[int, tuple[int, ...]]:
    """By layer the experts of this rank, which a plan may have moved between ranks."""
    layers = (m for chunk in chunks for m in chunk.modules() if isinstance(m, MoELayer))
    return {
        layer.router.layer_number - 1: experts_of(layer)
        for layer in layers
        if not getattr(layer, "is_mtp_layer", False)
    }


def _copies(is_expert: bool) -> tuple[int, ...]:
    """Return the data-parallel ranks of this one, of experts or of all else, this one included."""
    if is_expert:
        group = parallel_state.get_expert_data_parallel_group()
    else:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return tuple(torch.distributed.get_process_group_ranks(group))


def _is_own_shard(name: str) -> bool:
    if weight_names.is_expert(name):
        return True
    return not weight_names.is_whole(name) or parallel_state.get_tensor_model_parallel_rank() == 0


def gather_plan(parameters: list[Parameter]) -> dict[str, list[Part]]:
    """Return the parts that tile each Hugging Face tensor; collective, equal on every rank.

    Raises:
        CheckpointError: Some rows of a tensor are on no rank, or are saved by two.
    """
    rank = torch.distributed.get_rank()
    own = [
        Part(
            rank=rank,
            parameter=i,
            index=j,
            piece=piece,
            dtype=parameter.tensor.dtype,
            copies=parameter.copies,
        )
        for i, parameter in enumerate(parameters)
        if parameter.is_primary
        for j, piece in enumerate(parameter.pieces)
        if piece.length
    ]
    plan: dict[str, list[Part]] = {}
    for parts in _all_gather(own):
        for part in parts:
            plan.setdefault(part.piece.name, []).append(part)
    for name, parts in plan.items():
        _check_tiling(name, parts)
    return plan


def _check_tiling(name: str, parts: list[Part]) -> None:
    reached = 0
    for piece in sorted((part.piece for part in parts), key=lambda piece: piece.start):
        if piece.start != reached:
            break
        reached = piece.stop
    whole = parts[0].piece
    if reached != whole.shape[whole.axis] or sum(p.piece.length for p in parts) != reached:
        raise CheckpointError(
            f"the ranks do not hold every part of {name} exactly once",
            expected=f"parts that make up shape {whole.shape} along axis {whole.axis}",
            got=sorted((part.piece.start, part.piece.stop, part.rank) for part in parts),
            fix="Build the model for the layout that Megatron was initialized with",
        )


def gather_tensor(parts: list[Part], parameters: list[Parameter]) -> torch.Tensor | None:
    """Return the whole tensor on rank 0's CPU, None elsewhere; collective."""
    rank = torch.distributed.get_rank()
    whole = torch.empty(parts[0].piece.shape, dtype=parts[0].dtype) if rank == 0 else None
    for part in parts:
        piece = part.piece
        if part.rank == rank:
            values = values_of(parameters[part.parameter], part.index)
            if rank > 0:
                torch.distributed.send(values.contiguous(), dst=0)
        elif rank == 0:
            values = torch.empty(part.shape, dtype=part.dtype, device=torch.cuda.current_device())
            torch.distributed.recv(values, src=part.rank)
        if whole is not None:
            whole.narrow(piece.axis, piece.start, piece.length).copy_(values)
    return whole


def values_of(parameter: Parameter, index: int) -> torch.Tensor:
    """Return the values of one of a parameter's pieces."""
    piece = parameter.pieces[index]
    if piece.axis == 1:  # such a parameter has one piece: all of it
        return parameter.tensor
    start = sum(earlier.length for earlier in parameter.pieces[:index])
    return parameter.tensor[start : start + piece.length]


def _all_gather(value: list[Part]) -> list[list[Part]]:
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
