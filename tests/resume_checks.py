"""What the ranks of the worlds in `test_recipe_checkpoints.py` compute."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import torch
from megatron_batches import megatron_backward
from megatron_worlds import megatron

from recipes.minirl import checkpoints, models
from recipes.minirl.config import RolloutSettings, RunSettings, TrainingSettings
from recipes.minirl.publish import write_weights
from recipes.model import weight_plan
from recipes.model.model import transformer_config
from recipes.model.parallel import ParallelLayout
from recipes.model.weights import save_hf
from routing_replay.errors import RoutingReplayError

# isort: split
from megatron.core.distributed import finalize_model_grads


def resume(rank, folder, out, layouts, batch):
    """By layout, dtype and optimizer: the step after a resume and the uninterrupted one."""
    return {
        (name, dtype, is_distributed): _compare(
            folder, Path(out) / f"{name}-{dtype}-{is_distributed}", settings, layout, batch
        )
        for name, layout in layouts.items()
        for dtype in ("float32", "bfloat16")
        for is_distributed in (True, False)
        for settings in [_settings(dtype, is_distributed)]
    }


def resume_elsewhere(rank, folder, run_dir, batch):
    """The error of a resume from a checkpoint that another number of ranks wrote."""
    layout = ParallelLayout()
    with megatron(layout):
        policy = _policy(folder, layout, _settings("float32", True))
        try:
            checkpoints.load_trainer(policy, checkpoints.newest(Path(run_dir)))
        except RoutingReplayError as error:
            return str(error)
    return None


def _settings(dtype, is_distributed):
    return TrainingSettings(
        trainer_dtype=dtype, distributed_optimizer=is_distributed, learning_rate=1e-2
    )


def _policy(folder, layout, settings):
    """What `checkpoints` needs of a Policy, without rollout settings and objective."""
    dtype = getattr(torch, settings.trainer_dtype)
    config = transformer_config(folder, layout, dtype=dtype)
    config.finalize_model_grads_func = finalize_model_grads
    chunks = models.trained(config, layout, folder, settings)
    optimizer = models.make_optimizer(chunks, settings, dtype)
    recipe = SimpleNamespace(training=settings, run=RunSettings(keep_checkpoints=1))
    return SimpleNamespace(
        chunks=chunks,
        optimizer=optimizer,
        layout=layout,
        config=recipe,
        natural_experts=contextlib.nullcontext,  # without a plan no expert moves
    )


def _compare(folder, run_dir, settings, layout, batch):
    with megatron(layout):
        policy = _policy(folder, layout, settings)
        _step(policy, batch)
        progress = checkpoints.Progress(step=1, prompts_consumed=2)
        checkpoint = checkpoints.save(policy, run_dir, progress, folder)
        saved = _weights(policy)
        norm, uninterrupted = _step(policy, batch), _weights(policy)
        # Memory that Megatron does not initialize must not hold the right values by chance.
        policy = _policy(checkpoint, layout, settings)
        checkpoints.load_trainer(policy, checkpoint)
        loaded = _weights(policy)
        resumed_norm, resumed = _step(policy, batch), _weights(policy)
        return {
            "loaded": _equal(loaded, saved),
            "norms": (norm, resumed_norm),
            "resumed": _equal(resumed, uninterrupted),
            "moved": not _equal(uninterrupted, saved),
            "progress": checkpoints.read_progress(checkpoint),
        }


def _step(policy, batch):
    """One optimizer step; its gradient norm."""
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    policy.optimizer.zero_grad()
    megatron_backward(policy.chunks, batch)
    return float(policy.optimizer.step()[1])


def _weights(policy):
    chunks = [weight_plan.unwrap(chunk) for chunk in policy.chunks]
    return [tensor.clone() for chunk in chunks for tensor in chunk.parameters()]


def _equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def routing_biases(rank, folder, out):
    """Routing biases in the saved and in the published weights of a bfloat16 GLM-4-MoE."""
    layout = ParallelLayout()
    with megatron(layout):
        policy = _policy(folder, layout, _settings("bfloat16", True))
        policy.config.rollout = RolloutSettings(rollout_dtype="bfloat16")
        save_hf(policy.chunks, Path(out) / "saved", source=folder)
        write_weights(policy, Path(out) / "published", folder)
    return
