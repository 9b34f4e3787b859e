"""Weights between Hugging Face's files and Megatron's chunks, in both directions, any layout."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from routing_replay.errors import CheckpointError

from . import cpu, weight_plan  # noqa: F401  (cpu makes Megatron importable)

# isort: split
from megatron.core.transformer.moe.router import TopKRouter

# isort: split
from .checkpoint_files import CheckpointReader, natural_order
from .collective import on_every_rank
from .model import ModelConfig
from .weight_names import is_weight

# Names shown in an error before "and N more".
_NAMES_SHOWN = 5


def load_hf(model_chunks: list[torch.nn.Module], hf_dir: str | os.PathLike[str]) -> None:
    """Fill the chunks from a Hugging Face checkpoint; collective.

    Each rank reads only its own slices. Every tensor of the checkpoint is used exactly once and
    every parameter is filled exactly once. The values take the parameters' dtype, except routing
    biases, which become float32. Wrap the chunks first: Float16Module would round the biases. An
    optimizer with its own copy of the parameters must reload it (`reload_model_params`).

    Args:
        model_chunks: From `build_model`, wrapped (DDP, Float16Module) or not.
        hf_dir: The checkpoint's folder.

    Raises:
        CheckpointError: Missing, extra, misshapen or unreadable tensors, by name.
    """
    widen_routing_biases(model_chunks)
    parameters = on_every_rank(lambda: weight_plan.local_parameters(model_chunks))
    plan = weight_plan.gather_plan(parameters)
    config = weight_plan.unwrap(model_chunks[0]).config

    def read() -> None:
        with CheckpointReader(hf_dir) as reader:
            names = {name for name in reader.names if not _is_ignored(name, config)}
            _require_equal(set(plan), names, hf_dir)
            for parameter in parameters:
                _fill(parameter, reader)

    on_every_rank(read)


def widen_routing_biases(model_chunks: list[torch.nn.Module]) -> None:
    """Make routing biases float32. Megatron does it at a router's first forward: too late here."""
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module._maintain_float32_expert_bias()


def named_hf_tensors(
    model_chunks: list[torch.nn.Module], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield every Hugging Face tensor of the model, whole, one at a time; collective.

    All ranks must exhaust it. Memory beyond the model: one tensor, on rank 0.

    Args:
        model_chunks: As for `load_hf`.
        dtype: Of the yielded tensors; None keeps the parameters'.

    Yields:
        (name, tensor on the CPU) on global rank 0, (name, None) elsewhere; layer by layer.
    """
    parameters = on_every_rank(lambda: weight_plan.local_parameters(model_chunks))
    plan = weight_plan.gather_plan(parameters)
    for name in sorted(plan, key=natural_order):
        tensor = weight_plan.gather_tensor(plan[name], parameters)
        if tensor is not None and dtype is not None and is_weight(name):
            tensor = tensor.to(dtype)
        yield name, tensor


# Multi-token prediction layers are not built, so a saved checkpoint has none.
LOST_PARTS = {name: {"num_nextn_predict_layers": 0} for name in ("glm4_moe", "deepseek_v3")}


def _is_ignored(name: str, config: ModelConfig) -> bool:
    """Whether transformers too leaves a tensor unused: a tied head, prediction layers."""
    if name == "lm_head.weight":
        return config.tie_embeddings
    layer = name.removeprefix("model.layers.").split(".")[0]
    return config.architecture in LOST_PARTS and layer.isdigit() and int(layer) >= config.num_layers


def _require_equal(expected: set[str], got: set[str], folder: str | os.PathLike[str]) -> None:
    for what, names in (
        ("the checkpoint lacks tensors of the model", expected - got),
        ("the checkpoint has tensors that the model does not", got - expected),
    ):
        if names:
            shown = sorted(names, key=natural_order)[:_NAMES_SHOWN]
            rest = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
            raise CheckpointError(
                what,
                expected=f"{len(expected)} tensors",
                got=f"{len(got)}; the difference: {', '.join(shown)}{rest}",
                where=str(folder),
                fix="Use the config.json and all the weights of one model",
            )


def _fill(parameter: weight_plan.Parameter, reader: CheckpointReader) -> None:
    pieces = [piece for piece in parameter.pieces if piece.length]
    rows = 0
    for piece in pieces:
        part = reader.read(piece.name, piece.shape, piece.axis, piece.start, piece.stop)
        target = parameter.tensor[rows : rows + part.shape[0]]
        if target.shape != part.shape:
            raise CheckpointError(
                f"the Megatron parameter {parameter.name} has an unexpected shape",
                expected=f"rows {rows}:{rows + part.shape[0]} of shape {tuple(part.shape)}",
                got=tuple(parameter.tensor.shape),
                fix="Build the model from this checkpoint's config",
            )
        target.copy_(part)
        rows += part.shape[0]
    # Only the vocabulary is padded (see `_vocabulary`); any other remainder was never filled.
    if rows < parameter.tensor.shape[0] and not _is_vocabulary(parameter.name):
        raise CheckpointError(
            f"the Megatron parameter {parameter.name} was filled in part only",
            expected=f"{parameter.tensor.shape[0]} rows",
            got=rows,
        )
    parameter.tensor[rows:].zero_()


def _is_vocabulary(name: str) -> bool:
    return name in ("embedding.word_embeddings.weight", "output_layer.weight")
