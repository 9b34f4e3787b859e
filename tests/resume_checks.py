"""What the ranks of the worlds in `test_recipe_checkpoints.py` compute."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from megatron_batches import megatron_backward
from megatron_worlds import megatron

from recipes.minirl.job import checkpoints
from recipes.minirl.policy import models
from recipes.minirl.publish.publisher import write_weights
from recipes.minirl.settings.config import RolloutSettings, RunSettings, TrainingSettings
from recipes.model import weight_plan
from recipes.model.model import transformer_config
from recipes.model.parallel import ParallelLayout
from recipes.model.saving import save_hf
from routing_replay.balance import Placement
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
    """What `checkpoints` needs of a Policy, without rollout settings and objective.

    Under expert parallelism its experts can move, as in a planned run.
    """
    from routing_replay.megatron.placement import place_experts

    dtype = getattr(torch, settings.trainer_dtype)
    config = transformer_config(folder, layout, dtype=dtype)
    config.finalize_model_grads_func = finalize_model_grads
    chunks = models.trained(config, layout, folder, settings)
    optimizer = models.make_optimizer(chunks, settings, dtype)
    recipe = SimpleNamespace(training=settings, run=RunSettings(keep_checkpoints=1))
    placed = place_experts(chunks, optimizer) if layout.expert > 1 else None
    return SimpleNamespace(
        chunks=chunks,
        optimizer=optimizer,
        layout=layout,
        config=recipe,
        placed=placed,
        natural_experts=contextlib.nullcontext if placed is None else placed.natural,
    )


def _compare(folder, run_dir, settings, layout, batch):
    with megatron(layout):
        policy = _policy(folder, layout, settings)
        _move(policy, seed=1)
        _step(policy, batch)
        progress = checkpoints.Progress(step=1, prompts_consumed=2)
        checkpoint = checkpoints.save(policy, run_dir, progress, folder)
        saved = _weights(policy)
        norm, uninterrupted = _step(policy, batch), _weights(policy)
        save_hf(policy.chunks, run_dir / "after", source=folder)
        killed = _killed_in_mid_move(policy, run_dir, folder)
        # Memory that Megatron does not initialize must not hold the right values by chance.
        policy = _policy(checkpoint, layout, settings)
        checkpoints.load_trainer(policy, checkpoint)
        loaded = _weights(policy)
        _move(policy, seed=1)
        resumed_norm, resumed = _step(policy, batch), _weights(policy)
        return {
            "loaded": _equal(loaded, saved),
            "norms": (norm, resumed_norm),
            "resumed": _equal(resumed, uninterrupted),
            "moved": not _equal(uninterrupted, saved),
            "progress": checkpoints.read_progress(checkpoint),
            "killed": killed,
            "is_newest": checkpoints.newest(run_dir) == checkpoint,
        }


def _move(policy, seed):
    """Bring the experts elsewhere, if they can move."""
    if policy.placed is not None:
        natural_LE = np.arange(policy.placed.placement.experts_LE.shape[1])
        rng = np.random.default_rng(seed)
        order_LE = np.stack([rng.permutation(natural_LE) for _ in policy.placed.layers])
        num_ranks = policy.placed.placement.num_ranks
        policy.placed.move(Placement(experts_LE=order_LE, num_ranks=num_ranks))
        assert policy.placed.num_moved


def _killed_in_mid_move(policy, run_dir, folder):
    """The error of a checkpoint after a move that ended between its messages."""
    if policy.placed is None:
        return None
    stock, calls = torch.distributed.all_to_all_single, []

    def second_fails(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("the network is gone")
        return stock(*arguments, **options)

    with (
        mock.patch.object(torch.distributed, "all_to_all_single", second_fails),
        contextlib.suppress(OSError),
    ):
        _move(policy, seed=2)
    assert len(calls) == 2
    try:
        progress = checkpoints.Progress(step=2, prompts_consumed=4)
        checkpoints.save(policy, run_dir, progress, folder)
    except RoutingReplayError as error:
        return str(error)
    return None


def _step(policy, batch):
    """One optimizer step; its gradient norm."""
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    policy.optimizer.zero_grad()
    megatron_backward(policy.chunks, batch)
    return float(policy.optimizer.step()[1])


def _weights(policy):
    chunks = [weight_plan.unwrap(chunk) for chunk in policy.chunks]
    with policy.natural_experts():
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
