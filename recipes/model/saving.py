"""Megatron's chunks as a Hugging Face checkpoint: each rank writes a share of the files."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from routing_replay.errors import CheckpointError

from . import fp8, weight_plan
from .buckets import Buckets
from .checkpoint_files import CheckpointWriter, Shard
from .collective import on_every_rank
from .weights import LOST_PARTS, named_hf_tensors

# Of the parts of split tensors that are exchanged at once; on a GPU this much of its memory.
GATHERED_BYTES = 256 << 20
# A file in the folder of an unfinished checkpoint by which ranks tell whether all see that folder.
TOKEN = "token"
NamedTensors = Iterable[tuple[str, torch.Tensor | None]]


def save_hf(
    model_chunks: list[torch.nn.Module],
    hf_dir: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    form: fp8.Form = "checkpoint",
    max_shard_bytes: int = 4 << 30,
    tensors: NamedTensors | None = None,
) -> None:
    """Write the model as a Hugging Face checkpoint, whole or not at all; collective.

    The ranks that hold a tensor, or a copy of it, share the writing: an expert is written by one of
    its owners and never sent. They write into a folder beside `hf_dir`, which rank 0 renames: an
    earlier checkpoint there stays whole until then. Where not all ranks see rank 0's folder, rank 0
    gathers and writes everything.

    Args:
        model_chunks: As for `load_hf`.
        hf_dir: Folder of the new checkpoint.
        source: Folder of the checkpoint that config and tokenizer files are copied from.
        dtype: Of the saved weights; None keeps the parameters'.
        form: Of the projections (see `fp8`).
        max_shard_bytes: Size limit of a file, and of a writer's additional memory.
        tensors: What is saved, in this dtype: a rank writes those that it yields there. None: the
            chunks' own.

    Raises:
        CheckpointError: The files cannot be written (on every rank).
    """
    writer = CheckpointWriter(
        hf_dir,
        source=source,
        config_changes=_config_changes(model_chunks, dtype, form),
        max_shard_bytes=max_shard_bytes,
        number=dist.get_rank(),
    )
    try:
        is_shared = _started(writer)
        if tensors is None:
            choose = written_tensors if is_shared else named_hf_tensors
            tensors = choose(model_chunks, dtype)
        shards = _write(writer, tensors, form)
        on_every_rank(lambda: _finish(writer, shards))
    except CheckpointError:
        if dist.get_rank() == 0:
            writer.abandon()
        raise


def written_tensors(
    model_chunks: list[torch.nn.Module], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the Hugging Face tensors that this rank writes, whole; collective.

    All ranks must exhaust it. Together they yield what `named_hf_tensors` yields on rank 0.

    Args:
        model_chunks: As for `load_hf`.
        dtype: Of the yielded tensors; None keeps the parameters'.
    """
    buckets = Buckets(model_chunks, GATHERED_BYTES, dtype, is_spread=True)
    for bucket in buckets.buckets:
        yield from buckets.gather(bucket, device="cpu") or ()


def _config_changes(
    model_chunks: list[torch.nn.Module], dtype: torch.dtype | None, form: fp8.Form
) -> dict[str, object]:
    config = weight_plan.unwrap(model_chunks[0]).config
    return {
        "dtype": str(dtype or config.params_dtype).removeprefix("torch."),
        # The source may be quantized, whatever is saved.
        fp8.CONFIG_KEY: fp8.CONFIG if form == "fp8" else None,
        **LOST_PARTS.get(config.architecture, {}),
    }


def _started(writer: CheckpointWriter) -> bool:
    """Make the folder on rank 0; return whether all ranks see it."""
    token = writer.partial / TOKEN
    values = [uuid.uuid4().hex]
    dist.broadcast_object_list(values)

    def start() -> None:
        if dist.get_rank() == 0:
            with _writing(writer.folder):
                writer.start()
                token.write_text(values[0])

    on_every_rank(start)
    are_seen: list[Any] = [False] * dist.get_world_size()
    dist.all_gather_object(are_seen, _has_text(token, values[0]))
    if dist.get_rank() == 0:
        token.unlink()
        if not all(are_seen):
            print(f"Weights: not all ranks see {writer.folder.parent}; rank 0 writes", flush=True)
    return all(are_seen)


def _has_text(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


def _write(writer: CheckpointWriter, tensors: NamedTensors, form: fp8.Form) -> list[Shard]:
    """Write this rank's tensors; return the files of all ranks."""
    errors: list[CheckpointError] = []
    for name, tensor in tensors:
        # After a failure the ranks still exchange what was planned.
        if tensor is not None and not errors:
            try:
                with _writing(writer.folder):
                    for pair in fp8.in_form(name, tensor, form):
                        writer.add(*pair)
            except CheckpointError as error:
                errors.append(error)

    def close() -> list[Shard]:
        if errors:
            raise errors[0]
        with _writing(writer.folder):
            return writer.close()

    shards: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shards, on_every_rank(close))
    return [shard for of_rank in shards for shard in of_rank]


def _finish(writer: CheckpointWriter, shards: list[Shard]) -> None:
    if dist.get_rank() == 0:
        with _writing(writer.folder):
            writer.finish(shards)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            "the checkpoint could not be written",
            got=f"{type(error).__name__}: {error}",
            where=str(folder),
            fix="Free space or choose another folder; what was there before is untouched",
        ) from error
