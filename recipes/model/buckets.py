"""The model's Hugging Face tensors in buckets, each on one rank that gathers it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from . import cpu, weight_plan  # noqa: F401  (cpu makes Megatron importable)

# isort: split
from megatron.core import parallel_state

# isort: split
from .checkpoint_files import natural_order
from .collective import on_every_rank
from .weight_names import is_weight

Tensors = list[tuple[str, torch.Tensor]]
# SGLang's DeepSeek models fuse two projections that come in one call, and lose them in two.
INSEPARABLE = ".self_attn."


@dataclass(frozen=True, kw_only=True)
class Atom:
    """Tensors that are never divided between buckets.

    Args:
        parts: By tensor, where its parts are.
        size_bytes: In the dtype that they are gathered in.
    """

    parts: dict[str, list[weight_plan.Part]]
    size_bytes: int

    @property
    def all_parts(self) -> list[weight_plan.Part]:
        """The parts of all tensors."""
        return list(itertools.chain.from_iterable(self.parts.values()))


@dataclass(frozen=True, kw_only=True)
class Bucket(Atom):
    """Tensors that are gathered at once.

    Args:
        source: Global rank that gathers them.
    """

    source: int


class Buckets:
    """Who holds what of a model, arranged in buckets; made once, collective.

    The memory beyond the model is about two buckets on a source, and the own parts of one on any
    other rank.

    Args:
        model_chunks: As for `load_hf`. Experts stay on their ranks.
        bucket_bytes: Size limit; only a larger single tensor, or a layer's attention, exceeds it.
        dtype: Of the gathered weights; None keeps the parameters'.
        is_spread: Whether a rank that holds a part of a tensor, or a copy of one, gathers it, all
            in equal shares; otherwise the first rank of its pipeline stage.
    """

    def __init__(
        self,
        model_chunks: list[torch.nn.Module],
        bucket_bytes: int,
        dtype: torch.dtype | None = None,
        is_spread: bool = False,
    ):
        self._dtype = dtype
        self._parameters = on_every_rank(lambda: weight_plan.local_parameters(model_chunks))
        plan = weight_plan.gather_plan(self._parameters)
        sources = None if is_spread else _firsts_of_stages()
        self.buckets = arranged(plan, sources, bucket_bytes, dtype)

    @property
    def sources(self) -> list[int]:
        """The ranks that gather buckets."""
        return sorted({bucket.source for bucket in self.buckets})

    def gather(self, bucket: Bucket, device: torch.device | str | None = None) -> Tensors | None:
        """Return the bucket's tensors on its source, None elsewhere.

        All ranks call it, for all buckets in their order; those without a part return at once.

        Args:
            bucket: One of these.
            device: Of the tensors; None: the model's.
        """
        rank = torch.distributed.get_rank()
        by_rank = _by_rank(bucket, self._dtype)
        if rank != bucket.source:
            if rank in by_rank:
                torch.distributed.send(self._own_bytes(by_rank[rank]), dst=bucket.source)
            return None
        whole = self._empty(bucket, torch.cuda.current_device() if device is None else device)
        for holder, parts in by_rank.items():
            values = map(self._values, parts) if holder == rank else self._receive(holder, parts)
            for part, part_values in zip(parts, values, strict=True):
                piece = part.piece
                target = whole[piece.name].narrow(piece.axis, piece.start, piece.length)
                target.copy_(part_values)
        return list(whole.items())

    def _empty(self, bucket: Bucket, device: torch.device | str | int) -> dict[str, torch.Tensor]:
        """Return the bucket's tensors, to be filled."""
        whole = {}
        for name, (part, *_) in bucket.parts.items():
            dtype = _sent_dtype(part, self._dtype)
            whole[name] = torch.empty(part.piece.shape, dtype=dtype, device=device)
        return whole

    def _values(self, part: weight_plan.Part) -> torch.Tensor:
        return weight_plan.values_of(self._parameters[part.parameter], part.index)

    def _own_bytes(self, parts: list[weight_plan.Part]) -> torch.Tensor:
        """Return this rank's parts one after another."""
        flat = []
        for part in parts:
            values = self._values(part).to(_sent_dtype(part, self._dtype)).contiguous()
            flat.append(values.view(-1).view(torch.uint8))
        return torch.cat(flat)

    def _receive(self, holder: int, parts: list[weight_plan.Part]) -> list[torch.Tensor]:
        """Return another rank's parts."""
        sizes = [_size_bytes(part, self._dtype) for part in parts]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=torch.cuda.current_device())
        torch.distributed.recv(received, src=holder)
        return [
            values.view(_sent_dtype(part, self._dtype)).view(part.shape)
            for part, values in zip(parts, received.split(sizes), strict=True)
        ]


def arranged(
    plan: Mapping[str, list[weight_plan.Part]],
    source_of: Mapping[int, int] | None,
    bucket_bytes: int,
    dtype: torch.dtype | None,
) -> list[Bucket]:
    """Return the buckets of a model, those of the sources in turns: one gathers as another sends.

    Args:
        plan: Of `gather_plan`.
        source_of: By rank the source of its parts. None: of the ranks that hold a tensor, and its
            copies, the one that has the fewest bytes.
        bucket_bytes: Size limit, exceeded only by what cannot be divided.
        dtype: Of the gathered weights; None: the parameters'.
    """
    atoms = [
        _atom_of({name: plan[name] for name in names}, dtype)
        for _, names in itertools.groupby(sorted(plan, key=natural_order), key=_atom_name)
    ]
    by_source: dict[int, list[Bucket]] = {}
    if source_of is None:
        placed = _spread(atoms)
    else:
        placed = [(source_of[atom.all_parts[0].rank], atom) for atom in atoms]
    for source, atom in placed:
        buckets = by_source.setdefault(source, [])
        if buckets and buckets[-1].size_bytes + atom.size_bytes <= bucket_bytes:
            last = buckets.pop()
            parts, size = last.parts | atom.parts, last.size_bytes + atom.size_bytes
        else:
            parts, size = atom.parts, atom.size_bytes
        buckets.append(Bucket(source=source, parts=parts, size_bytes=size))
    in_turns = itertools.zip_longest(*by_source.values())
    return [bucket for turn in in_turns for bucket in turn if bucket is not None]


def flattened(tensors: Tensors) -> tuple[Tensors, torch.Tensor]:
    """Return tensors in the order of a bucket, and their bytes as one tensor.

    The widest elements come first, so that each tensor starts at a multiple of its elements.
    """
    ordered = sorted(tensors, key=lambda pair: -pair[1].element_size())
    return ordered, torch.cat([t.contiguous().view(-1).view(torch.uint8) for _, t in ordered])


def _atom_name(name: str) -> str:
    head, middle, _ = name.partition(INSEPARABLE)
    return head + middle if middle else name


def _atom_of(parts: dict[str, list[weight_plan.Part]], dtype: torch.dtype | None) -> Atom:
    all_parts = itertools.chain.from_iterable(parts.values())
    return Atom(parts=parts, size_bytes=sum(_size_bytes(part, dtype) for part in all_parts))


def _spread(atoms: Sequence[Atom]) -> list[tuple[int, Atom]]:
    """Return each atom, taken from one of its copies, with the rank that gathers it.

    Those with a choice fill up what the others leave uneven.
    """
    # A copy's number, and one of the ranks that hold parts of it.
    choices = [
        sorted({(n, rank) for part in atom.all_parts for n, rank in enumerate(part.copies)})
        for atom in atoms
    ]
    placed, loads = {}, Counter[int]()
    for number in sorted(range(len(atoms)), key=lambda number: len(choices[number])):
        copy, source = min(choices[number], key=lambda choice: loads[choice[1]])
        loads[source] += atoms[number].size_bytes
        placed[number] = source, _copy_of(atoms[number], copy)
    return [placed[number] for number in range(len(atoms))]


def _copy_of(atom: Atom, copy: int) -> Atom:
    parts = {
        name: [replace(part, rank=part.copies[copy]) for part in of_tensor]
        for name, of_tensor in atom.parts.items()
    }
    return Atom(parts=parts, size_bytes=atom.size_bytes)


def _firsts_of_stages() -> dict[int, int]:
    """By rank the first rank of its pipeline stage; collective."""
    stages = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(stages, parallel_state.get_pipeline_model_parallel_rank())
    return {rank: stages.index(stage) for rank, stage in enumerate(stages)}


def _by_rank(bucket: Bucket, dtype: torch.dtype | None) -> dict[int, list[weight_plan.Part]]:
    """By rank its parts, the widest elements first as in `flattened`; equal on every rank."""
    by_rank: dict[int, list[weight_plan.Part]] = {}
    for part in sorted(bucket.all_parts, key=lambda part: -_sent_dtype(part, dtype).itemsize):
        by_rank.setdefault(part.rank, []).append(part)
    return by_rank


def _sent_dtype(part: weight_plan.Part, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and is_weight(part.piece.name) else part.dtype


def _size_bytes(part: weight_plan.Part, dtype: torch.dtype | None) -> int:
    return torch.Size(part.shape).numel() * _sent_dtype(part, dtype).itemsize
