"""PartedTable: the routes of a step in parts, which need not meet in one process."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TableError
from .part_index import GroupParts, PartIndex, Stages, is_index, offsets_of, part_name
from .routes import Routes, compact_dtype
from .step_routes import StepRoutes
from .table import LAYER_FIRST, LAYER_SECOND, RouteTable, is_run, write_rows
from .table_file import read

# Columns with a value for each slot of all rows; the ids' type depends on the number of experts.
SLOT_DTYPES = {"combine_weights_LTK": np.dtype(np.float32)}


def write_parts(
    folder: Path,
    name: str,
    sequences: Sequence[Routes],
    stages: Stages,
    keeps_gates_T: np.ndarray | None = None,
    keeps_counts: bool = False,
) -> GroupParts:
    """Write the parts of a group, one for each pipeline stage.

    They need not survive a crash of the machine: the step's process does not, either.

    Args:
        folder: Where the files go.
        name: Of the group, unique within the step.
        sequences: Its routes.
        stages: Layers of each stage.
        keeps_gates_T: As for `RouteTable.from_routes`.
        keeps_counts: The index gets the counts of the experts: the whole step is planned by them.

    Raises:
        TableError: No sequence, sequences of different models, or the disk is full.
    """
    table = RouteTable.from_routes(sequences, keeps_gates_T=keeps_gates_T)
    paths = [folder / part_name(name, stage) for stage in range(len(stages))]
    for path, layers in zip(paths, stages, strict=True):
        table.of_layers(layers).save(path, is_durable=False)
    return GroupParts(
        name=name,
        rows_S=np.diff(table.offsets_S1),
        uncovered_N=np.flatnonzero(~table.covered_T),
        checksums_P=np.array([_checksum(path) for path in paths]),
        newest_version=table.newest_version,
        keeps_gates=table.keeps_gates,
        keeps_logits=table.keeps_logits,
        counts_SLE=table.counts_SLE if keeps_counts else None,
    )


class PartedTable(StepRoutes):
    """The rows of a step whose parts this process has, or some of them.

    Args:
        index: Of the step.
        parts: By number of group and stage. Rows of other parts cannot be gathered.
    """

    def __init__(self, index: PartIndex, parts: Mapping[tuple[int, int], RouteTable]):
        self.index = index
        self.shape, self.source, self.where = index.shape, index.source, index.where
        rows_G = [int(group.rows_S.sum()) for group in index.groups]
        self._starts_G1 = offsets_of(rows_G)
        self._parts = dict(parts)
        self._stage_of = {layer: s for s, layers in enumerate(index.stages) for layer in layers}
        self.offsets_S1 = offsets_of(np.concatenate([group.rows_S for group in index.groups]))
        self.covered_T = np.ones(sum(rows_G), np.bool_)
        for start, group in zip(self._starts_G1, index.groups, strict=False):
            self.covered_T[start + group.uncovered_N] = False
        self.newest_version = max(group.newest_version for group in index.groups)
        # What few rows keep may be missing in a group of short ones.
        self.keeps_gates = any(group.keeps_gates for group in index.groups)
        self.keeps_logits = any(group.keeps_logits for group in index.groups)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        sequences: Iterable[int] | None = None,
        layers: Iterable[int] | None = None,
        folder: Path | None = None,
        verify: bool = True,
    ) -> PartedTable:
        """Memory-map the parts of some sequences and layers.

        Args:
            path: The index.
            sequences: Their numbers in the step; all if None.
            layers: Global indices; all if None.
            folder: Where the parts lie; beside the index if None.
            verify: Compare the checksums of these parts.

        Raises:
            TableError: A file is missing, damaged, or belongs to another step.
        """
        index = PartIndex.open(path)
        folder = folder or Path(path).parent
        groups, stages = index.chosen(sequences, layers)
        parts = {}
        for group in groups:
            for stage in stages:
                entry = index.groups[group]
                file = folder / part_name(entry.name, stage)
                part = RouteTable.open(file, verify)
                _check_part(part, index, group, stage, _checksum(file))
                parts[group, stage] = part
        return cls(index, parts)

    def gather(self, layers: Sequence[int], rows_T: np.ndarray) -> np.ndarray:
        return self._gather_slots("expert_ids_LTK", layers, rows_T)

    def gather_weights(self, layers: Sequence[int], rows_T: np.ndarray) -> np.ndarray | None:
        if any(part.combine_weights_LTK is None for part in self._parts.values()):
            return None
        return self._gather_slots("combine_weights_LTK", layers, rows_T)

    def gather_gates(self, layers: Sequence[int], rows_T: np.ndarray) -> np.ndarray | None:
        if not self.keeps_gates:
            return None
        take = RouteTable.gather_gates
        return self._gather(take, layers, rows_T, self.shape.top_k, np.dtype(np.float16))

    def gather_logits(self, layers: Sequence[int], rows_T: np.ndarray) -> np.ndarray:
        take = RouteTable.gather_logits
        return self._gather(take, layers, rows_T, self.shape.num_experts, np.dtype(np.float32))

    def has_gates(self, rows_T: np.ndarray) -> np.ndarray:
        return self._of_rows(RouteTable.has_gates, rows_T, np.zeros(len(rows_T), np.bool_))

    def has_logits(self, rows_T: np.ndarray) -> np.ndarray:
        return self._of_rows(RouteTable.has_logits, rows_T, np.zeros(len(rows_T), np.bool_))

    def versions(self, rows_T: np.ndarray) -> np.ndarray:
        return self._of_rows(RouteTable.versions, rows_T, np.full(len(rows_T), -1, np.int64))

    def local_rows(self) -> np.ndarray:
        is_local_T = np.zeros(self.num_rows, np.bool_)
        for group in {group for group, _ in self._parts}:
            is_local_T[self._starts_G1[group] : self._starts_G1[group + 1]] = True
        return is_local_T

    def local_layers(self) -> tuple[int, ...]:
        stages = {stage for _, stage in self._parts}
        return tuple(layer for layer in self.shape.layers if self._stage_of[layer] in stages)

    def expert_counts(self) -> np.ndarray:
        counts = [group.counts_SLE for group in self.index.groups if group.counts_SLE is not None]
        if len(counts) < len(self.index.groups):
            raise TableError(
                "the index of the routes has no counts of the experts",
                where=self.where,
                fix="Write the parts with keeps_counts=True where the step is planned",
            )
        return np.concatenate(counts)

    def _gather_slots(self, column: str, layers: Sequence[int], rows_T: np.ndarray) -> np.ndarray:
        """Gather a column that all rows have; a group's rows are copied once if they are a run."""
        dtype = SLOT_DTYPES.get(column) or compact_dtype(self.shape.num_experts)
        values_LTK = np.zeros((len(layers), len(rows_T), self.shape.top_k), dtype)
        for group, at_N in self._runs(rows_T):
            rows_N = rows_T[at_N] - self._starts_G1[group]
            for stage, at in self._by_stage(layers):
                part = self._part(group, stage)
                indices = [part.shape.layers.index(layers[i]) for i in at]
                is_in_place = is_run(at) and isinstance(at_N, slice)
                target_LNK = values_LTK[at[0] : at[-1] + 1, at_N] if is_in_place else None
                if target_LNK is None:
                    target_LNK = np.empty((len(at), len(rows_N), self.shape.top_k), dtype)
                write_rows(target_LNK, part.columns[column], indices, rows_N)
                if not is_in_place:
                    for i, values_NK in zip(at, target_LNK, strict=True):
                        values_LTK[i, at_N] = values_NK
        return values_LTK

    def _by_stage(self, layers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield the stages of some layers, and where the layers of each stand."""
        for stage in sorted({self._stage_of[layer] for layer in layers}):
            yield stage, [i for i, layer in enumerate(layers) if self._stage_of[layer] == stage]

    def _gather(
        self,
        take: Callable[[RouteTable, Sequence[int], np.ndarray], np.ndarray | None],
        layers: Sequence[int],
        rows_T: np.ndarray,
        width: int,
        dtype: np.dtype[Any],
    ) -> np.ndarray:
        values_LTK = np.zeros((len(layers), len(rows_T), width), dtype)
        for group, at_N in self._runs(rows_T):
            rows_N = rows_T[at_N] - self._starts_G1[group]
            for stage, at in self._by_stage(layers):
                taken = take(self._part(group, stage), [layers[i] for i in at], rows_N)
                for i, values_NK in zip(at, [] if taken is None else taken, strict=True):
                    values_LTK[i, at_N] = values_NK
        return values_LTK

    def _of_rows(
        self,
        take: Callable[[RouteTable, np.ndarray], np.ndarray],
        rows_T: np.ndarray,
        values_T: np.ndarray,
    ) -> np.ndarray:
        """Fill in what any stage's part knows of each row."""
        for group, at_N in self._runs(rows_T):
            part = next((part for (g, _), part in self._parts.items() if g == group), None)
            if part is None:
                raise self._missing(group, None)
            values_T[at_N] = take(part, rows_T[at_N] - self._starts_G1[group])
        return values_T

    def _runs(self, rows_T: np.ndarray) -> Iterator[tuple[int, slice | np.ndarray]]:
        """Yield each group of the rows, and where they are; -1 is in none."""
        known_N = rows_T[rows_T >= 0]
        if not len(known_N):
            return
        ends = self._starts_G1[1:]
        first, last = np.searchsorted(ends, [known_N.min(), known_N.max()], side="right")
        for group in range(first, last + 1):
            start, stop = self._starts_G1[group : group + 2]
            at_N = np.flatnonzero((rows_T >= start) & (rows_T < stop))
            if len(at_N):
                is_whole = at_N[-1] - at_N[0] + 1 == len(at_N)
                yield group, slice(at_N[0], at_N[-1] + 1) if is_whole else at_N

    def _part(self, group: int, stage: int) -> RouteTable:
        part = self._parts.get((group, stage))
        if part is None:
            raise self._missing(group, stage)
        return part

    def _missing(self, group: int, stage: int | None) -> TableError:
        entry = self.index.groups[group]
        return TableError(
            "routes are gathered that this process has not opened",
            expected=f"one of {len(self._parts)} open parts",
            got=f"group {entry.name!r}" + ("" if stage is None else f", stage {stage}"),
            where=self.where,
            fix="Open the parts of the sequences and layers that this rank trains",
        )

    def joined(self) -> RouteTable:
        """Return one table of all parts; all must be open, and all come into memory."""
        numbers = range(len(self.index.groups))
        tables = [self._joined_layers(group) for group in numbers]
        tensors = {
            name: np.concatenate([table[name] for table in tables], axis)
            for name in tables[0]
            if all(name in table for table in tables)
            for axis in [1 if name in LAYER_FIRST else 0]
        }
        for name in ("gate_rows_N", "logit_rows_N"):
            if name in tensors:
                starts_G = self._starts_G1[:-1]
                rows = [t[name] + start for t, start in zip(tables, starts_G, strict=True)]
                tensors[name] = np.concatenate(rows)
        return RouteTable(self.shape, tensors | {"offsets_S1": self.offsets_S1}, self.source)

    def _joined_layers(self, group: int) -> dict[str, np.ndarray]:
        """Return the columns of a group, of all layers in ascending order."""
        parts = [self._part(group, stage) for stage in range(len(self.index.stages))]
        layers = [layer for part in parts for layer in part.shape.layers]
        tensors = dict(parts[0].columns)
        for name in (LAYER_FIRST | LAYER_SECOND) & tensors.keys():
            axis = 0 if name in LAYER_FIRST else 1
            whole = np.concatenate([part.columns[name] for part in parts], axis)
            tensors[name] = whole.take(np.argsort(layers), axis)
        if self.keeps_gates and "gate_probs_LNK" not in tensors:
            shape_LNK = (len(layers), 0, self.shape.top_k)
            tensors["gate_probs_LNK"] = np.empty(shape_LNK, np.float16)
            tensors["gate_rows_N"] = np.empty(0, np.int64)
        return tensors


def open_table(path: str | os.PathLike[str], verify: bool = True) -> RouteTable:
    """Open a routes file, or the index of routes in parts, whose parts it joins in memory.

    Raises:
        TableError: As `RouteTable.open` and `PartedTable.open`.
    """
    if is_index(path):
        return PartedTable.open(path, verify=verify).joined()
    return RouteTable.open(path, verify)


def _checksum(path: Path) -> int:
    """Return the CRC-32 of the checksums that a part's file holds."""
    return zlib.crc32(np.ascontiguousarray(read(path)[2]["checksums"]))


def _check_part(part: RouteTable, index: PartIndex, group: int, stage: int, checksum: int) -> None:
    entry = index.groups[group]
    is_alike = part.shape.layers == index.stages[stage] and part.source == index.source
    if not is_alike or checksum != entry.checksums_P[stage]:
        raise TableError(
            "a part of the routes belongs to another step or run",
            expected=f"layers {list(index.stages[stage])}, checksum {entry.checksums_P[stage]}",
            got=f"layers {list(part.shape.layers)}, checksum {checksum}",
            where=part.where,
            fix="Keep the parts of each step in a folder of their own, beside their index",
        )
