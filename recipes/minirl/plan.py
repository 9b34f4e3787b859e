"""The plan of a run, before anything starts: sizes, memory per GPU, commands."""

from __future__ import annotations

from pathlib import Path

import torch

from recipes.model import memory
from recipes.model.model import ModelConfig, transformer_config
from recipes.model.parallel import ParallelLayout

from . import commands, models, tiny_model
from .config import RecipeConfig


def plan_text(config: RecipeConfig) -> str:
    """Describe a run, of whose checkpoint only config.json is needed.

    Raises:
        ConfigError, CheckpointError: The layout does not fit the model, or there is no model.
    """
    t, layout = config.training, models.parallel_layout(config.training)
    model_config = transformer_config(
        tiny_model.hf_config(config) if config.model.model == "tiny" else config.model.model,
        layout,
        dtype=getattr(torch, t.trainer_dtype),
        recompute=t.recompute,
        spec="local",  # sizes do not depend on it, and the planning machine may have no GPU
    )
    model_ranks = layout.tensor * layout.pipeline * layout.context
    lines = [
        f"Routing replay: {config.replay.mode}, captured by the server: {config.rollout_capture}",
        f"Step: {config.data.prompts_per_step} prompts x {config.data.samples_per_prompt} responses"
        f" = {config.batch_size}; {config.num_mini_batches} updates of {t.minibatch_size}",
        f"Trainer: {config.run.nnodes} nodes x {config.run.nproc} ranks; tensor {layout.tensor}, "
        f"pipeline {layout.pipeline}, context {layout.context}, expert {layout.expert}, "
        f"data {config.world_size // model_ranks}",
        f"Memory per GPU, estimated: {memory_estimate(config, model_config, layout).text()}",
    ]
    run_dir = Path(config.run.run_dir or "RUN_DIR")
    return "\n".join(lines) + "\n" + commands.text(config, run_dir)


def memory_estimate(
    config: RecipeConfig, model_config: ModelConfig, layout: ParallelLayout
) -> memory.MemoryEstimate:
    """Estimate the memory of a trainer's GPU. Of padded sequences the prompts are not counted."""
    t, longest = config.training, config.rollout.max_new_tokens
    padded = t.microbatch_size * longest
    tokens = max(t.microbatch_tokens, longest) if t.microbatch_tokens else padded
    workload = memory.Workload(
        num_ranks=config.world_size,
        microbatch_tokens=tokens,
        distributed_optimizer=t.distributed_optimizer,
        has_reference=config.needs_reference,
        fp32_logits=False,
    )
    return memory.estimate(model_config, layout, workload)
