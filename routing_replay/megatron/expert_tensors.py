"""The tensors of a rank's experts: weights, main parameters, optimizer states, whole or sharded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from ..errors import PreflightError

# A parameter for each expert: of SequentialMLP, and of TEGroupedMLP.
_OWN_PARAMETER = (
    re.compile(r"local_experts\.(?P<slot>\d+)\.(?P<kind>.+)"),
    re.compile(r"(?P<kind>linear_fc[12]\.(weight|bias))(?P<slot>\d+)"),
)
# All experts of a rank in one parameter, one after another in memory: GroupedMLP, up to 0.16.
_SHARED_PARAMETER = ("weight1", "weight2")
WEIGHT = "weight"  # the parameter itself, beside the names of the optimizer's states
_OPTIMIZERS = (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer)
# States in other types or places than their parameter.
_UNSUPPORTED_OPTIONS = ("use_precision_aware_optimizer", "optimizer_cpu_offload")


@dataclass(frozen=True, kw_only=True)
class ExpertSlice:
    """Where one expert's part of a kind of weight lies.

    Args:
        parameter: Megatron's parameter.
        start, stop: The expert's values in the flattened parameter.
    """

    parameter: torch.nn.Parameter
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Stored values that belong to a range of a flattened parameter.

    Args:
        values_N: A flat view: writing to it changes what is stored.
        start: Where the range begins.
    """

    values_N: torch.Tensor
    start: int

    def within(self, part: ExpertSlice) -> tuple[torch.Tensor, slice]:
        """Return the stored values of an expert and their place in the expert's values."""
        start = max(self.start, part.start)
        stop = max(start, min(self.start + len(self.values_N), part.stop))
        own_N = self.values_N[start - self.start : stop - self.start]
        return own_N, slice(start - part.start, stop - part.start)


def expert_slices(experts: torch.nn.Module, num_local: int) -> dict[str, list[ExpertSlice]]:
    """Return for each kind of weight the slices of the local experts, in the order of their slots.

    Args:
        experts: `MoELayer.experts`.
        num_local: Experts of this rank.

    Raises:
        PreflightError: A parameter of an unknown form, or in another than plain storage.
    """
    slots: dict[str, dict[int, ExpertSlice]] = {}
    for name, parameter in experts.named_parameters():
        if type(parameter.data) is not torch.Tensor:
            raise _unknown(name, f"values of type {type(parameter.data).__name__}")
        for kind, slot, part in _slices_of(name, parameter, num_local):
            slots.setdefault(kind, {})[slot] = part
    for kind, by_slot in slots.items():
        sizes = {part.stop - part.start for part in by_slot.values()}
        if sorted(by_slot) != list(range(num_local)) or len(sizes) != 1:
            raise _unknown(kind, f"{len(by_slot)} experts of {len(sizes)} sizes")
    return {kind: [by_slot[i] for i in range(num_local)] for kind, by_slot in slots.items()}


def _slices_of(
    name: str, parameter: torch.nn.Parameter, num_local: int
) -> Iterator[tuple[str, int, ExpertSlice]]:
    for pattern in _OWN_PARAMETER:
        match = pattern.fullmatch(name)
        if match:
            whole = ExpertSlice(parameter=parameter, start=0, stop=parameter.numel())
            yield match["kind"], int(match["slot"]), whole
            return
    if name not in _SHARED_PARAMETER:
        raise _unknown(name, f"a parameter of shape {tuple(parameter.shape)}")
    size = parameter.numel() // num_local
    for slot in range(num_local):
        start = slot * size
        yield name, slot, ExpertSlice(parameter=parameter, start=start, stop=start + size)


def _unknown(name: str, got: str) -> PreflightError:
    return PreflightError(
        "a parameter of the experts cannot be moved between ranks",
        expected="SequentialMLP, TEGroupedMLP or GroupedMLP with plain (unquantised) weights",
        got=got,
        where=name,
        fix="Leave the experts where they are: plan packing only",
    )


def optimizer_parts(optimizer: MegatronOptimizer | None) -> list[MegatronOptimizer]:
    """Return the optimizers of a chain.

    Raises:
        PreflightError: One keeps its states in a form that cannot be moved.
    """
    if optimizer is None:
        return []
    if isinstance(optimizer, ChainedOptimizer):
        return [part for one in optimizer.chained_optimizers for part in optimizer_parts(one)]
    options = [name for name in _UNSUPPORTED_OPTIONS if getattr(optimizer.config, name, False)]
    if not isinstance(optimizer, _OPTIMIZERS) or options:
        raise PreflightError(
            "the states of this optimizer cannot be moved between ranks",
            expected=f"one of {', '.join(kind.__name__ for kind in _OPTIMIZERS)}, without "
            f"{' and '.join(_UNSUPPORTED_OPTIONS)}",
            got=f"{type(optimizer).__name__} {options}",
            fix="Leave the experts where they are: plan packing only",
        )
    return [optimizer]


def stored_shards(parts: list[MegatronOptimizer], parameter: torch.Tensor) -> dict[str, Shard]:
    """Return all that this rank stores of a parameter: its values, main values and moments.

    Args:
        parts: From `optimizer_parts`.
        parameter: Of the model.
    """
    shards = {WEIGHT: Shard(values_N=parameter.data.view(-1), start=0)}
    for part in parts:
        start, size, tensors = _states_of(part, parameter)
        for name, tensor in tensors.items():
            # A step counter is alike for all experts; a float32 shard is a view of the parameter.
            if tensor.numel() == size and not _shares_memory(tensor, parameter):
                shards[name] = Shard(values_N=tensor.data.view(-1), start=start)
    return shards


def _states_of(
    part: MegatronOptimizer, parameter: torch.Tensor
) -> tuple[int, int, dict[str, torch.Tensor]]:
    """First value, number of values, and states that an optimizer keeps of a parameter."""
    if isinstance(part, DistributedOptimizer):
        if parameter not in part.model_param_group_index_map:
            return 0, 0, {}
        owned = part._get_model_param_range_map(parameter)["param"]
        return owned.start, owned.size, part._get_main_param_and_optimizer_states(parameter)
    main: Any = getattr(parameter, "main_param", None)
    main = parameter if main is None else main
    states = part.optimizer.state.get(main, {})
    tensors = {name: value for name, value in states.items() if isinstance(value, torch.Tensor)}
    return 0, parameter.numel(), {"param": main} | tensors


def _shares_memory(tensor: torch.Tensor, parameter: torch.Tensor) -> bool:
    first, second = tensor.untyped_storage(), parameter.untyped_storage()
    return first.data_ptr() == second.data_ptr()
