"""The optimizer's state as rectangles of Hugging Face tensors: read in any layout, on any ranks.

Every rank writes the values that it owns, and reads those that it needs from all files: nothing is
gathered, and nothing is pickled. Sharding may change between the two, and so may the distributed
optimizer.

Megatron's `dist_checkpointing` (0.19.2) does less: of its formats for a distributed optimizer, the
one that survives another layout gathers the state of each data-parallel group
(`fully_reshardable`), `fully_sharded_model_space` needs flattened ranges, which its ShardedTensor
refuses by now, and all pickle their metadata.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from routing_replay.errors import CheckpointError, ConfigError

from . import cpu, weight_plan  # noqa: F401  (cpu makes Megatron importable)

# isort: split
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

# isort: split
from routing_replay.megatron.expert_tensors import WEIGHT, Shard, optimizer_parts, stored_shards

from .checkpoint_files import sync

# Options that keep the state in other types or places than this module reads.
_UNSUPPORTED = ("use_precision_aware_optimizer", "optimizer_cpu_offload")
# A file's size limit: a rank holds so much of its state in host memory while it writes.
MAX_FILE_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Block:
    """A rectangle of a Hugging Face tensor; a vector is a matrix of one column.

    Args:
        name: The tensor's.
        row, column: Its first value.
        height, width: Its size.
    """

    name: str
    row: int
    column: int
    height: int
    width: int

    def key(self, state: str) -> str:
        """Return the name under which a file holds the block's values of a state."""
        return f"{state}/{self.name}/{self.row}+{self.height}/{self.column}+{self.width}"

    def overlap(self, other: Block) -> Block | None:
        """Return what two blocks of one tensor have in common, None if nothing."""
        row, column = max(self.row, other.row), max(self.column, other.column)
        height = min(self.row + self.height, other.row + other.height) - row
        width = min(self.column + self.width, other.column + other.width) - column
        if height <= 0 or width <= 0:
            return None
        return Block(name=self.name, row=row, column=column, height=height, width=width)

    def within(self, outer: Block) -> tuple[slice, slice]:
        """Return where the values of an outer block hold this one's."""
        row, column = self.row - outer.row, self.column - outer.column
        return slice(row, row + self.height), slice(column, column + self.width)


def parse_key(key: str) -> tuple[str, Block]:
    """Return state and block of a key."""
    state, name, rows, columns = key.split("/")
    row, height = map(int, rows.split("+"))
    column, width = map(int, columns.split("+"))
    return state, Block(name=name, row=row, column=column, height=height, width=width)


def require_resumable(config: OptimizerConfig) -> None:
    """Refuse an optimizer whose state could not be restored, before the run starts.

    Raises:
        ConfigError: An option that keeps scaled, split or offloaded states.
    """
    for name in _UNSUPPORTED:
        if getattr(config, name, False):
            raise ConfigError(
                f"a run with {name} cannot be resumed",
                expected=f"{name}=False",
                got=True,
                fix="Turn the option off; distributed_optimizer shards the state over ranks",
            )


def num_steps(optimizer: MegatronOptimizer) -> int:
    """Return how many steps an optimizer has taken, alike for all parameters; 0 without any."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group:  # Transformer Engine's and APEX's
                return int(group["step"])
            for parameter in group["params"]:
                return int(part.optimizer.state[parameter].get("step", 0))
    return 0


def save_shards(
    model_chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    path: Path,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write this rank's share of main weights and moments; every rank writes its own.

    Main weights that are the model's parameters themselves are left out.

    Args:
        model_chunks: From `build_model`, wrapped or not; the experts lie where Megatron puts them.
        optimizer: Of these chunks, after at least one step.
        path: The files are `path` with a number and `.safetensors` appended.
        max_file_bytes: Size limit of a file, and of the additional host memory.

    Raises:
        OSError, SafetensorError: They cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    size_bytes, number = 0, 0

    def flush() -> None:
        file = path.with_name(f"{path.name}_{number:03d}.safetensors")
        save_file(tensors, file)
        sync(file)
        tensors.clear()

    for key, values in _owned(model_chunks, optimizer):
        added = values.numel() * values.element_size()
        if tensors and size_bytes + added > max_file_bytes:
            flush()
            size_bytes, number = 0, number + 1
        tensors[key] = values.contiguous().cpu()
        size_bytes += added
    flush()


def restore_shards(
    model_chunks: list[torch.nn.Module], optimizer: MegatronOptimizer, folder: Path, step: int
) -> None:
    """Read this rank's share of a state that any layout has saved.

    Args:
        model_chunks: With the weights of the same checkpoint.
        optimizer: Of these chunks, before its first step.
        folder: Of the files of all ranks.
        step: From `num_steps`.

    Raises:
        CheckpointError: A file cannot be read, or a part of the state is in none.
    """
    _allocate(optimizer, step)
    with ShardReader(folder) as reader:
        for parameter, state, shard in _shards(model_chunks, optimizer):
            if state != "param":  # padding of the vocabulary is in no file
                shard.values_N.zero_()
            for block, values_HW in blocks(parameter, shard):
                reader.read(state, block, values_HW)


def blocks(parameter: weight_plan.Parameter, shard: Shard) -> Iterator[tuple[Block, torch.Tensor]]:
    """Yield the rectangles that a range of a flattened parameter consists of, with their values.

    Yields:
        (block, view of the shard's values [height, width]).
    """
    rows = parameter.tensor.shape[0]
    width = parameter.tensor.numel() // rows
    stop, first_row = shard.start + len(shard.values_N), 0
    for piece in parameter.pieces:
        is_rows = piece.axis == 0
        num_rows = piece.length if is_rows else rows
        low, high = first_row * width, (first_row + num_rows) * width
        for a, b in _runs(max(low, shard.start), min(high, stop), width):
            row, column = divmod(a, width)
            block = Block(
                name=piece.name,
                row=row - first_row + (piece.start if is_rows else 0),
                column=column + (0 if is_rows else piece.start),
                height=max(1, (b - a) // width),
                width=min(width, b - a),
            )
            values_N = shard.values_N[a - shard.start : b - shard.start]
            yield block, values_N.view(block.height, block.width)
        first_row += num_rows


class ShardReader:
    """The files of all ranks in a folder; a context manager that closes them.

    Raises:
        CheckpointError: There are none, or one is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = contextlib.ExitStack()
        self._saved: dict[tuple[str, str], list[tuple[Block, Any, Path]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with self._readable(path):
                file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                for key in file.keys():  # noqa: SIM118  (it is no dict)
                    state, block = parse_key(key)
                    self._saved.setdefault((state, block.name), []).append((block, file, path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._saved.clear()
        self._stack.close()

    def read(self, state: str, wanted: Block, target_HW: torch.Tensor) -> None:
        """Read a block's values into `target_HW`.

        Raises:
            CheckpointError: No files hold all of it, or one is damaged.
        """
        num_read = 0
        for saved, file, path in self._saved.get((state, wanted.name), []):
            common = wanted.overlap(saved)
            if common is None:
                continue
            with self._readable(path):
                rows, columns = common.within(saved)
                values_HW = file.get_slice(saved.key(state))[rows, columns]
            target_HW[common.within(wanted)].copy_(values_HW)
            num_read += common.height * common.width
        if num_read != wanted.height * wanted.width:
            raise CheckpointError(
                "the checkpoint lacks a part of the optimizer's state",
                expected=f"{wanted.height * wanted.width} values of {wanted.key(state)}",
                got=num_read,
                where=str(self.folder),
                fix="Resume from another checkpoint, or start a new run from its weights",
            )

    @contextlib.contextmanager
    def _readable(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(
                "the optimizer state cannot be read",
                got=f"{type(error).__name__}: {error}",
                where=str(path),
                fix="The file is damaged or incomplete: copy the checkpoint again",
            ) from error


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chain that have parameters on this rank."""
    return [part for part in optimizer_parts(optimizer) if part.optimizer is not None]


def _allocate(optimizer: MegatronOptimizer, step: int) -> None:
    """Give every parameter the states that its first step would make."""
    for part in _parts(optimizer):
        inner = part.optimizer
        part.init_state_fn(inner, part.config)
        is_of_torch = isinstance(inner, torch.optim.Adam)  # AdamW too
        for group in inner.param_groups:
            if not is_of_torch:
                group["step"] = step
                continue
            for parameter in group["params"]:
                # A tensor of its own: torch adds to it in place.
                inner.state[parameter]["step"] = torch.tensor(float(step))


def _owned(
    model_chunks: list[torch.nn.Module], optimizer: MegatronOptimizer
) -> Iterator[tuple[str, torch.Tensor]]:
    """The blocks that this rank saves, of those that hold the same values."""
    parts = _parts(optimizer)
    is_sharded = any(isinstance(part, DistributedOptimizer) for part in parts)
    for parameter, state, shard in _shards(model_chunks, optimizer):
        if parameter.is_primary or (is_sharded and parameter.is_own_shard):
            for block, values_HW in blocks(parameter, shard):
                yield block.key(state), values_HW


def _shards(
    model_chunks: list[torch.nn.Module], optimizer: MegatronOptimizer
) -> Iterator[tuple[weight_plan.Parameter, str, Shard]]:
    parts = _parts(optimizer)
    for parameter in weight_plan.local_parameters(model_chunks):
        for state, shard in stored_shards(parts, parameter.stored).items():
            if state != WEIGHT:
                yield parameter, state, shard


def _runs(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Cut a flat range into a part of a row, whole rows, and a part of a row."""
    if start >= stop:
        return
    first, last = -(-start // width) * width, stop // width * width
    bounds = [start, stop] if first > last else [start, first, last, stop]
    yield from ((a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a < b)
