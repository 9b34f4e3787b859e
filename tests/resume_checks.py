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


def resume(rank, folder, out, cases, batch):
    """By case: the step after a resume and the uninterrupted one.

    Args:
        folder: The checkpoint that all start from.
        out: Folder of the runs, one for each case.
        cases: (layout's name, layout, dtype, whether the optimizer's state is sharded).
        batch: Of every data-parallel rank.
    """
    return {
        (name, dtype, is_distributed): _compare(
            folder,
            Path(out) / f"{name}-{dtype}-{is_distributed}",
            _settings(dtype, is_distributed),
            layout,
            batch,
        )
        for name, layout, dtype, is_distributed in cases
    }


def resume_elsewhere(rank, out, cases, batch, source, target):
    """Resume each case's checkpoint in another layout: write it again, and take the next step.

    Args:
        out, cases, batch: As for `resume`, with the layouts to resume in.
        source: In a case's folder, the run that is resumed.
        target: Where the checkpoint is written again; below it the weights after the step.
    """
    for name, layout, dtype, is_distributed in cases:
        run_dir = Path(out) / f"{name}-{dtype}-{is_distributed}"
        # Where the state was sharded it is whole now, and sharded where it was whole.
        settings = _settings(dtype, not is_distributed)
        _resave(run_dir / source, run_dir / target, settings, layout, batch)


def _resave(source, target, settings, layout, batch):
    checkpoint = checkpoints.newest(source)
    with megatron(layout):
        policy = _policy(checkpoint, layout, settings)
        checkpoints.load_trainer(policy, checkpoint)
        checkpoints.save(policy, target, checkpoints.read_progress(checkpoint), checkpoint)
        _step(policy, batch)
        save_hf(policy.chunks, target / "after", source=checkpoint)


def damaged(rank, folder, runs, file):
    """The error of a resume after a file was removed or overwritten, and with another dtype."""
    errors = {}
    for run_dir in Path(runs).iterdir():
        checkpoint = checkpoints.newest(run_dir)
        if run_dir.name == "removed":
            (checkpoint / "trainer" / file).unlink()
        elif run_dir.name == "overwritten":
            (checkpoint / "trainer" / file).write_bytes(b"damaged")
        dtype = "bfloat16" if run_dir.name == "type" else "float32"
        with megatron(ParallelLayout()):
            policy = _policy(folder, ParallelLayout(), _settings(dtype, True))
            try:
                checkpoints.load_trainer(policy, checkpoint)
            except RoutingReplayError as error:
                errors[run_dir.name] = str(error)
    return errors


def _settings(dtype, is_distributed):
    # With an epsilon far above every gradient Adam is gradient descent with momentum. With the
    # usual one a gradient of nearly zero that turns its sign, as sums in another order do, would
    # move a weight by twice the learning rate.
    return TrainingSettings(
        trainer_dtype=dtype,
        distributed_optimizer=is_distributed,
        learning_rate=1.0,
        adam_eps=10.0,
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
        save_hf(policy.chunks, run_dir / "after", source=folder)
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
