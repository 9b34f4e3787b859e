"""PartIndex: which parts make up the routes of a step.

A part is a `RouteTable` of a group of sequences and of the layers of one pipeline stage. Whoever
samples the group makes its parts; whoever trains its sequences reads them. The index is an ordinary
safetensors file:

    rows_S            I64   rows of each sequence
    sequences_G       I64   sequences of each group
    uncovered_N       I64   rows of the step without routes, ascending
    checksums_GP      I64   CRC-32 of the checksums of each part
    counts_SLE        U8 to U32   as in the table; optional

Its metadata describe it: format, version, source, num_experts, top_k, stages (layers of each),
names of the groups, newest weight version, what else the parts keep.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import TableError, reading, writing
from ..files import atomic_write
from .counts import counts_dtype
from .shape import MoEShape

FORMAT, VERSION = "routing_replay.parts", "1"
Stages = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupParts:
    """What is known of a group whose parts lie elsewhere.

    Args:
        name: Unique within the step.
        rows_S: int64, rows of each of its sequences.
        uncovered_N: int64, rows of the group without routes.
        checksums_P: int64, one for each stage's part.
        newest_version: Of the weights that routed any row; -1: unknown.
        keeps_gates, keeps_logits: The parts hold gate probabilities, router logits.
        counts_SLE: Of the experts, if a plan needs them.
    """

    name: str
    rows_S: np.ndarray
    uncovered_N: np.ndarray
    checksums_P: np.ndarray
    newest_version: int = -1
    keeps_gates: bool = False
    keeps_logits: bool = False
    counts_SLE: np.ndarray | None = None

    def files(self) -> list[str]:
        """Return the names of its parts' files."""
        return [part_name(self.name, stage) for stage in range(len(self.checksums_P))]


def part_name(group: str, stage: int) -> str:
    """Return the name of the file of a part."""
    return f"{group}_stage_{stage}.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class PartIndex:
    """The groups of a step in the order of its sequences.

    Args:
        shape: Of the whole model.
        stages: Layers of each pipeline stage; together those of the shape.
        groups: At least one.
        source: "rollout" or "training".
        where: What error messages call it.
    """

    shape: MoEShape
    stages: Stages
    groups: Sequence[GroupParts]
    source: str = "rollout"
    where: str = "memory"

    def files(
        self, sequences: Iterable[int] | None = None, layers: Iterable[int] | None = None
    ) -> list[str]:
        """Return the names of the parts that hold some sequences and layers; all if None."""
        groups, stages = self.chosen(sequences, layers)
        return [part_name(self.groups[group].name, stage) for group in groups for stage in stages]

    def chosen(
        self, sequences: Iterable[int] | None, layers: Iterable[int] | None
    ) -> tuple[list[int], list[int]]:
        """Return the groups and the stages that hold some sequences and layers; all if None."""
        groups, stages = list(range(len(self.groups))), list(range(len(self.stages)))
        if sequences is not None:
            ends_G = np.cumsum([len(group.rows_S) for group in self.groups])
            numbers = np.fromiter(sequences, np.int64)
            groups = np.unique(np.searchsorted(ends_G, numbers, side="right")).tolist()
        if layers is not None:
            wanted = set(layers)
            stages = [s for s in stages if wanted & set(self.stages[s])]
        return groups, stages

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file.

        Raises:
            TableError: The disk is full or not writable.
        """
        path = Path(path)
        offsets_G = offsets_of([int(group.rows_S.sum()) for group in self.groups])[:-1]
        uncovered = [g.uncovered_N + o for g, o in zip(self.groups, offsets_G, strict=True)]
        tensors = {
            "rows_S": np.concatenate([group.rows_S for group in self.groups]).astype(np.int64),
            "sequences_G": np.array([len(group.rows_S) for group in self.groups], np.int64),
            "uncovered_N": np.concatenate(uncovered).astype(np.int64),
            "checksums_GP": np.array([group.checksums_P for group in self.groups], np.int64),
        }
        counts = [g.counts_SLE for g in self.groups if g.counts_SLE is not None]
        if len(counts) == len(self.groups):
            dtype = counts_dtype(int(tensors["rows_S"].max(initial=0)))
            tensors["counts_SLE"] = np.concatenate(counts).astype(dtype)
        with writing(path, "the index of the routes", TableError), atomic_write(path) as partial:
            save_file(tensors, partial, self._description())
        return path

    def _description(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "source": self.source,
            "num_experts": str(self.shape.num_experts),
            "top_k": str(self.shape.top_k),
            "stages": json.dumps(self.stages),
            "groups": json.dumps(
                [[g.name, g.newest_version, g.keeps_gates, g.keeps_logits] for g in self.groups]
            ),
        }

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> PartIndex:
        """Read the file.

        Raises:
            TableError: Not an index, of another version, or damaged.
        """
        path = Path(path)
        try:
            with (
                reading(path, "the index of the routes", TableError),
                safe_open(path, "np") as file,
            ):
                description = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if (description.get("format"), description.get("version")) != (FORMAT, VERSION):
                raise ValueError(f"format {description.get('format')!r}")
            return cls._of(description, tensors, str(path))
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise TableError(
                "the file is no index of routes in parts",
                expected=f"a safetensors file with format {FORMAT!r}, version {VERSION}",
                got=error,
                where=path,
            ) from error

    @classmethod
    def _of(cls, description: dict[str, str], tensors: dict[str, Any], where: str) -> PartIndex:
        stages = tuple(tuple(layers) for layers in json.loads(description["stages"]))
        shape = MoEShape(
            layers=tuple(sorted(layer for layers in stages for layer in layers)),
            num_experts=int(description["num_experts"]),
            top_k=int(description["top_k"]),
        )
        sequences_G1 = offsets_of(tensors["sequences_G"])
        offsets_S1 = offsets_of(tensors["rows_S"])
        groups = []
        for number, columns in enumerate(json.loads(description["groups"])):
            name, newest_version, keeps_gates, keeps_logits = columns
            of_group = slice(sequences_G1[number], sequences_G1[number + 1])
            first, last = offsets_S1[of_group.start], offsets_S1[of_group.stop]
            uncovered_N = tensors["uncovered_N"]
            counts_SLE = tensors.get("counts_SLE")
            groups.append(
                GroupParts(
                    name=name,
                    rows_S=tensors["rows_S"][of_group],
                    uncovered_N=uncovered_N[(uncovered_N >= first) & (uncovered_N < last)] - first,
                    checksums_P=tensors["checksums_GP"][number],
                    newest_version=newest_version,
                    keeps_gates=keeps_gates,
                    keeps_logits=keeps_logits,
                    counts_SLE=None if counts_SLE is None else counts_SLE[of_group],
                )
            )
        return cls(
            shape=shape, stages=stages, groups=groups, source=description["source"], where=where
        )


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return file.metadata() or {}, tensors


def is_index(path: str | os.PathLike[str]) -> bool:
    """Return whether a file says that it is an index; False for what is not readable."""
    try:
        with safe_open(Path(path), "np") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def offsets_of(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return where each of some pieces begins, and the end; int64."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)
