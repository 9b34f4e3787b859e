"""R2: the trainer's own routes of all ranks become one table. The record follows the tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from ..errors import ReplayError
from ..routes.routes import Origin
from ..routes.shape import MoEShape
from ..routes.table import RouteTable
from ..routes.token_rows import RowSource
from .passes import Pass, RecordingPass, ReplayingPass


class Recording(RowSource):
    """Routes that routers chose live during a scope.

    Args:
        model: Layers of all pipeline stages, experts, top-k.
        lengths: Rows of each sequence of the step, on all ranks alike: number of tokens - 1.
        is_writer: False on a rank whose tokens another rank records as well.
        is_partial: Rows that no microbatch names stay uncovered; otherwise they are an error.
    """

    def __init__(
        self,
        model: MoEShape,
        lengths: Sequence[int],
        is_writer: bool = True,
        is_partial: bool = False,
    ):
        self._is_writer = is_writer
        self._is_partial = is_partial
        self._empty = RouteTable.empty(model, lengths)
        self._passes: list[Pass] = []
        self._is_complete = False

    @property
    def num_rows(self) -> int:
        return self._empty.num_rows

    def rows(self, sequence: int, num_tokens: int) -> np.ndarray:
        """`token_rows` of a sequence, as `RouteTable.rows`: where its routes will be recorded."""
        return self._empty.rows(sequence, num_tokens, covered_only=False)

    def complete(self, passes: list[Pass]) -> None:
        """Called at the end of the scope with its passes."""
        self._passes = passes if self._is_writer else []
        self._is_complete = True

    def table(self, path: str | os.PathLike | None = None, weight_version: int = -1) -> RouteTable:
        """The recorded table, whole on every rank; collective over all ranks.

        Every rank may hold other tokens (data, context and sequence parallelism) and other layers
        (pipeline); layer by layer they are merged, so no rank ever sends more than it recorded.

        Args:
            path: A folder-shared file of the node: its first rank writes it, the others map it.
                None keeps a copy in each rank's memory.
            weight_version: Version of the weights that chose the routes.

        Raises:
            ReplayError: The scope is still open or failed, or a row was recorded twice or never.
        """
        if not self._is_complete:
            raise ReplayError(
                "the recording is not complete",
                expected="`recorded.table()` after the scope that recorded it has ended well",
                fix="Leave `with replay.recording(...)` first",
            )
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies to the host were only enqueued
        table = self._merge()
        table.weight_version_T[table.covered_T] = weight_version
        if path is None:
            return table
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            table.save(path)
        if _world() > 1:
            dist.barrier()
        return RouteTable.open(path, verify=False)

    def _merge(self) -> RouteTable:
        table = self._empty
        covered_T = np.ones(table.num_rows, np.bool_)
        for place, layer in enumerate(table.shape.layers):
            ids_TK, times_T = self._of_layer(layer)
            if _world() > 1:
                _reduce(ids_TK.view(np.uint8), dist.ReduceOp.MAX)
                _reduce(times_T, dist.ReduceOp.SUM)
            if times_T.max(initial=0) > 1:
                raise ReplayError(
                    "a row was recorded more than once",
                    expected="each token of the step in one microbatch of one rank",
                    got=f"{int(times_T.max())} times",
                    where=f"layer {layer}, row {int(times_T.argmax())}",
                    fix="Give each data-parallel rank its own sequences",
                )
            table.expert_ids_LTK[place] = ids_TK
            covered_T &= times_T == 1
        if not (self._is_partial or covered_T.all()):
            raise self._never_recorded(covered_T)
        table.expert_ids_LTK[:, ~covered_T] = 0
        table.covered_T[:] = covered_T
        table.origin_T[:] = np.where(covered_T, Origin.PREFILL, Origin.ABSENT)
        return table

    def _never_recorded(self, covered_T: np.ndarray) -> ReplayError:
        row = int(np.flatnonzero(~covered_T)[0])
        sequence = int(np.searchsorted(self._empty.offsets_S1, row, side="right")) - 1
        return ReplayError(
            "rows were never recorded: their tokens would route live in the update, unnoticed",
            expected=f"all {len(covered_T)} rows, each in one microbatch of one rank",
            got=f"{int(covered_T.sum())}",
            where=f"first row {row}, of sequence {sequence}",
            fix="Feed every sequence to some rank; recording(lengths, is_partial=True) allows gaps",
        )

    def _of_layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """What this rank recorded of a layer: ids [T, K], zero elsewhere, and how often [T]."""
        shape = (self._empty.num_rows, self._empty.shape.top_k)
        ids_TK = np.zeros(shape, self._empty.expert_ids_LTK.dtype)
        times_T = np.zeros(self._empty.num_rows, np.uint8)
        for p in self._passes:
            recorded = recorded_ids(p).get(layer)
            if recorded is None:
                continue
            kept_T = p.rows_T >= 0
            rows = p.rows_T[kept_T]
            ids_TK[rows] = recorded.numpy().view(ids_TK.dtype)[kept_T]
            np.add.at(times_T, rows, 1)
        return ids_TK, times_T


def recorded_ids(p: Pass) -> dict[int, torch.Tensor]:
    """Live ids that a pass kept, by layer."""
    if isinstance(p, RecordingPass):
        return p.recorded
    return p.live_ids if isinstance(p, ReplayingPass) else {}


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _reduce(values: np.ndarray, operation) -> None:
    """All-reduce a host array of bytes in place; exact, for each byte has one writer."""
    tensor = torch.from_numpy(values)
    if dist.get_backend() == "nccl":
        on_device = tensor.cuda()
        dist.all_reduce(on_device, op=operation)
        tensor.copy_(on_device)
    else:
        dist.all_reduce(tensor, op=operation)
