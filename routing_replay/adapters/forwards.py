"""Loops that name no rows: every forward of the model's chunks announces itself, by hooks on them.

The rows come from the tokens that the first pipeline stage reads; `relay.py` brings them to the
others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..megatron.replay import Replay
from .job import Job
from .relay import RowRelay
from .routes_file import RoutesFile

# Return `token_rows` [b, s] of a forward, from the arguments of the first chunk's call.
RowsOf = Callable[[Sequence[Any], dict[str, Any]], np.ndarray]


class FileReplay:
    """Replay of a routes file in training steps, whatever loop runs them.

    Args:
        job: Of the model in training.
        source: Routes and tokens of the steps.
    """

    def __init__(self, job: Job, source: RoutesFile):
        self.job = job
        self.source = source
        self._forwards: AnnouncedForwards | None = None

    @contextlib.contextmanager
    def step(self, chunks: Sequence[torch.nn.Module], number: int) -> Iterator[None]:
        """Around the schedule of training step `number`; collective over all ranks."""
        with self.job.replaying(chunks, lambda shape: self.source.open_step(number)) as replay:
            if self._forwards is None:
                self._forwards = AnnouncedForwards(replay, chunks, self.source.rows)
            with self._forwards.step():
                yield


class AnnouncedForwards:
    """Hooks that announce every forward of the chunks within `step`.

    Collective over the pipeline group when it is made.

    Args:
        replay: The handle of the chunks.
        chunks: This rank's model chunks, as the schedule gets them.
        rows_of: See `RowsOf`.
    """

    def __init__(self, replay: Replay, chunks: Sequence[torch.nn.Module], rows_of: RowsOf):
        self.replay = replay
        self._rows_of = rows_of
        self._relay = RowRelay()
        self._num_forwards: dict[torch.nn.Module, int] = {}
        self._is_training = False
        for chunk in chunks:
            # Before the hook by which replay learns that a chunk runs.
            chunk.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
            chunk.register_forward_hook(self._leave, always_call=True)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Within: every forward of a chunk is the next microbatch of a training step."""
        self._num_forwards.clear()
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False
            self._relay.end_step()

    def _enter(self, chunk: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_training:
            return
        number = self._num_forwards.get(chunk, 0)
        self._num_forwards[chunk] = number + 1
        if self._relay.is_source and number == len(self._relay):
            self._relay.append(np.ascontiguousarray(self._rows_of(args, kwargs)))
        self.replay.enter_microbatch(self._relay[number])

    def _leave(self, chunk: torch.nn.Module, *output: object) -> None:
        if self._is_training:
            self.replay.leave_microbatch()
