"""How a model is spread over ranks, and starting and ending Megatron's process groups."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, fields

import torch

from routing_replay.errors import ConfigError

from .cpu import enable_cpu

# isort: split
from megatron.core import parallel_state, tensor_parallel

# Megatron offsets the seed of each pipeline stage by this much, so that stages differ (its own
# training script's constant).
_SEED_STRIDE_PER_STAGE = 100


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Sizes of Megatron's parallel dimensions; data parallelism takes the ranks that remain.

    Invariant: every size is at least 1. Sequence parallelism is on exactly if `tensor` > 1.
    Pipeline stages are equal, except the first and the last where `first_stage_layers` and
    `last_stage_layers` say so (Megatron's `num_layers_in_first_pipeline_stage` and `..._last_...`).

    Args:
        tensor: Tensor parallel size of the dense parts.
        pipeline: Pipeline stages.
        virtual_pipeline: Model chunks per pipeline stage; above 1 the schedule is interleaved.
        context: Context parallel size.
        expert: Expert parallel size.
        expert_tensor: Tensor parallel size within an expert; None takes `tensor`, as Megatron does.
        first_stage_layers: Layers of the first pipeline stage; None: as many as a middle one.
        last_stage_layers: Layers of the last pipeline stage; None: as many as a middle one.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    def __post_init__(self) -> None:
        if self.expert_tensor is None:
            object.__setattr__(self, "expert_tensor", self.tensor)
        for field in fields(self):
            size = getattr(self, field.name)
            if size is None and field.default is None:
                continue
            if not isinstance(size, int) or size < 1:
                raise ConfigError(
                    f"the parallel size {field.name} is out of range",
                    expected="an integer of at least 1",
                    got=repr(size),
                )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ConfigError(
                "virtual pipeline stages need a pipeline",
                expected="pipeline > 1",
                got=f"pipeline=1, virtual_pipeline={self.virtual_pipeline}",
                fix="Raise pipeline, or leave virtual_pipeline at 1",
            )
        if self._edge_layers and self.pipeline == 1:
            raise ConfigError(
                "a first or last pipeline stage of its own size needs a pipeline",
                expected="pipeline > 1",
                got=f"pipeline=1, first_stage_layers={self.first_stage_layers}, "
                f"last_stage_layers={self.last_stage_layers}",
                fix="Raise pipeline, or leave the two unset",
            )

    @property
    def sequence(self) -> bool:
        """Whether sequence parallelism is on."""
        return self.tensor > 1

    @property
    def _edge_layers(self) -> list[int]:
        """Layers of the stages that have a size of their own."""
        edges = (self.first_stage_layers, self.last_stage_layers)
        return [layers for layers in edges if layers is not None]

    def stage_layers(self, num_layers: int) -> list[int]:
        """Return the number of layers of each pipeline stage, as Megatron divides them.

        Args:
            num_layers: Of the whole model, without multi-token prediction.

        Raises:
            ConfigError: They cannot be divided so; the fix names a division that works.
        """
        num_middle = self.pipeline - len(self._edge_layers)
        left = num_layers - sum(self._edge_layers)
        middle = left // num_middle if num_middle else 0
        stages = [middle] * self.pipeline
        stages[0] = self.first_stage_layers or middle
        stages[-1] = self.last_stage_layers or stages[-1]
        is_whole = sum(stages) == num_layers and min(stages) > 0
        if not is_whole or any(layers % self.virtual_pipeline for layers in stages):
            raise ConfigError(
                "the pipeline's stages do not divide the model's num_layers",
                expected=f"{num_layers} layers in {self.pipeline} stages, each a multiple of "
                f"virtual_pipeline {self.virtual_pipeline}",
                got=f"first_stage_layers={self.first_stage_layers}, "
                f"last_stage_layers={self.last_stage_layers}",
                fix=_division(num_layers, self.pipeline, self.virtual_pipeline),
            )
        return stages

    def layers_of(self, num_layers: int, stage: int) -> list[int]:
        """Return the 0-based layers of a pipeline stage, chunk after chunk; as `stage_layers`."""
        parts = [layers // self.virtual_pipeline for layers in self.stage_layers(num_layers)]
        round_layers, before = sum(parts), sum(parts[:stage])
        starts = [chunk * round_layers + before for chunk in range(self.virtual_pipeline)]
        return [layer for start in starts for layer in range(start, start + parts[stage])]

    def check_world(self, world_size: int) -> None:
        """Raise ConfigError unless `world_size` ranks can be laid out so."""
        self._check_product(world_size, ("tensor", "pipeline", "context"))
        self._check_product(world_size, ("expert_tensor", "expert", "pipeline"))

    def _check_product(self, world_size: int, names: tuple[str, ...]) -> None:
        product = 1
        for name in names:
            product *= getattr(self, name)
        if world_size % product:
            raise ConfigError(
                "the parallel layout does not fit the number of ranks",
                expected=f"a multiple of {' * '.join(names)} = {product} ranks",
                got=f"{world_size} ranks",
                fix=f"Start {product} ranks (torchrun --nproc-per-node {product}) or lower one of "
                + ", ".join(f"{name}={getattr(self, name)}" for name in names),
            )


def _division(num_layers: int, stages: int, virtual: int) -> str:
    """Name sizes of the first and last stage that leave equal ones between them."""
    rounds, rest = divmod(num_layers, virtual)
    if stages > 1 and not rest:
        # Smaller ends first: the embedding and the logits lie there.
        for middle in (-(-rounds // stages), rounds // stages):
            first, last = _halves(rounds - (stages - 2) * middle)
            if last > 0:
                return (
                    f"Set --first-stage-layers {first * virtual} and --last-stage-layers "
                    f"{last * virtual}, or choose another --pipeline-parallel"
                )
    return "Lower --pipeline-parallel or --virtual-pipeline"


def _halves(number: int) -> tuple[int, int]:
    return number - number // 2, number // 2


def initialize(layout: ParallelLayout, seed: int, backend: str | None = None) -> None:
    """Start torch.distributed (unless it runs), Megatron's process groups and its generators.

    Under torchrun its environment variables say where the ranks meet. A process without them is a
    world of one rank.

    Args:
        layout: Checked against the number of ranks.
        seed: Seed of initialization and dropout; at least 1. Each stage and shard derives its own.
        backend: "nccl" or "gloo"; None takes nccl where there is a CUDA device.

    Raises:
        ConfigError: The layout does not fit the ranks, or Megatron is initialized already.
    """
    enable_cpu()
    if parallel_state.model_parallel_is_initialized():
        raise ConfigError("Megatron is initialized already", fix="Call destroy() first")
    layout.check_world(_world_size())
    start_distributed(backend)
    initialize_groups(layout)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed + _SEED_STRIDE_PER_STAGE * stage)
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed + _SEED_STRIDE_PER_STAGE * stage, force_reset_rng=True
    )


def initialize_groups(layout: ParallelLayout, *, has_gloo: bool = True) -> None:
    """Make Megatron's process groups over the ranks of torch.distributed."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=_virtual_size(layout),
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=has_gloo,
    )


def destroy(*, keep_world: bool = False) -> None:
    """End Megatron's process groups, and torch.distributed too unless `keep_world`."""
    groups = parallel_state._global_process_group_list or []
    # Megatron forgets its groups without closing them; a process that initializes again would keep
    # their sockets and threads.
    for group in [group for group in groups if group is not None]:
        torch.distributed.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    if not keep_world and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _world_size() -> int:
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_distributed(backend: str | None = None) -> None:
    """Start torch.distributed, unless it runs; the arguments are those of `initialize`."""
    if torch.distributed.is_initialized():
        return
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # A dead peer should end the job within minutes, not after the default half hour of NCCL.
    timeout = datetime.timedelta(minutes=10)
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend, timeout=timeout)
    else:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(
            backend, store=store, rank=0, world_size=1, timeout=timeout
        )


def _virtual_size(layout: ParallelLayout) -> int | None:
    return layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
