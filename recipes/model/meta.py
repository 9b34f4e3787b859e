"""The model under its parallel layout without memory, weights or other processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from routing_replay.errors import ConfigError

from .cpu import enable_cpu
from .model import ModelConfig, build_model
from .parallel import ParallelLayout, destroy, initialize_groups

# isort: split
from megatron.core import parallel_state, tensor_parallel


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of one rank: of the experts, and all others."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        """All parameters of the rank."""
        return self.dense + self.experts


def parameters_by_stage(
    config: ModelConfig, layout: ParallelLayout, num_ranks: int
) -> list[ParameterCount]:
    """Build the first rank of each pipeline stage on the meta device and count its parameters.

    The ranks of a stage differ in nothing but the values of their parameters. Megatron's own
    checks of the layout run as they do at a trainer's start.

    Args:
        config: From `transformer_config`, with the same layout.
        layout: Parallel sizes; they must fit `num_ranks`.
        num_ranks: Ranks of the trainer.

    Raises:
        ConfigError: Megatron cannot build the model so, or this process trains already.
    """
    layout.check_world(num_ranks)
    ranks_per_stage = num_ranks // layout.pipeline
    return [
        _count(config, layout, rank, num_ranks) for rank in range(0, num_ranks, ranks_per_stage)
    ]


def _count(
    config: ModelConfig, layout: ParallelLayout, rank: int, num_ranks: int
) -> ParameterCount:
    with _one_rank_of(layout, rank, num_ranks), _meta_device():
        try:
            chunks = build_model(config, layout)
        except (AssertionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                "Megatron cannot build the model under this layout", got=error, where=f"rank {rank}"
            ) from error
    dense = experts = 0
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                experts += parameter.numel()
            else:
                dense += parameter.numel()
    return ParameterCount(dense=dense, experts=experts)


@contextlib.contextmanager
def _one_rank_of(layout: ParallelLayout, rank: int, num_ranks: int) -> Iterator[None]:
    """Let this process be one rank of a world whose other ranks do not exist.

    The backend is torch's `fake` one: its collectives return at once and move nothing.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise ConfigError("a process of a running job cannot plan another one")
    enable_cpu()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        # Gloo would look for the other ranks.
        initialize_groups(layout, has_gloo=False)
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        yield
    finally:
        if parallel_state.model_parallel_is_initialized():
            destroy()
        else:
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _meta_device() -> Iterator[None]:
    """Allocate on the meta device, also where Megatron names the current CUDA device."""
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device = current_device
