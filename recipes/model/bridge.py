"""Weights through Megatron-Bridge, in place of our own converter (`weights: bridge`).

Bridge knows many more architectures. It imports Transformer Engine, so it is no dependency of ours:
install it into the trainer's environment with `--no-deps`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch

from routing_replay.errors import CheckpointError, ConfigError

from . import weight_plan
from .collective import on_every_rank
from .local_modules import DuplicatedLinear
from .weight_names import is_weight
from .weights import widen_routing_biases


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
        CheckpointError: Bridge does not know the architecture or a parameter, the checkpoint is
            quantized, or the tensors do not fit.
    """
    widen_routing_biases(model_chunks)
    try:
        bridge = _bridge(hf_dir, model_chunks)
        _require_plain(bridge.hf_pretrained.config, hf_dir)
        tasks = bridge.get_conversion_tasks(model_chunks)
        on_every_rank(lambda: _require_all_filled(tasks, model_chunks, hf_dir))
        bridge.load_hf_weights(model_chunks)
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
    bridge = _bridge(source, model_chunks)
    for name, tensor in bridge.export_hf_weights(model_chunks, cpu=is_first, show_progress=False):
        converted = tensor.to(dtype) if dtype is not None and is_weight(name) else tensor
        yield name, converted if is_first else None


def _bridge(folder: str | os.PathLike[str], model_chunks: list[torch.nn.Module]) -> Any:
    require_installed()
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.conversion.param_mapping import AutoMapping

    # Bridge finds by a module's class how its weight is cut; ours stands whole on every rank.
    AutoMapping.register_module_type(DuplicatedLinear.__name__, "replicated")
    for chunk in map(weight_plan.unwrap, model_chunks):  # where Bridge looks for it
        chunk.config.share_embeddings_and_output_weights = chunk.share_embeddings_and_output_weights
    return AutoBridge.from_hf_pretrained(folder)


def _require_plain(hf_config: Any, folder: str | os.PathLike[str]) -> None:
    if getattr(hf_config, "quantization_config", None):
        raise CheckpointError(
            "the checkpoint is quantized: Megatron-Bridge drops the scales of some architectures",
            expected="a checkpoint without quantization_config",
            where=os.fspath(folder),
            fix="Use weights: own, which reads block FP8",
        )


def _require_all_filled(
    tasks: list[Any], model_chunks: list[torch.nn.Module], folder: str | os.PathLike[str]
) -> None:
    """Bridge logs a warning about a parameter that it does not know, and leaves it as it is."""
    filled = {(t.vp_stage, t.param_name) for t in tasks if t is not None and t.megatron_module}
    for stage, chunk in enumerate(weight_plan.unwrap(chunk) for chunk in model_chunks):
        biases = [name for name, _ in chunk.named_buffers() if name.endswith("router.expert_bias")]
        for name in [*(name for name, _ in chunk.named_parameters()), *biases]:
            if (stage, name) not in filled and not _is_tied(name, chunk):
                raise CheckpointError(
                    "Megatron-Bridge does not fill a parameter of the model",
                    got=name,
                    where=os.fspath(folder),
                    fix="Use weights: own",
                )


def _is_tied(name: str, chunk: Any) -> bool:
    return bool(chunk.share_embeddings_and_output_weights) and name == "output_layer.weight"
