"""New weights for the rollout servers: as they are, in block FP8, or rounded to FP8's grid."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from recipes.model.fp8 import E4M3_MAX

from . import models
from .policy import Policy


def write_weights(policy: Policy, folder: Path, checkpoint: Path) -> Path:
    """Write the weights to serve; collective.

    Args:
        policy: The trained policy.
        folder: Folder of the weights; replaced as a whole.
        checkpoint: Folder that config and tokenizer are copied from.

    Returns:
        The folder.
    """
    rollout = policy.config.rollout
    models.save(
        policy.chunks,
        folder,
        checkpoint,
        policy.config.training,
        dtype=getattr(torch, rollout.rollout_dtype),
        is_fp8=rollout.rollout_weights == "fp8",
    )
    if rollout.rollout_weights == "fp8-grid" and torch.distributed.get_rank() == 0:
        for path in sorted(folder.glob("*.safetensors")):
            _round_file(path)
    return folder


def round_to_fp8_grid(weight: torch.Tensor) -> torch.Tensor:
    """Return the nearest weight that is a float8 e4m3 number times its row's scale, in its dtype.

    An emulation: real FP8 inference also quantises activations and multiplies on other hardware.
    """
    values = weight.float()
    scale = values.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scale = scale / E4M3_MAX
    grid = (values / scale).to(torch.float8_e4m3fn).float()
    return (grid * scale).to(weight.dtype)


def _round_file(path: Path) -> None:
    """Round the projections of one file; router, norms, embedding and head keep their values."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for name in tensors:
        if name.endswith("_proj.weight"):
            tensors[name] = round_to_fp8_grid(tensors[name])
    partial = path.with_suffix(".tmp")
    save_file(tensors, partial, metadata)
    partial.replace(path)
