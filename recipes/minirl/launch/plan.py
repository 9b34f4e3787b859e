"""The plan of a run, before anything starts: sizes, memory per GPU, seconds, commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from recipes.model import flops, fp8, memory, meta
from recipes.model.model import ModelConfig, transformer_config
from recipes.model.parallel import ParallelLayout
from routing_replay.errors import CheckpointError, ConfigError, reading

from ..data import tiny_model
from ..policy import models
from ..settings.config import RecipeConfig
from . import commands, durations, server_plan

# The config.json of public models, so that a plan needs no download.
ARCHITECTURES = Path(__file__).parents[1] / "presets" / "architectures"


def plan_text(config: RecipeConfig) -> str:
    """Describe a run, of whose checkpoint only config.json is needed.

    Raises:
        ConfigError, CheckpointError: The layout does not fit the model, the model does not fit
            the GPUs, an engine would refuse the settings, or there is no model.
    """
    run_dir = Path(config.run.run_dir or "RUN_DIR")
    return "\n".join(_lines(config)) + "\n" + commands.text(config, run_dir)


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


def _lines(config: RecipeConfig) -> Iterator[str]:
    t, layout = config.training, models.parallel_layout(config.training)
    model_config = _model_config(config, layout)
    _check_positions(config, model_config)
    server = server_plan.server_layout(config)
    _check_quantized(config)
    # The cheap checks come first: the model is built only if it fits.
    memory_text = _fitting_memory(config, model_config, layout)
    server_lines = list(_server_lines(config, model_config, server))
    yield (
        f"Routing replay: {config.replay.mode}, captured by the server: {config.rollout_capture}"
    )
    yield (
        f"Step: {config.data.prompts_per_step} prompts x {config.data.samples_per_prompt} responses"
        f" = {config.batch_size}; {config.num_mini_batches} updates of {t.minibatch_size}"
    )
    yield (
        f"Trainer: {config.run.nnodes} nodes x {config.run.nproc} ranks; tensor {layout.tensor}, "
        f"pipeline {layout.pipeline}, context {layout.context}, expert {layout.expert}, "
        f"data {config.world_size // (layout.tensor * layout.pipeline * layout.context)}"
    )
    counts = meta.parameters_by_stage(model_config, layout, config.world_size)
    stages = ", ".join(f"{c.total} (experts {c.experts})" for c in counts)
    yield f"Parameters per rank, by pipeline stage: {stages}"
    yield f"Memory per GPU, estimated: {memory_text}"
    yield from server_lines
    ahead = config.rollout.ahead
    overlaps = {0: "nothing overlapping", 1: "the rollout beside the training"}
    overlap = overlaps.get(ahead, f"rollouts of {ahead} steps beside the training")
    yield f"A step, from assumed rates, {overlap}:"
    num_server_gpus = server.num_servers * server.num_gpus
    steps = list(durations.legs(config, _cost(config, model_config), num_server_gpus))
    yield from (f"  {leg.text()}" for leg in steps)
    yield f"  together {durations.step_seconds(config, steps) / 60:.1f} min"
    loading, timeout_s = steps[-1].seconds, config.rollout.publish_timeout_s
    if config.rollout.publish == "disk" and loading > timeout_s:
        yield (
            f"Warning: the servers are given {timeout_s:g} s to load the weights of a step "
            f"(--publish-timeout-s), which take {loading:.0f} s here with their writing; a faster "
            "disk, fewer servers or --publish buckets are needed"
        )


def _model_config(config: RecipeConfig, layout: ParallelLayout) -> ModelConfig:
    """Return Megatron's configuration of the run's model; it needs no weights."""
    t = config.training
    model = tiny_model.hf_config(config) if config.model.model == "tiny" else _folder(config)
    try:
        return transformer_config(
            model,
            layout,
            dtype=getattr(torch, t.trainer_dtype),
            recompute=t.recompute,
            spec="local",  # sizes do not depend on it, and the planning machine may have no GPU
        )
    except (AssertionError, ValueError) as error:
        if isinstance(error, ConfigError | CheckpointError):
            raise
        raise ConfigError("Megatron refuses the model under this layout", got=error) from error


def _check_positions(config: RecipeConfig, model: ModelConfig) -> None:
    """Refuse sequences that are longer than the model was made for; SGLang would too."""
    longest = config.plan.plan_prompt_tokens + config.rollout.max_new_tokens
    if longest > model.max_sequence_length:
        raise ConfigError(
            "a sequence is longer than the model's positions",
            expected=f"prompt and --max-new-tokens of at most {model.max_sequence_length} tokens",
            got=f"{config.plan.plan_prompt_tokens} + {config.rollout.max_new_tokens}",
        )


def _folder(config: RecipeConfig) -> Path:
    """Return the checkpoint's folder, or that of a public model's config.json of the same name."""
    folder = Path(config.model.model)
    if (folder / "config.json").is_file():
        return folder
    known = sorted(path.parent.name for path in ARCHITECTURES.glob("*/config.json"))
    if folder.name not in known:
        raise CheckpointError(
            "there is no config.json to plan with",
            expected=f"a checkpoint's folder, or one of the models {', '.join(known)}",
            where=folder,
            fix="Name the folder of the checkpoint with --model",
        )
    return ARCHITECTURES / folder.name


def _check_quantized(config: RecipeConfig) -> None:
    """Refuse FP8 weights for servers that start from another format."""
    if config.rollout.rollout_weights != "fp8":
        return
    folder = Path(config.rollout.rollout_model) if config.rollout.rollout_model else _folder(config)
    path = folder / "config.json"
    with reading(path, "the config.json of the servers' checkpoint", CheckpointError):
        fp8.require_quantized(json.loads(path.read_text()), path)


def _fitting_memory(config: RecipeConfig, model: ModelConfig, layout: ParallelLayout) -> str:
    estimate, gigabytes = memory_estimate(config, model, layout), config.plan.plan_gpu_gb
    if not gigabytes:
        return estimate.text()
    memory.require_fit(estimate, int(gigabytes * durations.GIGA))
    return f"{estimate.text()}, of a GPU's {gigabytes * durations.GIGA / memory.GIB:.1f} GiB"


def _server_lines(
    config: RecipeConfig, model: ModelConfig, server: server_plan.ServerLayout
) -> Iterator[str]:
    server_plan.check_server(config, model, server)
    yield (
        f"Servers: {server.num_servers} x {server.num_gpus} GPUs; tensor {server.tensor}, "
        f"pipeline {server.pipeline}, data {server.data}, expert {server.expert}"
    )
    if config.plan.plan_gpu_gb:
        gib, tokens = server_plan.cache_tokens(config, model, server, _num_parameters(model))
        yield (
            f"Memory per server GPU, estimated: weights {gib:.1f} GiB; its cache holds {tokens} "
            f"tokens at a memory fraction of {server.mem_fraction:g}"
        )


def _cost(config: RecipeConfig, model: ModelConfig) -> durations.ModelCost:
    num_moe = sum(memory.moe_layers(model, ParallelLayout(), 0))
    return durations.ModelCost(
        forward_flops=flops.forward_flops(model, sum(durations.mean_tokens(config))),
        checkpoint_bytes=server_plan.weight_bytes(config, model, _num_parameters(model)),
        route_slots=num_moe * model.moe_router_topk,
        id_bytes=1 if model.num_moe_experts <= 256 else 2,
    )


def _num_parameters(model: ModelConfig) -> int:
    return sum(memory.num_parameters(model, ParallelLayout(), 0))
