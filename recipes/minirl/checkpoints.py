"""Checkpoints of a run: a Hugging Face folder with the trainer's state beside the weights.

checkpoints/step_000010/           loads in transformers, SGLang, Megatron (`load_hf`)
    config.json, tokenizer, *.safetensors
    trainer/state.json             step, data position, layout
    trainer/rank_00000.pt          optimizer and generator of one rank
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from recipes.model.weights import save_hf
from routing_replay.errors import CheckpointError

from .policy import Policy

PREFIX = "step_"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    Args:
        step: Last finished step.
        prompts_consumed: Position in the stream of training prompts.
    """

    step: int = 0
    prompts_consumed: int = 0


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"{PREFIX}{step:06d}"


def newest(run_dir: Path) -> Path | None:
    """The checkpoint of the latest step, or None. Unfinished ones have other names."""
    return max((run_dir / "checkpoints").glob(f"{PREFIX}*"), default=None)


def read_progress(checkpoint: Path) -> Progress:
    """How far the run was at a checkpoint.

    Raises:
        CheckpointError: Its state cannot be read.
    """
    return Progress(**{k: v for k, v in _state(checkpoint).items() if k != "layout"})


def save(policy: Policy, run_dir: Path, progress: Progress, source: Path) -> Path:
    """Write a checkpoint, whole or not at all, and remove the oldest; collective.

    Args:
        policy: The trained policy.
        run_dir: Folder of the run.
        progress: How far the run is.
        source: Folder that config and tokenizer are copied from.

    Raises:
        CheckpointError: It cannot be written (on every rank); earlier ones are whole.
    """
    final = folder_of(run_dir, progress.step)
    partial = final.with_name(f".{final.name}.partial")
    try:
        save_hf(policy.chunks, partial, source=source)
        _together(lambda: _save_state(policy, partial / "trainer", progress), final)
        _together(lambda: _finish(partial, final, policy.config.run.keep_checkpoints), final)
    except CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def load_trainer(policy: Policy, checkpoint: Path) -> None:
    """Optimizer and generator of this rank; the weights are loaded with the model.

    Raises:
        CheckpointError: Of another parallel layout or world size, or unreadable.
    """
    layout = _state(checkpoint)["layout"]
    if layout != _layout(policy):
        raise CheckpointError(
            "the optimizer state is of another parallel layout",
            expected=_layout(policy),
            got=layout,
            where=checkpoint,
            fix="Resume with the layout of the first start, or start a new run from its weights",
        )
    path = _rank_file(checkpoint / "trainer")
    try:
        state = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            "the optimizer state cannot be read", got=error, where=path
        ) from error
    policy.optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])


def _save_state(policy: Policy, folder: Path, progress: Progress) -> None:
    folder.mkdir(exist_ok=True)
    state = {"optimizer": policy.optimizer.state_dict(), "rng": torch.get_rng_state()}
    with open(_rank_file(folder), "wb") as file:
        torch.save(state, file)
        os.fsync(file.fileno())
    if dist.get_rank() == 0:
        text = json.dumps(asdict(progress) | {"layout": _layout(policy)}, indent=2)
        (folder / "state.json").write_text(text + "\n")


def _finish(partial: Path, final: Path, keep: int) -> None:
    if dist.get_rank() != 0:
        return
    if final.exists():  # of an earlier life of this run
        _remove(final)
    partial.rename(final)
    for old in sorted(final.parent.glob(f"{PREFIX}*"))[: -max(keep, 1)]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; what an interruption leaves of it does not look like one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    for left in checkpoint.parent.glob(".*.removed"):
        shutil.rmtree(left, ignore_errors=True)


def _together(work: Callable[[], None], where: Path) -> None:
    """Do the work on every rank, and fail on every rank if it fails on one."""
    error = None
    try:
        work()
    except (OSError, RuntimeError) as raised:  # torch reports a full disk as RuntimeError
        error = f"{type(raised).__name__}: {raised}"
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, of_rank in enumerate(errors):
        if of_rank is not None:
            raise CheckpointError(
                "the checkpoint could not be written",
                got=of_rank,
                where=f"{where}, rank {rank}",
                fix="Free space and start again with --resume; earlier checkpoints are whole",
            )


def _layout(policy: Policy) -> dict:
    t = policy.config.training
    return asdict(policy.layout) | {
        "ranks": dist.get_world_size(),
        "trainer_dtype": t.trainer_dtype,
        "distributed_optimizer": t.distributed_optimizer,
    }


def _rank_file(folder: Path) -> Path:
    return folder / f"rank_{dist.get_rank():05d}.pt"


def _state(checkpoint: Path) -> dict:
    path = checkpoint / "trainer" / "state.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "the trainer's state cannot be read", got=error, where=path
        ) from error
