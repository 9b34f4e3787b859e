"""Which ranks share a table, and reductions among them.

A table belongs to a data-parallel rank: all tensor-, context- and pipeline-parallel ranks beside it
work on the same sequences. Megatron has no such group, but these ranks form a grid: a reduction
over one axis after the other is the reduction over all. So no group is made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

Groups = tuple[dist.ProcessGroup, ...]


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """The axes of the ranks beside this one.

    Args:
        tokens: Ranks with other tokens of the same sequences and the same layers (tensor, context).
        stages: Ranks with other layers for the same tokens (pipeline).
        data: Ranks with other sequences.
    """

    tokens: Groups = ()
    stages: Groups = ()
    data: Groups = ()

    @classmethod
    def of_megatron(cls) -> RankGrid:
        """The grid of Megatron's groups; the world's ranks share one table if there are none."""
        if not dist.is_initialized():
            return cls()
        if not parallel_state.model_parallel_is_initialized():
            world = dist.group.WORLD
            return cls() if world is None else cls(tokens=_larger([world]))
        return cls(
            tokens=_larger(
                [
                    parallel_state.get_tensor_model_parallel_group(),
                    parallel_state.get_context_parallel_group(),
                ]
            ),
            stages=_larger([parallel_state.get_pipeline_model_parallel_group()]),
            data=_larger([parallel_state.get_data_parallel_group()]),
        )

    @property
    def table(self) -> Groups:
        """All axes of the ranks that work on the same sequences."""
        return self.tokens + self.stages


def reduce(
    values: torch.Tensor | np.ndarray, operation: dist.ReduceOp.RedOpType, groups: Groups
) -> None:
    """All-reduce in place over the product of some axes.

    Args:
        values: A tensor, or an array in host memory.
        operation: Of torch.distributed.
        groups: The axes; none leaves the values as they are.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    for group in groups:
        if dist.get_backend(group) == "nccl" and tensor.device.type == "cpu":
            on_device = tensor.cuda()
            dist.all_reduce(on_device, op=operation, group=group)
            tensor.copy_(on_device)
        else:
            dist.all_reduce(tensor, op=operation, group=group)


def _larger(groups: Sequence[dist.ProcessGroup]) -> Groups:
    """Those with more than one rank."""
    return tuple(group for group in groups if dist.get_world_size(group) > 1)
