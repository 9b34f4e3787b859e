"""Weights through Megatron-Bridge, in place of our own converter (`weights: bridge`).

Its converter is the one that many GPU jobs use. It imports Transformer Engine, so it is
no dependency of ours: install it into the trainer's environment with `--no-deps`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch

from routing_replay.errors import CheckpointError, ConfigError

from .weights import is_weight, widen_routing_biases


def require_installed() -> None:
    """Raise ConfigError where Megatron-Bridge is missing."""
    if importlib.util.find_spec("megatron.bridge") is None:
        raise ConfigError(
            "Megatron-Bridge is not installed",
            expected="megatron-bridge and Transformer Engine in the trainer's environment",
            fix="pip install --no-deps megatron-bridge, or use weights: own",
        )


def load_hf(model_chunks: list[torch.nn.Module], hf_dir: str | os.PathLike[str]) -> None:
    """Fill the chunks from a Hugging Face checkpoint; collective.

    Args:
        model_chunks: As for `weights.load_hf`.
        hf_dir: The checkpoint's folder.

    Raises:
        CheckpointError: Bridge does not know the architecture, or the tensors do not fit.
    """
    widen_routing_biases(model_chunks)
    try:
        _bridge(hf_dir).load_hf_weights(model_chunks)
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(
            "Megatron-Bridge cannot load the checkpoint", got=error, where=os.fspath(hf_dir)
        ) from error


def named_hf_tensors(
    model_chunks: list[torch.nn.Module],
    source: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield what `weights.named_hf_tensors` yields, with the names of the checkpoint `source`.

    Every rank gathers every tensor, one at a time; rank 0 alone keeps them.
    """
    is_first = torch.distributed.get_rank() == 0
    exported = _bridge(source).export_hf_weights(model_chunks, cpu=is_first, show_progress=False)
    for name, tensor in exported:
        converted = tensor.to(dtype) if dtype is not None and is_weight(name) else tensor
        yield name, converted if is_first else None


def _bridge(folder: str | os.PathLike[str]) -> Any:
    require_installed()
    from megatron.bridge import AutoBridge

    return AutoBridge.from_hf_pretrained(folder)
