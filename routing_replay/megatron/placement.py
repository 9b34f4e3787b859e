"""Experts on other expert-parallel ranks than Megatron's, without a change of the function.

    placed = place_experts(model_chunks, optimizer)
    placed.move(step.placement)              # between two steps
    with placed.natural(): save_checkpoint() # Megatron's own order, for what numbers experts itself

The router keeps the model's own numbers: its rows, its bias, its losses, and the routes that are
replayed or recorded never change. Behind it the columns of its map are put into the order of the
slots, so tokens reach the rank that holds their expert now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.utils.hooks import RemovableHandle

from ..balance.placement import Placement
from ..errors import PreflightError, ReplayError
from .expert_tensors import (
    WEIGHT,
    ExpertSlice,
    Shard,
    expert_slices,
    optimizer_parts,
    stored_shards,
)
from .routers import config_of, describe_model, find_routers

# Where a layer keeps the order of its slots over all ranks, while it is not Megatron's.
ATTRIBUTE = "routing_replay_order"


def place_experts(
    model_chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None = None
) -> PlacedExperts:
    """Return the handle by which experts move; collective over the pipeline group.

    Args:
        model_chunks: What Megatron's get_model returned, all chunks of this rank.
        optimizer: Whose states move with the experts; None for a model without one.

    Raises:
        PreflightError: Parameters or optimizer states that cannot be moved.
    """
    return PlacedExperts(list(model_chunks), optimizer)


def experts_of(layer: torch.nn.Module) -> tuple[int, ...]:
    """Return the model's own numbers of the experts that this rank holds, slot by slot.

    Args:
        layer: Megatron's MoELayer. What exports its weights names them by these numbers.
    """
    slots: list[int] = layer.local_expert_indices  # type: ignore[assignment]
    order: tuple[int, ...] | None = getattr(layer, ATTRIBUTE, None)
    return tuple(slots) if order is None else tuple(order[slot] for slot in slots)


def order_of(layer: torch.nn.Module, num_experts: int) -> np.ndarray:
    """Return the model's own number of the expert in each slot of all ranks; int64 [E]."""
    return np.array(getattr(layer, ATTRIBUTE, None) or range(num_experts))


class PlacedExperts:
    """The handle of a model whose experts move; made by `place_experts`.

    Attributes:
        placement: Where the experts of all routed layers lie.
        layers: Global indices of the layers: the rows of a placement.
        num_moved: Experts that the last `move` brought to another rank.
    """

    def __init__(
        self, model_chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None
    ):
        entries = find_routers(model_chunks)
        config = entries[0].router.config if entries else config_of(model_chunks)
        shape = describe_model(entries, config, model_chunks)
        self._parts = optimizer_parts(optimizer)
        self._group = parallel_state.get_expert_model_parallel_group()
        # The ranks among which the distributed optimizer shards the states of experts.
        self._replicas = parallel_state.get_expert_data_parallel_group(
            partial_expert_data_parallel=True
        )
        self._has_shards = any(isinstance(part, DistributedOptimizer) for part in self._parts)
        self._chunks = model_chunks
        self.layers = shape.layers
        self.num_moved = 0
        self.placement = Placement.natural(
            len(shape.layers), shape.num_experts, dist.get_world_size(self._group)
        )
        # A move leaves several tensors behind one another: between the first and the last write
        # the model is nobody's.
        self._is_whole = True
        modules = [m for chunk in model_chunks for m in chunk.modules()]
        routers = {id(entry.router): entry.layer for entry in entries}
        self._layers = [
            _Layer(module, routers[id(module.router)], shape.num_experts, self)
            for module in modules
            if id(getattr(module, "router", None)) in routers
        ]

    def move(self, placement: Placement) -> None:
        """Bring every expert to its rank; collective over all ranks, between two steps.

        The optimizer has taken its step, and no gradient is waiting.

        Args:
            placement: Of all routed layers of the model, rows as `layers`.

        Raises:
            ReplayError: A placement of another model or layout, or an earlier move that failed.
        """
        expected = (self.placement.experts_LE.shape, self.placement.num_ranks)
        if (placement.experts_LE.shape, placement.num_ranks) != expected:
            raise ReplayError(
                "the placement is of another model or layout",
                expected=expected,
                got=(placement.experts_LE.shape, placement.num_ranks),
            )
        self.require_whole()
        self._is_whole = False
        self._finish_parameter_gather()
        with torch.no_grad():
            for layer in self._layers:
                row = self.layers.index(layer.index)
                if not np.array_equal(layer.experts_E, placement.experts_LE[row]):
                    self._move_layer(layer, placement.experts_LE[row])
        self.num_moved = placement.num_moves(self.placement)
        self.placement = placement
        self._is_whole = True

    def home(self) -> None:
        """Bring every expert back to Megatron's own place; collective."""
        num_layers, num_experts = self.placement.experts_LE.shape
        self.move(Placement.natural(num_layers, num_experts, self.placement.num_ranks))

    @contextlib.contextmanager
    def natural(self) -> Iterator[None]:
        """Within: Megatron's own order, as checkpoints and exporters of others expect; collective.

        After an exception the experts stay in that order.
        """
        placement = self.placement
        self.home()
        yield
        self.move(placement)

    def remove(self) -> None:
        """Bring the experts home and take the handle off the model; collective."""
        self.home()
        for layer in self._layers:
            layer.remove()

    def require_whole(self) -> None:
        """Raise ReplayError if a move was interrupted: weights and their order disagree."""
        if not self._is_whole:
            raise ReplayError(
                "a move of experts did not finish: their weights are mixed up",
                expected="every move to end",
                fix="Start again from the newest checkpoint; none was written since",
            )

    def require_natural(self, layer: _Layer) -> None:
        """Raise ReplayError if something is about to number experts that are not at home."""
        self.require_whole()
        if not layer.is_natural:
            raise ReplayError(
                "a state dict numbers experts by their slots, but they have been moved",
                expected="experts in Megatron's own order",
                where=f"layer {layer.index}",
                fix="Save and load inside `with placed.natural():`, or call placed.home() first",
            )

    def _finish_parameter_gather(self) -> None:
        """Under overlapped gathers the parameters are whole only at their next forward."""
        for chunk in self._chunks:
            options = getattr(chunk, "ddp_config", None)
            if options is not None and options.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)  # type: ignore[operator]

    def _move_layer(self, layer: _Layer, experts_E: np.ndarray) -> None:
        moves = _Moves.of(layer.experts_E, experts_E, self._group)
        for parts in expert_slices(layer.module.experts, moves.num_local).values():
            shards = [stored_shards(self._parts, part.parameter) for part in parts]
            for name, dtype in self._names(shards):
                # The parameters themselves are whole on every rank.
                is_sharded = self._has_shards and name != WEIGHT
                own = [by_name.get(name) for by_name in shards]
                self._exchange(moves, parts, own, dtype, is_sharded)
        layer.set_order(experts_E)

    def _names(self, shards: list[dict[str, Shard]]) -> list[tuple[str, torch.dtype]]:
        """What any rank stores: under the distributed optimizer some ranks store only a part."""
        names = {n: s.values_N.dtype for by_name in shards for n, s in by_name.items()}
        for group in (self._group, self._replicas):
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, names, group=group)
            names = {name: dtype for found in gathered for name, dtype in found.items()}
        return sorted(names.items())

    def _exchange(
        self,
        moves: _Moves,
        parts: list[ExpertSlice],
        shards: list[Shard | None],
        dtype: torch.dtype,
        is_sharded: bool,
    ) -> None:
        """Move one kind of values of one kind of weight."""
        size, device = parts[0].stop - parts[0].start, parts[0].parameter.device
        sent_PN = torch.zeros(len(moves.sent), size, dtype=dtype, device=device)
        for values_N, slot in zip(sent_PN, moves.sent, strict=True):
            _copy(shards[slot], parts[slot], values_N, is_written=False)
        # As bytes: adding zeros to numbers would lose the sign of a zero, and every backend moves
        # bytes.
        sent_PB = sent_PN.view(torch.uint8)
        if is_sharded:  # every rank put its own range into zeros
            dist.all_reduce(sent_PB, group=self._replicas)
        received_PB = sent_PB.new_empty(len(moves.received), sent_PB.shape[1])
        dist.all_to_all_single(
            received_PB, sent_PB, moves.num_received, moves.num_sent, group=self._group
        )
        for values_N, slot in zip(received_PB.view(dtype), moves.received, strict=True):
            _copy(shards[slot], parts[slot], values_N, is_written=True)


def _copy(
    shard: Shard | None, part: ExpertSlice, values_N: torch.Tensor, *, is_written: bool
) -> None:
    """Write an expert's values to what this rank stores of it, or read them from there."""
    if shard is None:
        return
    own_N, where = shard.within(part)
    if is_written:
        own_N.copy_(values_N[where])
    else:
        values_N[where] = own_N


class _Layer:
    """One MoE layer: the order of its slots, and the hooks that apply it.

    Args:
        module: Megatron's MoELayer.
        index: Global layer index.
        num_experts: E.
        owner: Knows whether a move was interrupted.
    """

    def __init__(self, module: torch.nn.Module, index: int, num_experts: int, owner: PlacedExperts):
        self.module: Any = module
        self.index = index
        self.experts_E = np.arange(num_experts)
        self.is_natural = True
        device = next(module.router.parameters()).device  # type: ignore[union-attr]
        # Filled in place: a captured graph reads the order anew.
        self._order_E = torch.arange(num_experts, device=device)
        self._inverse_E = torch.arange(num_experts, device=device)
        self._owner = owner
        self._hooks = self._install()

    def set_order(self, experts_E: np.ndarray) -> None:
        """Take a new order of the slots."""
        self.experts_E = experts_E.copy()
        self.is_natural = bool((experts_E == np.arange(len(experts_E))).all())
        self._order_E.copy_(torch.from_numpy(self.experts_E))
        self._inverse_E.copy_(torch.from_numpy(np.argsort(self.experts_E)))
        setattr(self.module, ATTRIBUTE, tuple(self.experts_E.tolist()))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        vars(self.module.experts).pop("sharded_state_dict", None)
        vars(self.module).pop(ATTRIBUTE, None)

    def _install(self) -> list[RemovableHandle]:
        experts, owner = self.module.experts, self._owner
        stock = experts.sharded_state_dict

        def sharded_state_dict(*arguments: Any, **options: Any) -> Any:
            owner.require_natural(self)
            return stock(*arguments, **options)

        # An attribute of the instance: Megatron's checkpoints ask for it by name.
        experts.sharded_state_dict = sharded_state_dict
        return [
            self.module.router.register_forward_hook(self._in_slots),
            experts.register_state_dict_pre_hook(lambda *_: owner.require_natural(self)),
            experts.register_load_state_dict_pre_hook(lambda *_: owner.require_natural(self)),
        ]

    def _in_slots(self, router: torch.nn.Module, inputs: Any, output: Any) -> Any:
        """The router's weights and map with columns in the order of the slots."""
        self._owner.require_whole()
        if self.is_natural:
            return None
        probs_TE, map_TE = output
        if map_TE.shape[-1] != len(self.experts_E):
            raise PreflightError(
                "the router answers in a form that a placement does not know",
                expected=f"a map [tokens, {len(self.experts_E)}]",
                got=list(map_TE.shape),
                where=f"layer {self.index}",
            )
        probs_TE = _Reordered.apply(probs_TE, self._order_E, self._inverse_E)
        return probs_TE, map_TE.index_select(1, self._order_E)


class _Reordered(torch.autograd.Function):
    """Columns in another order; the gradient takes the inverse one, without a sum."""

    @staticmethod
    def forward(
        ctx: Any, values_TE: torch.Tensor, order_E: torch.Tensor, inverse_E: torch.Tensor
    ) -> torch.Tensor:
        # Copied: the order may have changed before a late backward.
        ctx.inverse_E = inverse_E.clone()
        return values_TE.index_select(1, order_E)

    @staticmethod
    def backward(ctx: Any, gradient_TE: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient_TE.index_select(1, ctx.inverse_E), None, None


@dataclass(frozen=True, kw_only=True)
class _Moves:
    """What one rank sends and receives when a layer's order changes.

    Args:
        sent, received: Local slots, by the other rank and then by the new slot.
        num_sent, num_received: How many to and from each rank.
        num_local: Experts of a rank.
    """

    sent: list[int]
    received: list[int]
    num_sent: list[int]
    num_received: list[int]
    num_local: int

    @classmethod
    def of(cls, before_E: np.ndarray, after_E: np.ndarray, group: dist.ProcessGroup) -> _Moves:
        """Return this rank's part of the change from one order to another."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        num_local = len(before_E) // size
        sources_E = np.argsort(before_E)[after_E]  # the old slot of what a new slot will hold
        new_E = np.flatnonzero(sources_E != np.arange(len(after_E)))
        old_E = sources_E[new_E]
        to_E, from_E = new_E // num_local, old_E // num_local
        sent, received = from_E == rank, to_E == rank
        by_target = np.lexsort((new_E[sent], to_E[sent]))
        by_source = np.lexsort((new_E[received], from_E[received]))
        return cls(
            sent=(old_E[sent][by_target] % num_local).tolist(),
            received=(new_E[received][by_source] % num_local).tolist(),
            num_sent=np.bincount(to_E[sent], minlength=size).tolist(),
            num_received=np.bincount(from_E[received], minlength=size).tolist(),
            num_local=num_local,
        )
