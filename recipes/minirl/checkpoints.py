"""Checkpoints of a run: a Hugging Face folder with the trainer's state beside the weights.

checkpoints/step_000010/           loads in transformers, SGLang, Megatron (`load_hf`)
    config.json, tokenizer, *.safetensors
    trainer/state.json             step, data position, layout
    trainer/rank_00000.pt          optimizer state of one rank
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recipes.model.collective import on_every_rank
from recipes.model.optimizer_state import State, optimizer_state, restore_optimizer
from recipes.model.weights import save_hf
from routing_replay.errors import CheckpointError

from .policy import Policy

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
    return Progress(**{k: v for k, v in _state(checkpoint).items() if k != "layout"})


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
        save_hf(policy.chunks, partial, source=source)
        # The state is loaded into experts that lie where Megatron puts them.
        with policy.natural_experts():
            state = optimizer_state(policy.optimizer)
            on_every_rank(lambda: _save_state(policy, state, partial / "trainer", progress))
        on_every_rank(lambda: _finish(partial, final, policy.config.run.keep_checkpoints))
    except CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def load_trainer(policy: Policy, checkpoint: Path) -> None:
    """Restore this rank's optimizer; the weights are loaded with the model; collective.

    Raises:
        CheckpointError: Another parallel layout or number of ranks, or an unreadable state (on
            every rank).
    """
    on_every_rank(lambda: _load_state(policy, checkpoint))


def _load_state(policy: Policy, checkpoint: Path) -> None:
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
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            "the optimizer state cannot be read", got=error, where=path
        ) from error
    restore_optimizer(policy.optimizer, state)


def _save_state(policy: Policy, state: State, folder: Path, progress: Progress) -> None:
    with _writing(folder):
        folder.mkdir(exist_ok=True)
        with open(_rank_file(folder), "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        if dist.get_rank() == 0:
            text = json.dumps(asdict(progress) | {"layout": _layout(policy)}, indent=2)
            (folder / "state.json").write_text(text + "\n")


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
    """Turn what a full disk raises into our error; torch reports it as RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            "the checkpoint could not be written",
            got=f"{type(error).__name__}: {error}",
            where=f"{folder}, rank {dist.get_rank()}",
            fix="Free space and start again with --resume; earlier checkpoints are whole",
        ) from error


def _layout(policy: Policy) -> dict[str, Any]:
    t = policy.config.training
    return asdict(policy.layout) | {
        "ranks": dist.get_world_size(),
        "trainer_dtype": t.trainer_dtype,
        "distributed_optimizer": t.distributed_optimizer,
    }


def _rank_file(folder: Path) -> Path:
    return folder / f"rank_{dist.get_rank():05d}.pt"


def _state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "trainer" / "state.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "the trainer's state cannot be read", got=error, where=path
        ) from error
