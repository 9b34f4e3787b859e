"""Checkpoints of a run: a Hugging Face folder with the trainer's state beside the weights.

checkpoints/step_000010/           loads in transformers, SGLang, Megatron (`load_hf`)
    config.json, tokenizer, *.safetensors
    trainer/state.json             step, data position, the optimizer's step
    trainer/rank_00000_000.safetensors   optimizer state of one rank, see `optimizer_shards`

A run resumes in any layout and on any number of ranks.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from recipes.model.collective import on_every_rank
from recipes.model.optimizer_shards import num_steps, restore_shards, save_shards
from routing_replay.errors import CheckpointError

from ..policy import models
from ..policy.policy import Policy

PREFIX = "step_"
# A network file system may remember for a minute that a file did not exist.
VISIBLE_AFTER_S = 90.0
POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    Args:
        step: Last finished step.
        prompts_consumed: Position in the stream of training prompts.
    """

    step: int = 0
    prompts_consumed: int = 0


def checkpoint_of_step(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run_dir / "checkpoints" / f"{PREFIX}{step:06d}"


def newest(run_dir: Path) -> Path | None:
    """Return the checkpoint of the latest step, or None. Unfinished ones have other names."""
    return max((run_dir / "checkpoints").glob(f"{PREFIX}*"), default=None)


def agreed(run_dir: Path) -> Path | None:
    """Return the checkpoint that rank 0 finds newest, once this rank sees it too; collective.

    Raises:
        CheckpointError: Another rank does not see it (on every rank).
    """
    names: list[str | None] = [None]
    checkpoint = newest(run_dir)
    if dist.get_rank() == 0 and checkpoint is not None:
        names = [checkpoint.name]
    dist.broadcast_object_list(names, src=0)
    if names[0] is None:
        return None
    chosen = run_dir / "checkpoints" / names[0]
    on_every_rank(lambda: _require_visible(chosen / "trainer" / "state.json"))
    return chosen


def _require_visible(path: Path) -> None:
    deadline = time.monotonic() + VISIBLE_AFTER_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise CheckpointError(
                "a rank does not see the checkpoint that rank 0 resumes from",
                where=f"{path}, rank {dist.get_rank()}",
                fix="Name a folder that all machines see with --shared-dir",
            )
        time.sleep(POLL_S)


def read_progress(checkpoint: Path) -> Progress:
    """Read how far the run was at a checkpoint.

    Raises:
        CheckpointError: Its state cannot be read.
    """
    state = _state(checkpoint)
    return Progress(step=state["step"], prompts_consumed=state["prompts_consumed"])


def save(policy: Policy, run_dir: Path, progress: Progress, source: Path) -> Path:
    """Write a checkpoint, whole or not at all, and remove the oldest; collective.

    Args:
        policy: The trained policy.
        run_dir: Folder of the run that all ranks see.
        progress: How far the run is.
        source: Folder that config and tokenizer are copied from.

    Raises:
        CheckpointError: It cannot be written (on every rank); earlier ones are whole.
    """
    final = checkpoint_of_step(run_dir, progress.step)
    partial = final.with_name(f".{final.name}.partial")
    try:
        models.save(policy.chunks, partial, source, policy.config.training)
        # The state is loaded into experts that lie where Megatron puts them.
        with policy.natural_experts():
            on_every_rank(lambda: _save_state(policy, partial / "trainer", progress))
        on_every_rank(lambda: _finish(partial, final, policy.config.run.keep_checkpoints))
    except CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def load_trainer(policy: Policy, checkpoint: Path) -> None:
    """Restore this rank's optimizer; the weights are loaded with the model; collective.

    Raises:
        CheckpointError: Another type of the trainer's parameters, or an unreadable or incomplete
            state (on every rank).
    """
    on_every_rank(lambda: _load_state(policy, checkpoint))


def _load_state(policy: Policy, checkpoint: Path) -> None:
    state, dtype = _state(checkpoint), policy.config.training.trainer_dtype
    if state["trainer_dtype"] != dtype:
        raise CheckpointError(
            "the optimizer state is of parameters of another type",
            expected=dtype,
            got=state["trainer_dtype"],
            where=checkpoint,
            fix="Resume with the --trainer-dtype of the first start, or start a new run from its "
            "weights",
        )
    folder = checkpoint / "trainer"
    restore_shards(policy.chunks, policy.optimizer, folder, state["optimizer_step"])


def _save_state(policy: Policy, folder: Path, progress: Progress) -> None:
    with _writing(folder):
        folder.mkdir(exist_ok=True)
        save_shards(policy.chunks, policy.optimizer, folder / f"rank_{dist.get_rank():05d}")
        if dist.get_rank() == 0:
            state = asdict(progress) | {
                "optimizer_step": num_steps(policy.optimizer),
                "trainer_dtype": policy.config.training.trainer_dtype,
            }
            (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def _finish(partial: Path, final: Path, keep: int) -> None:
    if dist.get_rank() != 0:
        return
    with _writing(final):
        if final.exists():  # of an earlier life of this run
            _remove(final)
        partial.rename(final)
        for old in sorted(final.parent.glob(f"{PREFIX}*"))[: -max(keep, 1)]:
            _remove(old)


def _remove(checkpoint: Path) -> None:
    """Rename a checkpoint, then remove it: what an interruption leaves is no checkpoint."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    for left in checkpoint.parent.glob(".*.removed"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn what a full disk raises into our error; safetensors has an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "the checkpoint could not be written",
            got=f"{type(error).__name__}: {error}",
            where=f"{folder}, rank {dist.get_rank()}",
            fix="Free space and start again with --resume; earlier checkpoints are whole",
        ) from error


def _state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "trainer" / "state.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "the trainer's state cannot be read", got=error, where=path
        ) from error
