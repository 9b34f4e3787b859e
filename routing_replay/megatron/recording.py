"""R2: the trainer's own routes of all ranks become one table. The record follows the tokens."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from ..errors import ReplayError
from ..routes.origin import Origin
from ..routes.shape import MoEShape
from ..routes.table import RouteTable
from ..routes.token_rows import RowSource
from .passes import ForwardPass
from .ranks import Groups, RankGrid, reduce


class Recording(RowSource):
    """Routes that routers chose live during a scope.

    Args:
        shape: Layers of all pipeline stages, experts, top-k.
        lengths: Tokens of each sequence. A sequence of n tokens has n - 1 rows.
        grid: The ranks beside this one; a world of one if None.
        is_writer: False on a rank whose tokens another rank records as well.
        is_partial: Rows that no microbatch names stay uncovered; otherwise they are an error.
        is_shared: All ranks number their rows alike, over the sequences of all data-parallel ranks.
            Otherwise the lengths are of this data-parallel rank's own sequences.

    Raises:
        ReplayError: A length that no sequence can have.
    """

    def __init__(
        self,
        shape: MoEShape,
        lengths: Sequence[int] | np.ndarray,
        grid: RankGrid | None = None,
        *,
        is_writer: bool = True,
        is_partial: bool = False,
        is_shared: bool = True,
    ):
        lengths_S = np.asarray(lengths, np.int64)
        if lengths_S.ndim != 1 or lengths_S.min(initial=1) < 1:
            raise ReplayError(
                "the lengths are out of range",
                expected="the number of tokens of each sequence, at least 1",
                got=lengths_S.tolist(),
            )
        grid = grid or RankGrid()
        self._grid = grid
        self._is_shared = is_shared
        self._sharing_data = grid.data if is_shared else ()
        self._is_writer = is_writer
        self._is_partial = is_partial
        self._empty = RouteTable.empty(shape, lengths_S)
        self._passes: list[ForwardPass] = []
        self._is_complete = False

    @property
    def num_rows(self) -> int:
        return self._empty.num_rows

    def rows(self, sequence: int, num_tokens: int) -> np.ndarray:
        """Return `token_rows` of a sequence: where its routes will be recorded."""
        return self._empty.rows(sequence, num_tokens, covered_only=False)

    def complete(self, passes: Sequence[ForwardPass]) -> None:
        """Take the passes of the scope that has ended."""
        self._passes = [p for p in passes if p.layers]
        self._is_complete = True

    def table(
        self, path: str | os.PathLike[str] | None = None, weight_version: int = -1
    ) -> RouteTable:
        """Return the recorded table, whole on every rank; collective over all ranks.

        Layer by layer the ranks' rows are merged, so no rank sends more than one layer at once.
        Every rank receives all rows: `own_table` spares that where a rank replays its own alone.

        Args:
            path: A folder-shared file of the node: its first rank writes it, the others map it.
                None keeps a copy in each rank's memory.
            weight_version: Version of the weights that chose the routes.

        Raises:
            ReplayError: The scope is still open or failed, a row was recorded twice or never, or a
                path for a recording that is not shared.
        """
        if path is not None and not self._is_shared:
            raise ReplayError(
                "a file holds a table that all ranks share",
                expected="recording(lengths) of all ranks' sequences",
                got="is_shared=False",
                where=path,
                fix="Use recorded.table() or own_table() without a path, or .save() it yourself",
            )
        groups = self._grid.table + self._sharing_data
        times = self._times_recorded(self._grid.tokens + self._sharing_data)
        is_kept = path is None or os.environ.get("LOCAL_RANK", "0") == "0"
        table = self._merged(np.arange(self.num_rows), groups, times == 1, is_kept)
        table.weight_version_T[table.covered_T] = weight_version
        if path is None:
            return table
        if is_kept:
            table.save(path)
        if dist.is_initialized():
            dist.barrier()
        return RouteTable.open(path, verify=False)

    def own_table(self, weight_version: int = -1) -> RouteTable:
        """Return the table with the rows of this data-parallel rank's sequences alone; collective.

        No row crosses to another data-parallel rank: one byte per row proves that each was recorded
        once. The rows keep their numbers; memory is taken for this rank's rows only.

        Args:
            weight_version: Version of the weights that chose the routes.

        Raises:
            ReplayError: The scope is still open or failed, or a row was recorded twice or never.
        """
        if self._sharing_data:
            self._times_recorded(self._grid.tokens + self._sharing_data)
            is_own = self._times_recorded(self._grid.tokens, is_whole=False) == 1
        else:
            is_own = self._times_recorded(self._grid.tokens) == 1
        table = self._merged(np.flatnonzero(is_own), self._grid.table, is_own)
        table.weight_version_T[is_own] = weight_version
        return table

    def _times_recorded(self, groups: Groups, is_whole: bool = True) -> np.ndarray:
        """How often each row was recorded, uint8 [R], alike in all chunks and stages; collective.

        Raises:
            ReplayError: Not complete, or if `is_whole` a row that was not recorded exactly once.
        """
        if not self._is_complete:
            raise ReplayError(
                "the recording is not complete",
                expected="`recorded.table()` after the scope that recorded it has ended well",
                fix="Leave `with replay.recording(...)` first",
            )
        self._require_alike(groups)
        times_CR = np.zeros((len({p.chunk for p in self._passes}), self.num_rows), np.uint8)
        index = {chunk: i for i, chunk in enumerate(sorted({p.chunk for p in self._passes}))}
        for one in self._passes if self._is_writer else ():
            if one.recorded():
                np.add.at(times_CR[index[one.chunk]], one.rows_T[one.rows_T >= 0], 1)
        reduce(times_CR, dist.ReduceOp.SUM, groups)
        # Neutral values for a stage without routers: it neither adds a row nor misses one.
        most_R, least_R = times_CR.max(0, initial=0), times_CR.min(0, initial=255)
        reduce(most_R, dist.ReduceOp.MAX, self._grid.stages)
        reduce(least_R, dist.ReduceOp.MIN, self._grid.stages)
        if is_whole:
            self._require_once(least_R, most_R)
        return np.where(least_R == most_R, most_R, 0)

    def _require_alike(self, groups: Groups) -> None:
        """Raise on all ranks unless their lengths are equal: their rows would be mixed up."""
        checksum = zlib.crc32(self._empty.offsets_S1.tobytes())
        most = np.array([checksum, -checksum])
        reduce(most, dist.ReduceOp.MAX, groups + self._grid.stages)
        if most[0] != -most[1]:
            raise ReplayError(
                "ranks that share a recording have different lengths",
                expected="the same lengths on every rank of it",
                got=f"{len(self._empty.offsets_S1) - 1} sequences, {self.num_rows} rows here",
                fix="recording(lengths, is_shared=False) for a table of each data-parallel rank",
            )

    def _require_once(self, least_R: np.ndarray, most_R: np.ndarray) -> None:
        if most_R.max(initial=0) > 1:
            raise ReplayError(
                "a row was recorded more than once",
                expected="each token of the step in one microbatch of one rank",
                got=f"{int(most_R.max())} times",
                where=f"row {int(most_R.argmax())}",
                fix="Give each data-parallel rank its own sequences",
            )
        if self._is_partial or least_R.all():
            return
        row = int(np.flatnonzero(least_R == 0)[0])
        sequence = int(np.searchsorted(self._empty.offsets_S1, row, side="right")) - 1
        raise ReplayError(
            "rows were never recorded: their tokens would route live in the update, unnoticed",
            expected=f"all {self.num_rows} rows, each in one microbatch of one rank",
            got=f"{int((least_R > 0).sum())}",
            where=f"first row {row}, of sequence {sequence}",
            fix="Feed every sequence to some rank; recording(lengths, is_partial=True) allows gaps",
        )

    def _merged(
        self, rows_M: np.ndarray, groups: Groups, covered_R: np.ndarray, is_kept: bool = True
    ) -> RouteTable:
        """The table with the ids of some rows; collective over the groups."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies to the host were only enqueued
        # Untouched pages of an empty table take no memory: rows of others cost nothing.
        table = self._empty
        parts = [(p, *self._positions(p, rows_M)) for p in self._passes if self._is_writer]
        for index, layer in enumerate(table.shape.layers):
            ids_MK = np.zeros((len(rows_M), table.shape.top_k), table.expert_ids_LTK.dtype)
            for one, kept_T, positions in parts:
                recorded = one.recorded().get(layer)
                if recorded is not None:
                    ids_MK[positions] = recorded.numpy().view(ids_MK.dtype)[kept_T]
            reduce(ids_MK.view(np.uint8), dist.ReduceOp.MAX, groups)
            if is_kept:
                # Zero, so that the tables of equal recordings are equal bytes.
                ids_MK[~covered_R[rows_M]] = 0
                table.expert_ids_LTK[index, rows_M] = ids_MK
        table.covered_T[:] = covered_R
        table.origin_T[:] = np.where(covered_R, Origin.PREFILL, Origin.ABSENT)
        return table

    @staticmethod
    def _positions(one: ForwardPass, rows_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens of a pass are among some ascending rows, and where."""
        at_T = np.searchsorted(rows_M, one.rows_T).clip(max=max(len(rows_M) - 1, 0))
        kept_T = (one.rows_T >= 0) & (rows_M[at_T] == one.rows_T) if len(rows_M) else at_T < 0
        return kept_T, at_T[kept_T]
