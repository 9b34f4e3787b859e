"""Weights between Hugging Face's files and Megatron's chunks, in both directions, any layout."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator

import torch
from safetensors import SafetensorError

from routing_replay.errors import CheckpointError

from . import cpu, fp8, weight_plan  # noqa: F401  (cpu makes Megatron importable)

# isort: split
from megatron.core.transformer.moe.router import TopKRouter

# isort: split
from .checkpoint_files import CheckpointReader, CheckpointWriter, natural_order
from .collective import on_every_rank
from .model import ModelConfig

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


def save_hf(
    model_chunks: list[torch.nn.Module],
    hf_dir: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    is_fp8: bool = False,
    max_shard_bytes: int = 4 << 30,
    tensors: Iterator[tuple[str, torch.Tensor | None]] | None = None,
) -> None:
    """Write the model as a Hugging Face checkpoint, whole or not at all; collective.

    Global rank 0 writes into a folder beside `hf_dir` and renames it: an earlier checkpoint there
    stays whole until then.

    Args:
        model_chunks: As for `load_hf`.
        hf_dir: Folder of the new checkpoint.
        source: Folder of the checkpoint that config and tokenizer files are copied from.
        dtype: Of the saved weights; None keeps the parameters'.
        is_fp8: Whether the projections are saved in block FP8 (see `fp8`).
        max_shard_bytes: Size limit of a file, and of rank 0's additional memory.
        tensors: What is saved, in this dtype; None takes `named_hf_tensors` of the chunks.

    Raises:
        CheckpointError: The files cannot be written (on every rank).
    """
    config = weight_plan.unwrap(model_chunks[0]).config
    saved = str(dtype or config.params_dtype).removeprefix("torch.")
    # The source may be quantized, whatever is saved.
    changes: dict[str, object] = {
        "dtype": saved,
        fp8.CONFIG_KEY: fp8.CONFIG if is_fp8 else None,
        **_LOST_PARTS.get(config.architecture, {}),
    }
    writer = CheckpointWriter(
        hf_dir,
        source=source,
        config_changes=changes,
        max_shard_bytes=max_shard_bytes,
    )
    error = _attempt(writer.start)
    for name, tensor in tensors or named_hf_tensors(model_chunks, dtype):
        # After a failure the other ranks still send what was planned: receive it all.
        if error is None and tensor is not None:
            error = _attempt(functools.partial(_add, writer, name, tensor, is_fp8))
    if error is None:
        error = _attempt(writer.finish)
    if error is not None:
        writer.abandon()
    on_every_rank(lambda: _raise_unwritten(error, hf_dir))


def _add(writer: CheckpointWriter, name: str, tensor: torch.Tensor, is_fp8: bool) -> None:
    for pair in fp8.quantized(name, tensor) if is_fp8 else [(name, tensor)]:
        writer.add(*pair)


def _raise_unwritten(error: Exception | None, folder: str | os.PathLike[str]) -> None:
    if error is not None:
        raise CheckpointError(
            "the checkpoint could not be written",
            got=f"{type(error).__name__}: {error}",
            where=str(folder),
            fix="Free space or choose another folder; what was there before is untouched",
        ) from error


# Multi-token prediction layers are not built, so a saved checkpoint has none.
_LOST_PARTS = {name: {"num_nextn_predict_layers": 0} for name in ("glm4_moe", "deepseek_v3")}


def _is_ignored(name: str, config: ModelConfig) -> bool:
    """Whether transformers too leaves a tensor unused: a tied head, prediction layers."""
    if name == "lm_head.weight":
        return config.tie_embeddings
    layer = name.removeprefix("model.layers.").split(".")[0]
    return (
        config.architecture in _LOST_PARTS and layer.isdigit() and int(layer) >= config.num_layers
    )


def is_weight(name: str) -> bool:
    """Return whether a tensor takes the dtype asked for: in bfloat16 a bias would select others."""
    return not name.endswith("e_score_correction_bias")


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


def _attempt(work: Callable[[], None]) -> Exception | None:
    """Run `work` on rank 0 and return the error that it raised, or None."""
    if torch.distributed.get_rank() > 0:
        return None
    try:
        work()
    except (OSError, SafetensorError, ValueError) as error:
        return error
    return None
