"""One rank's optimizer state, complete: with the shards that Megatron's `state_dict` leaves out.

`DistributedOptimizer.state_dict()` holds no tensor, and loading it fills the moments with
uninitialized memory. Megatron saves them through `dist_checkpointing`, which pickles, spawns a
process per rank and gathers each data-parallel group's state. A run resumes in the layout it was
started with, so each rank saves its own shards here instead, and another layout is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from routing_replay.errors import CheckpointError, ConfigError

from . import cpu  # noqa: F401  (makes Megatron importable)

# isort: split
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

State = dict[str, list[Any]]
Shards = list[dict[str, torch.Tensor]]

# Options that keep the state in other types or places than this module knows how to restore.
_UNSUPPORTED = ("use_precision_aware_optimizer", "optimizer_cpu_offload")


def require_resumable(config: OptimizerConfig) -> None:
    """Refuse an optimizer whose state could not be restored, before the run starts.

    Raises:
        ConfigError: An option that keeps scaled, split or offloaded states.
    """
    for name in _UNSUPPORTED:
        if getattr(config, name, False):
            raise ConfigError(
                f"a run with {name} cannot be resumed",
                expected=f"{name}=False",
                got=True,
                fix="Turn the option off; distributed_optimizer shards the state over ranks",
            )


def optimizer_state(optimizer: MegatronOptimizer) -> State:
    """Return this rank's whole state: steps, groups, and every shard with its moments.

    Args:
        optimizer: After at least one step; sharded over data-parallel ranks or not.

    Returns:
        What `torch.save` writes and `torch.load(weights_only=True)` reads.
    """
    parts = list(_parts(optimizer))
    return {"states": [p.state_dict() for p in parts], "shards": [_shards(p) for p in parts]}


def restore_optimizer(optimizer: MegatronOptimizer, state: State) -> None:
    """Restore what `optimizer_state` returned on this rank, in the same layout.

    Raises:
        CheckpointError: The shards are not those of this optimizer.
    """
    parts = list(_parts(optimizer))
    expected, got = len(parts), len(state["states"])
    if expected != got:
        raise CheckpointError(
            "the optimizer state is of another model", expected=f"{expected} optimizers", got=got
        )
    for part, inner, shards in zip(parts, state["states"], state["shards"], strict=True):
        part.load_state_dict(inner)
        _restore_shards(part, shards)


def _parts(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """The optimizers of a chain: experts have one of their own."""
    if not isinstance(optimizer, ChainedOptimizer):
        yield optimizer
        return
    for part in optimizer.chained_optimizers:
        yield from _parts(part)


def _sharded_parameters(optimizer: MegatronOptimizer) -> list[torch.nn.Parameter]:
    """The model's parameters of which this rank holds a shard, in the buffers' order."""
    if not isinstance(optimizer, DistributedOptimizer):
        return []  # its state_dict holds every tensor
    return list(optimizer.model_param_group_index_map)


def _shards(optimizer: MegatronOptimizer) -> Shards:
    # Megatron's own accessor: master weights and moments; in bfloat16 the masters are only here.
    return [
        optimizer._get_main_param_and_optimizer_states(parameter)
        for parameter in _sharded_parameters(optimizer)
    ]


def _restore_shards(optimizer: MegatronOptimizer, shards: Shards) -> None:
    allocated = _shards(optimizer)
    expected, got = _sizes(allocated), _sizes(shards)
    if expected != got:
        raise CheckpointError(
            "the optimizer state is of another sharding", expected=expected, got=got
        )
    for current, saved in zip(allocated, shards, strict=True):
        main = current["param"]
        main.data.copy_(saved["param"])
        for name in saved.keys() - {"param"}:
            # Assigned, not copied: with torch's Adam Megatron loads one `step` tensor into all
            # states, which then counts a step for every shard.
            optimizer.optimizer.state[main][name] = saved[name].to(current[name].device)


def _sizes(shards: Shards) -> list[dict[str, int]]:
    return [{name: tensor.numel() for name, tensor in sorted(s.items())} for s in shards]
