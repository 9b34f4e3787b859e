"""The trainer's models: the trained one with its optimizer, and a frozen reference."""

from __future__ import annotations

from pathlib import Path

import torch

from recipes.model import bridge, fp8, parallel
from recipes.model.model import ModelConfig, build_model
from recipes.model.optimizer_shards import require_resumable
from recipes.model.saving import save_hf
from recipes.model.weights import load_hf

# isort: split
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module

from ..settings.sections import TrainingSettings


def trained(
    config: ModelConfig, layout: parallel.ParallelLayout, checkpoint: Path, t: TrainingSettings
) -> list[DistributedDataParallel]:
    """Return this rank's chunks with a checkpoint's weights, ready for training."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=t.distributed_optimizer
    )
    chunks = _loaded(config, layout, checkpoint, t)
    return [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]


def frozen(
    config: ModelConfig, layout: parallel.ParallelLayout, checkpoint: Path, t: TrainingSettings
) -> list[torch.nn.Module]:
    """Return chunks of the same architecture with a checkpoint's weights, without gradients."""
    chunks = _loaded(config, layout, checkpoint, t)
    for chunk in chunks:
        chunk.requires_grad_(False)
    return chunks


def save(
    chunks: list[torch.nn.Module],
    folder: Path,
    source: Path,
    t: TrainingSettings,
    dtype: torch.dtype | None = None,
    form: fp8.Form = "checkpoint",
) -> None:
    """Write the weights as a Hugging Face checkpoint, by the converter of the settings; collective.

    The arguments are those of `save_hf`.
    """
    tensors = bridge.named_hf_tensors(chunks, source, dtype) if t.weights == "bridge" else None
    save_hf(chunks, folder, source=source, dtype=dtype, form=form, tensors=tensors)


def _loaded(
    config: ModelConfig, layout: parallel.ParallelLayout, checkpoint: Path, t: TrainingSettings
) -> list[torch.nn.Module]:
    chunks = build_model(config, layout)
    if config.bf16:
        # Before the weights are loaded: the wrapper rounds routing biases, which must stay float32.
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    load = bridge.load_hf if t.weights == "bridge" else load_hf
    load(chunks, checkpoint)
    return chunks


def parallel_layout(t: TrainingSettings) -> parallel.ParallelLayout:
    """Return the parallel layout of the settings."""
    return parallel.ParallelLayout(
        tensor=t.tensor_parallel,
        pipeline=t.pipeline_parallel,
        virtual_pipeline=t.virtual_pipeline,
        context=t.context_parallel,
        expert=t.expert_parallel,
        # Small experts are not worth splitting; expert parallelism spreads whole ones.
        expert_tensor=1,
        first_stage_layers=t.first_stage_layers or None,
        last_stage_layers=t.last_stage_layers or None,
    )


def make_optimizer(
    chunks: list[torch.nn.Module], t: TrainingSettings, dtype: torch.dtype
) -> MegatronOptimizer:
    """Return AdamW over the chunks' parameters."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=t.learning_rate,
        weight_decay=t.weight_decay,
        adam_beta2=t.adam_beta2,
        adam_eps=t.adam_eps,
        clip_grad=t.clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=t.distributed_optimizer,
    )
    require_resumable(config)
    # With gloo as the backend there is no second set of groups for CPU tensors.
    uses_gloo = torch.distributed.get_backend() == "gloo"
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=not uses_gloo)
