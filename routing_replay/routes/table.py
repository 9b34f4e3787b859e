"""RouteTable: the routes of one training step, in memory or memory-mapped from one file.

The file is an ordinary safetensors file (any safetensors reader opens it):

    expert_ids_LTK    U8 or U16   layer first, so that a pipeline stage reads only its own layers
    combine_weights_LTK   F32     optional
    gate_probs_LNK    F16         optional; of all rows, or of those that gate_rows_N names
    gate_rows_N       I64         optional, ascending
    logit_rows_N      I64         optional, with
    logits_NLE        F32         full router logits of a sample of rows
    covered_T         BOOL
    origin_T          U8          `Origin`: the forward pass of a row, or why it is not covered
    weight_version_T  I64
    offsets_S1        I64         sequence s owns the rows offsets[s] .. offsets[s + 1]
    counts_SLE        U8 to U32   covered rows of a sequence that select an expert; optional
    checksums         I64         CRC-32 of the description, the small columns, then each layer

Its metadata describe it: format, version, source, layers, num_experts, top_k.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import TableError, unknown_name, writing
from ..files import atomic_write
from .columns import columns_of, row_item
from .counts import count_sequences
from .routes import RouterLogits, Routes, compact_dtype
from .shape import MoEShape
from .step_routes import StepRoutes
from .table_file import FORMAT, SOURCES, VERSION, checksums, damaged, read, write

LAYER_FIRST = {"expert_ids_LTK", "combine_weights_LTK", "gate_probs_LNK"}
LAYER_SECOND = {"logits_NLE", "counts_SLE"}


class RouteTable(StepRoutes):
    """The rows of a step's sequences one after another.

    Args:
        shape: Layers, number of experts and top-k.
        tensors: The columns by their names in the file; numpy arrays or memory maps.
        source: "rollout" (the inference engine's routes) or "training" (recorded in Megatron).
        where: What error messages call this table.
    """

    def __init__(
        self,
        shape: MoEShape,
        tensors: dict[str, np.ndarray],
        source: str = "rollout",
        where: str = "memory",
    ):
        if source not in SOURCES:
            raise unknown_name("source of a table", source, SOURCES)
        self.shape = shape
        self.source = source
        self.where = where
        self.expert_ids_LTK = tensors["expert_ids_LTK"]
        self.covered_T = tensors["covered_T"]
        self.origin_T = tensors["origin_T"]
        self.weight_version_T = tensors["weight_version_T"]
        self.offsets_S1 = tensors["offsets_S1"]
        self.combine_weights_LTK = tensors.get("combine_weights_LTK")
        self.gate_probs_LNK = tensors.get("gate_probs_LNK")
        self.gate_rows_N = tensors.get("gate_rows_N")
        self.logit_rows_N = tensors.get("logit_rows_N")
        self.logits_NLE = tensors.get("logits_NLE")
        self.token_ids_T = tensors.get("token_ids_T")
        self.counts_SLE = tensors.get("counts_SLE")
        self.columns = tensors

    @property
    def keeps_gates(self) -> bool:  # type: ignore[override]
        return self.gate_probs_LNK is not None

    @property
    def keeps_logits(self) -> bool:  # type: ignore[override]
        return self.logit_rows_N is not None

    @property
    def newest_version(self) -> int:  # type: ignore[override]
        return int(self.weight_version_T.max(initial=-1))

    @classmethod
    def from_routes(
        cls,
        sequences: Sequence[Routes],
        source: str = "rollout",
        keeps_gates_T: np.ndarray | None = None,
    ) -> RouteTable:
        """Return the table of a step, from the routes of its sequences.

        Args:
            sequences: Of one model.
            source: As for the constructor.
            keeps_gates_T: bool over the rows of all sequences, those whose gate probabilities are
                kept; None keeps all. They take two bytes per slot, the ids one.

        Raises:
            TableError: No sequence, or sequences of different models.
        """
        if not sequences:
            raise TableError("a table needs at least one sequence", expected="routes", got="none")
        shape = sequences[0].shape
        for number, routes in enumerate(sequences):
            shape.require_equal(
                routes.shape,
                "the sequences belong to different models",
                TableError,
                where=f"sequence {number}",
            )
        return cls(shape, columns_of(sequences, keeps_gates_T), source)

    @classmethod
    def empty(
        cls, shape: MoEShape, lengths: Sequence[int] | np.ndarray, source: str = "training"
    ) -> RouteTable:
        """Return a table of which no row is covered yet (R2 fills it).

        Args:
            shape: Layers, number of experts and top-k.
            lengths: Tokens of each sequence, at least 1; n tokens have n - 1 rows.
            source: As for the constructor.
        """
        offsets_S1 = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64) - 1)])
        num_rows = int(offsets_S1[-1])
        shape_LTK = (len(shape.layers), num_rows, shape.top_k)
        tensors = {
            "expert_ids_LTK": np.zeros(shape_LTK, compact_dtype(shape.num_experts)),
            "covered_T": np.zeros(num_rows, np.bool_),
            "origin_T": np.zeros(num_rows, np.uint8),
            "weight_version_T": np.full(num_rows, -1, np.int64),
            "offsets_S1": offsets_S1.astype(np.int64),
        }
        return cls(shape, tensors, source)

    def with_tokens(self, tokens: Sequence[Sequence[int]]) -> RouteTable:
        """Return this table with the token that each row's forward consumed (`token_ids_T`).

        A training loop that passes no sequence numbers on finds its rows by these.

        Args:
            tokens: Prompt and response tokens of each sequence, one or more than its rows.

        Raises:
            TableError: Another number of sequences, or fewer tokens than rows.
        """
        lengths_S = np.diff(self.offsets_S1)
        num_tokens = [len(sequence) for sequence in tokens]
        if len(tokens) != self.num_sequences or (np.array(num_tokens, int) <= lengths_S).any():
            raise TableError(
                "the tokens do not belong to the sequences of the table",
                expected=f"{self.num_sequences} sequences with more tokens than rows",
                got=f"{len(tokens)} sequences",
                where=self.where,
                fix="Pass prompt + response tokens of each sequence, in the order of the table",
            )
        fed = [np.asarray(s, np.int64)[:n] for s, n in zip(tokens, lengths_S, strict=True)]
        tensors = self.columns | {"token_ids_T": np.concatenate([np.empty(0, np.int64), *fed])}
        return RouteTable(self.shape, tensors, self.source, self.where)

    def expert_counts(self) -> np.ndarray:
        # A table that was built from routes holds the counts; those of a recording are counted now.
        if self.counts_SLE is not None:
            return self.counts_SLE
        return count_sequences(
            self.expert_ids_LTK, self.covered_T, self.offsets_S1, self.shape.num_experts
        )

    def gather(self, layers: Sequence[int], rows_T: np.ndarray) -> np.ndarray:
        return _take_rows(self.expert_ids_LTK, self._indices(layers), rows_T)

    def gather_weights(self, layers: Sequence[int], rows_T: np.ndarray) -> np.ndarray | None:
        if self.combine_weights_LTK is None:
            return None
        return _take_rows(self.combine_weights_LTK, self._indices(layers), rows_T)

    def has_gates(self, rows_T: np.ndarray) -> np.ndarray:
        if self.gate_probs_LNK is None:
            return np.zeros(len(rows_T), np.bool_)
        return rows_T >= 0 if self.gate_rows_N is None else _is_in(self.gate_rows_N, rows_T)

    def gather_gates(self, layers: Sequence[int], rows_T: np.ndarray) -> np.ndarray | None:
        if self.gate_probs_LNK is None:
            return None
        if self.gate_rows_N is not None:
            rows_T = np.searchsorted(self.gate_rows_N, rows_T)
        return _take_rows(self.gate_probs_LNK, self._indices(layers), rows_T)

    def has_logits(self, rows_T: np.ndarray) -> np.ndarray:
        if self.logit_rows_N is None:
            return np.zeros(len(rows_T), np.bool_)
        return _is_in(self.logit_rows_N, rows_T)

    def gather_logits(self, layers: Sequence[int], rows_T: np.ndarray) -> np.ndarray:
        if self.logit_rows_N is None or self.logits_NLE is None:
            return np.empty((len(layers), 0, self.shape.num_experts), np.float32)
        at_T = np.searchsorted(self.logit_rows_N, rows_T)
        logits_TLE = self.logits_NLE[at_T][:, self._indices(layers)]
        return np.ascontiguousarray(logits_TLE.swapaxes(0, 1))

    def versions(self, rows_T: np.ndarray) -> np.ndarray:
        versions_T: np.ndarray = np.asarray(self.weight_version_T)[rows_T]
        return versions_T

    def local_rows(self) -> np.ndarray:
        return np.ones(self.num_rows, np.bool_)

    def local_layers(self) -> tuple[int, ...]:
        return self.shape.layers

    def of_layers(self, layers: Sequence[int]) -> RouteTable:
        """Return the table of some layers, as a pipeline stage reads it; nothing is copied."""
        at, tensors = self._indices(layers), dict(self.columns)
        for name in LAYER_FIRST & tensors.keys():
            tensors[name] = tensors[name][at[0] : at[-1] + 1] if is_run(at) else tensors[name][at]
        for name in LAYER_SECOND & tensors.keys():
            tensors[name] = np.ascontiguousarray(tensors[name][:, at])
        shape = replace(self.shape, layers=tuple(layers))
        return RouteTable(shape, tensors, self.source, self.where)

    def _indices(self, layers: Sequence[int]) -> list[int]:
        index = {layer: i for i, layer in enumerate(self.shape.layers)}
        return [index[layer] for layer in layers]

    def sequence(self, number: int) -> Routes:
        """Return the routes of one sequence; with gates, if the table keeps them of all rows."""
        rows = slice(int(self.offsets_S1[number]), int(self.offsets_S1[number + 1]))
        gates = self.gate_probs_LNK if self.gate_rows_N is None else None
        weights = self.combine_weights_LTK
        return Routes(
            expert_ids_TLK=_token_first(self.expert_ids_LTK[:, rows]),
            covered_T=np.array(self.covered_T[rows]),
            layers=self.shape.layers,
            num_experts=self.shape.num_experts,
            combine_weights_TLK=None if weights is None else _token_first(weights[:, rows]),
            gate_probs_TLK=None if gates is None else _token_first(gates[:, rows]),
            router_logits=self._logits_of(rows),
            origin_T=np.array(self.origin_T[rows]),
            weight_version_T=np.array(self.weight_version_T[rows]),
        )

    def sequences(self) -> Iterable[Routes]:
        """Return the routes of all sequences, one at a time."""
        return (self.sequence(number) for number in range(self.num_sequences))

    def save(self, path: str | os.PathLike[str], is_durable: bool = True) -> Path:
        """Write the file: under a temporary name, checksummed, synchronised, then renamed.

        Args:
            path: The file.
            is_durable: Synchronise it, so that it survives a crash of the machine.

        Raises:
            TableError: The disk is full or not writable; an earlier file stays whole.
        """
        path, description = Path(path), self._description()
        tensors = {**self.columns, "checksums": checksums(description, self.columns)}
        fix = "Free space or choose another folder; an earlier file of this name is whole"
        with (
            writing(path, "the routes file", TableError, fix=fix),
            atomic_write(path, is_durable) as partial,
        ):
            write(partial, description, tensors)
        return path

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> RouteTable:
        """Memory-map a file: the ranks of a node share one copy, and read what they touch.

        Args:
            path: A file written by `save`.
            verify: Compare all checksums (reads the whole file once; the first rank of a node
                may do it for all).

        Raises:
            TableError: Not a routes file, of another version, damaged, or cut short.
        """
        path = Path(path)
        shape, source, tensors = read(path)
        saved = tensors.pop("checksums")
        table = cls(shape, tensors, source, where=str(path))
        if verify and not np.array_equal(saved, checksums(table._description(), tensors)):
            raise damaged(path, "the checksums in the file", "other ones")
        return table

    def _description(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "source": self.source,
            "layers": json.dumps(list(self.shape.layers)),
            "num_experts": str(self.shape.num_experts),
            "top_k": str(self.shape.top_k),
        }

    def _logits_of(self, rows: slice) -> RouterLogits | None:
        if self.logit_rows_N is None or self.logits_NLE is None:
            return None
        kept = slice(*np.searchsorted(self.logit_rows_N, [rows.start, rows.stop]))
        return RouterLogits(
            rows_N=np.array(self.logit_rows_N[kept]) - rows.start,
            values_NLE=np.array(self.logits_NLE[kept]),
        )


def is_run(at: list[int]) -> bool:
    """Return whether indices follow one another."""
    return at == list(range(at[0], at[-1] + 1))


def _is_in(rows_N: np.ndarray, rows_T: np.ndarray) -> np.ndarray:
    """Return which rows are among ascending ones; bool [T]."""
    if not len(rows_N):
        return np.zeros(len(rows_T), np.bool_)
    at_T = np.searchsorted(rows_N, rows_T).clip(max=len(rows_N) - 1)
    is_in_T: np.ndarray = rows_N[at_T] == rows_T
    return is_in_T


def _take_rows(values_LTK: np.ndarray, indices: list[int], rows_T: np.ndarray) -> np.ndarray:
    taken_LTK = np.zeros((len(indices), len(rows_T), values_LTK.shape[2]), values_LTK.dtype)
    write_rows(taken_LTK, values_LTK, indices, rows_T)
    return taken_LTK


def write_rows(
    taken_LTK: np.ndarray, values_LTK: np.ndarray, indices: Sequence[int], rows_T: np.ndarray
) -> None:
    """Write rows of some layers of a column; the rows of the target lie side by side.

    Args:
        taken_LTK: The target, [len(indices), T, K].
        values_LTK: The column.
        indices: Of the layers.
        rows_T: int64; -1 reads row 0.
    """
    item = row_item(values_LTK)
    if values_LTK.shape[1]:
        for taken_TK, layer in zip(taken_LTK, indices, strict=True):
            rows_of_layer_T = np.asarray(values_LTK[layer]).view(item)[:, 0]
            # "clip" reads row 0 for -1, and unlike "raise" needs no buffer for `out`.
            np.take(rows_of_layer_T, rows_T, out=taken_TK.view(item)[:, 0], mode="clip")


def _token_first(values_LTK: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values_LTK.swapaxes(0, 1))
