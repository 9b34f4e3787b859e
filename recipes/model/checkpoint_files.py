"""Files of a Hugging Face checkpoint: reading slices, and writing a folder whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from routing_replay.errors import CheckpointError

from . import fp8

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Files beside the weights that a saved checkpoint needs to be usable: config, tokenizer, template.
_SIDE_FILES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


class CheckpointReader:
    """Slices of the safetensors files of one folder; a context manager that closes them.

    Args:
        folder: Holds `model.safetensors`, or shards with `model.safetensors.index.json`.

    Raises:
        CheckpointError: No such files, or damaged ones.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self._stack = contextlib.ExitStack()
        self._open: dict[str, Any] = {}
        self._file_of = self._list_tensors()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.clear()
        self._stack.close()

    @property
    def names(self) -> set[str]:
        """Names of all tensors; scales of quantized ones are part of these."""
        return {name for name in self._file_of if not name.endswith(fp8.SCALE_SUFFIX)}

    def read(
        self, name: str, shape: tuple[int, ...], axis: int, start: int, stop: int
    ) -> torch.Tensor:
        """Read rows (axis 0) or columns (axis 1) `start:stop` of a tensor of the given shape.

        What is stored in block FP8 comes back as float32.

        Raises:
            CheckpointError: The tensor has another shape, or its file is damaged.
        """
        with self._readable(self._file_of[name]):
            view = self._file(self._file_of[name]).get_slice(name)
            if tuple(view.get_shape()) != tuple(shape):
                raise CheckpointError(
                    f"a tensor of the checkpoint has the wrong shape: {name}",
                    expected=tuple(shape),
                    got=tuple(view.get_shape()),
                    where=str(self.folder / self._file_of[name]),
                    fix="Use the config.json and the weights of one model",
                )
            part = view[start:stop] if axis == 0 else view[:, start:stop]
        if part.dtype != torch.float8_e4m3fn:
            return part
        scales = self.read_whole(name + fp8.SCALE_SUFFIX)
        first = (start, 0) if axis == 0 else (0, start)
        return fp8.dequantize(part, scales, *first)

    def read_whole(self, name: str) -> torch.Tensor:
        """Read a tensor as it is stored.

        Raises:
            CheckpointError: There is none of this name, or its file is damaged.
        """
        if name not in self._file_of:
            raise CheckpointError(f"the checkpoint has no {name}", where=str(self.folder))
        with self._readable(self._file_of[name]):
            tensor: torch.Tensor = self._file(self._file_of[name]).get_tensor(name)
            return tensor

    def _list_tensors(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.exists():
            with self._readable(INDEX):
                return dict(json.loads(index.read_text())["weight_map"])
        if (self.folder / SINGLE).exists():
            with self._readable(SINGLE):
                return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        raise CheckpointError(
            "the checkpoint has no weights", expected=f"{SINGLE} or {INDEX}", where=str(self.folder)
        )

    def _file(self, name: str) -> Any:
        if name not in self._open:
            handle = safe_open(self.folder / name, framework="pt", device="cpu")
            self._open[name] = self._stack.enter_context(handle)
        return self._open[name]

    @contextlib.contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(
                "a file of the checkpoint cannot be read",
                got=f"{type(error).__name__}: {error}",
                where=str(self.folder / name),
                fix="The file is damaged or incomplete: copy the checkpoint again",
            ) from error


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A written file of a checkpoint.

    Args:
        file: Its name until the checkpoint is finished.
        names: Its tensors.
        size_bytes: Of these.
    """

    file: str
    names: list[str]
    size_bytes: int


class CheckpointWriter:
    """Write a checkpoint into a folder beside the final one, which `finish` renames.

    Several writers may write files into it. One of them starts and finishes, or abandons.
    Invariant: until `finish` returns, the final folder is as it was, and what was written has
    neither an index nor a config.

    Args:
        folder: The checkpoint's final folder; an earlier checkpoint there is replaced as a whole.
        source: Folder to copy config and tokenizer files from.
        config_changes: Keys of config.json to set, or with None to remove.
        max_shard_bytes: A file's size limit (one tensor may exceed it); bounds the memory used.
        number: Of this writer.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        source: str | os.PathLike[str],
        config_changes: Mapping[str, object] | None = None,
        max_shard_bytes: int = 4 << 30,
        number: int = 0,
    ):
        self.folder, self.source = Path(folder), Path(source)
        self.config_changes = dict(config_changes or {})
        self.max_shard_bytes = max_shard_bytes
        self.number = number
        self.partial = self.folder.with_name(f".{self.folder.name}.partial")
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[Shard] = []

    def start(self) -> None:
        """Make the folder to write into, and remove what an interrupted save left."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one whole tensor, and write a file once it is full."""
        size_bytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size_bytes > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size_bytes

    def close(self) -> list[Shard]:
        """Write what is pending; return all files of this writer."""
        self._flush()
        return self._shards

    def finish(self, shards: Sequence[Shard]) -> None:
        """Name the files of all writers, write index and side files, move the folder into place."""
        self._name_shards(shards)
        self._copy_side_files()
        for path in self.partial.iterdir():
            if path.suffix != ".safetensors":
                sync(path)
        sync(self.partial)
        self._replace()

    def abandon(self) -> None:
        """Remove what was written; the final folder is as before."""
        self._pending.clear()
        shutil.rmtree(self.partial, ignore_errors=True)

    def _flush(self) -> None:
        if self._pending:
            file = f"{self.number}-{len(self._shards)}.safetensors"
            # transformers refuses files whose metadata does not name the framework.
            save_file(self._pending, self.partial / file, metadata={"format": "pt"})
            # Here rather than at the end: the other ranks wait in a collective, whose time limit
            # must not depend on the size of the whole model.
            sync(self.partial / file)
            names = list(self._pending)
            shard = Shard(file=file, names=names, size_bytes=self._pending_bytes)
            self._shards.append(shard)
            self._pending, self._pending_bytes = {}, 0

    def _name_shards(self, shards: Sequence[Shard]) -> None:
        weight_map: dict[str, str] = {}
        count = len(shards)
        in_order = sorted(shards, key=lambda shard: natural_order(shard.names[0]))
        for number, shard in enumerate(in_order, 1):
            file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.partial / shard.file).rename(self.partial / file)
            weight_map |= dict.fromkeys(shard.names, file)
        if count > 1:
            metadata = {"total_size": sum(shard.size_bytes for shard in shards)}
            index = {"metadata": metadata, "weight_map": weight_map}
            (self.partial / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _copy_side_files(self) -> None:
        for path in sorted(self.source.iterdir()):
            if path.is_file() and path.suffix in _SIDE_FILES and path.name != INDEX:
                shutil.copyfile(path, self.partial / path.name)
        path = self.partial / "config.json"
        config = json.loads(path.read_text()) | self.config_changes
        for key, value in self.config_changes.items():
            if value is None:
                del config[key]
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def _replace(self) -> None:
        # A rename cannot replace a folder that holds files, so the earlier one steps aside first. A
        # crash between the two renames leaves it under that name, whole.
        earlier = self.folder.with_name(f".{self.folder.name}.earlier")
        shutil.rmtree(earlier, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(earlier)
        try:
            self.partial.rename(self.folder)
        except OSError:
            if earlier.exists():
                earlier.rename(self.folder)
            raise
        shutil.rmtree(earlier, ignore_errors=True)
        sync(self.folder.parent)


def natural_order(name: str) -> list[int | str]:
    """Return a sorting key that puts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def sync(path: Path) -> None:
    """Return once a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
