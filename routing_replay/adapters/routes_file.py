"""Routes and tokens of training steps from files, for loops that carry no routes with a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ..errors import PreflightError, TableError
from ..routes.parts import open_table
from ..routes.table import RouteTable
from ..routes.token_rows import context_positions
from .content import ContentIndex

STEP = "{step}"


class RoutesFile:
    """Routes of saved tables, found by the tokens of a batch.

    Args:
        path: A table's file; `{step}` in it stands for the loop's 0-based iteration.
    """

    def __init__(self, path: str):
        self._path = path
        self._step = -1
        self._index: ContentIndex | None = None

    def open_step(self, step: int) -> RouteTable:
        """Return the routes of a 0-based training step.

        Raises:
            TableError: The file cannot be read, or holds no tokens.
        """
        if self._index is None or (STEP in self._path and step != self._step):
            self._step = step
            self._index = _index_of(open_table(self._path.replace(STEP, str(step))))
        return self._index.table

    def rows(self, args: Sequence[Any], kwargs: dict[str, Any]) -> np.ndarray:
        """Return `token_rows` [b, s] of a forward, from the arguments of the first chunk's call.

        Collective over the context-parallel ranks.
        """
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(input_ids, torch.Tensor):
            raise PreflightError(
                "the first pipeline stage runs without token ids",
                expected="model(input_ids, position_ids, attention_mask, ...)",
                got=type(input_ids).__name__,
                fix="Pass input_ids as Megatron's pretrain_gpt.py does",
            )
        assert self._index is not None  # the step is open
        bounds = _bounds_of(kwargs.get("packed_seq_params"))
        ids_BS = input_ids.detach().cpu().reshape(-1, input_ids.shape[-1])
        size = parallel_state.get_context_parallel_world_size()
        if size == 1:
            return self._index.rows(ids_BS.numpy(), bounds)
        positions = _positions(ids_BS.shape[1] * size, size, bounds)
        whole_BS = np.empty((len(ids_BS), ids_BS.shape[1] * size), np.int64)
        for part_BS, held in zip(_gathered(input_ids, size), positions, strict=True):
            whole_BS[:, held] = part_BS
        own = positions[parallel_state.get_context_parallel_rank()]
        return self._index.rows(whole_BS, bounds)[:, own]


def _index_of(table: RouteTable) -> ContentIndex:
    if table.token_ids_T is None:
        raise TableError(
            "the table has no token ids, by which this loop finds its rows",
            expected="a table saved with the tokens of its sequences",
            where=table.where,
            fix="Save RouteTable.from_routes(routes).with_tokens(tokens)",
        )
    return ContentIndex(table, table.token_ids_T)


def _bounds_of(packed: Any) -> list[int] | None:
    """Where the segments of a packed batch begin, alignment padding included."""
    if packed is None:
        return None
    padded = getattr(packed, "cu_seqlens_q_padded", None)
    bounds = packed.cu_seqlens_q if padded is None else padded
    return [int(bound) for bound in bounds.tolist()]


def _positions(length: int, size: int, bounds: list[int] | None) -> list[np.ndarray]:
    """Positions of a line that each context-parallel rank holds."""
    segments = [0, length] if bounds is None else bounds
    return [context_positions(segments, rank, size) for rank in range(size)]


def _gathered(input_ids: torch.Tensor, size: int) -> list[np.ndarray]:
    """The tokens of all context-parallel ranks, [b, s] each."""
    local = input_ids.contiguous()
    parts = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(parts, local, group=parallel_state.get_context_parallel_group())
    return [part.cpu().reshape(-1, part.shape[-1]).numpy() for part in parts]
