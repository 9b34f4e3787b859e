"""Rows for pipeline stages that see no tokens: the first stage sends what it read.

Stock loops give token ids to the first and the last stage only. A stage's forward of a microbatch
needs the first stage's forward of it, so a send that does not wait cannot deadlock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state


class RowRelay:
    """The `token_rows` of a step's microbatches, alike on all stages of a pipeline.

    Collective over the pipeline group when it is made.
    """

    def __init__(self) -> None:
        ranks = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
        self._first, self._others = ranks[0], ranks[1:]
        # Host memory travels over gloo, whatever the model's backend is.
        self._group: Any = None
        if self._others:
            self._group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self._rows: list[np.ndarray] = []
        self._pending: list[tuple[Any, torch.Tensor]] = []

    @property
    def is_source(self) -> bool:
        """Whether this rank is of the stage that reads the tokens."""
        return dist.get_rank() == self._first

    def append(self, rows_BS: np.ndarray) -> None:
        """Add the next microbatch's rows (first stage); they are sent without waiting."""
        self._rows.append(rows_BS)
        for part in (torch.tensor(rows_BS.shape), torch.from_numpy(rows_BS)):
            for rank in self._others:
                self._pending.append((dist.isend(part, rank, group=self._group), part))

    def __getitem__(self, number: int) -> np.ndarray:
        """Rows of the step's microbatch `number`; int64 [b, s]."""
        while len(self._rows) <= number and not self.is_source:
            self._rows.append(self._receive())
        return self._rows[number]

    def __len__(self) -> int:
        return len(self._rows)

    def end_step(self) -> None:
        """Wait for the sends and forget the step's rows."""
        for work, _ in self._pending:
            work.wait()
        self._pending.clear()
        self._rows.clear()

    def _receive(self) -> np.ndarray:
        shape = torch.empty(2, dtype=torch.int64)
        dist.recv(shape, self._first, group=self._group)
        rows_BS = torch.empty(shape.tolist(), dtype=torch.int64)
        dist.recv(rows_BS, self._first, group=self._group)
        return rows_BS.numpy()
