"""`Job`: routing replay in a training loop that knows nothing of it.

Frameworks of Megatron import `get_forward_backward_func` by name and call what it returns once per
training step. Wrapping that one function gives the model chunks, the scope of a step and the
difference between training and evaluation; hooks on the chunks give the microbatches.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ..errors import ReplayError
from ..megatron.replay import Replay, attach
from ..metrics.sinks import Sink
from ..metrics.typed import Value, to_floats
from ..routes.table import RouteTable
from .patches import require_parameters
from .relay import RowRelay
from .settings import AdapterSettings

Schedule = Callable[..., Any]
SCHEDULE_PARAMETERS = ("forward_step_func", "data_iterator", "model", "forward_only")


class RouteSource(Protocol):
    """Where a framework's routes come from, and how it names the rows of a microbatch."""

    def open_step(self, step: int) -> RouteTable:
        """Return the routes of a 0-based training step."""
        ...

    def rows(self, args: Sequence[Any], kwargs: dict[str, Any]) -> np.ndarray:
        """Return `token_rows` [b, s] of a forward, from the arguments of the first chunk's call."""
        ...


class Job:
    """Replay around a framework's schedule: attached at the first training step.

    Passes with `forward_only` (evaluation, references, values) stay stock.

    Args:
        settings: Mode, telemetry and the routes' name.
        source: The step's routes and rows.
        open_sinks: Called once, after the framework has opened its own writers.
        current_step: The framework's 0-based number of the training step that runs.
    """

    def __init__(
        self,
        settings: AdapterSettings,
        source: RouteSource,
        open_sinks: Callable[[AdapterSettings], list[Sink]],
        current_step: Callable[[], int],
    ):
        self.settings = settings
        self.source = source
        self.current_step = current_step
        self._open_sinks = open_sinks
        self._sinks: list[Sink] | None = None
        self._microbatches: Microbatches | None = None

    def wrap(self, schedule: Schedule) -> Schedule:
        """Return the schedule with a replaying scope around every training step.

        Raises:
            PreflightError: The schedule does not take the parameters that the wrapper reads.
        """
        require_parameters(schedule, SCHEDULE_PARAMETERS, "Megatron's schedule")

        @functools.wraps(schedule)
        def replayed(**named: Any) -> Any:
            if named.get("forward_only"):
                return schedule(**named)
            return self._train_step(schedule, named)

        return replayed

    def _train_step(self, schedule: Schedule, named: dict[str, Any]) -> Any:
        step = self.current_step()
        table = self.source.open_step(step)
        if self._microbatches is None:
            self._microbatches = self._attach(named["model"])
        with self._microbatches.step(table):
            result = schedule(**named)
        self._report(self._microbatches.replay, step)
        return result

    def _attach(self, model: torch.nn.Module | list[torch.nn.Module]) -> Microbatches:
        chunks = model if isinstance(model, list) else [model]
        replay = attach(chunks, self.settings.replay_config)
        if dist.get_rank() == 0:
            print(
                f"routing_replay {version('routing_replay')}: mode {self.settings.mode}, routes "
                f"{self.settings.routes}, {replay.shape}, "
                f"megatron-core {version('megatron-core')}",
                flush=True,
            )
        return Microbatches(replay, chunks, self.source.rows)

    def _report(self, replay: Replay, step: int) -> None:
        """Write the step's metrics; collective. The first step also prints and is checked."""
        values = to_floats(replay.metrics())
        if self._sinks is None:
            self._sinks = self._open_sinks(self.settings)
            self._check_first_step(values)
        for sink in self._sinks:
            sink.write(step, values)

    def _check_first_step(self, values: Mapping[str, Value]) -> None:
        replayed = values["routing_replay/replayed_rows"]
        if not replayed:
            raise ReplayError(
                "no token of the first step has routes: the job would train without replay",
                expected="sequences of the routes file among the step's samples",
                got="0 replayed rows",
                where=self.settings.routes,
                fix="Train on the samples that were rolled out, tokenized as the server saw them; "
                "a fixed prompt template or a shifted first token changes every sequence",
            )
        if dist.get_rank() == 0:
            print(
                f"routing_replay: the first step replayed {replayed:.0f} rows of all layers and "
                "ranks",
                flush=True,
            )


class Microbatches:
    """Announces every forward of the model chunks in a training step, by hooks on the chunks.

    Collective over the pipeline group when it is made.

    Args:
        replay: The handle of the chunks.
        chunks: This rank's model chunks, as the schedule gets them.
        rows: As `RouteSource.rows`.
    """

    def __init__(
        self,
        replay: Replay,
        chunks: Sequence[torch.nn.Module],
        rows: Callable[[Sequence[Any], dict[str, Any]], np.ndarray],
    ):
        self.replay = replay
        self._rows = rows
        self._relay = RowRelay()
        self._num_forwards: dict[torch.nn.Module, int] = {}
        self._is_training = False
        for chunk in chunks:
            # Before the hook by which replay learns that a chunk runs.
            chunk.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
            chunk.register_forward_hook(self._leave, always_call=True)

    @contextlib.contextmanager
    def step(self, table: RouteTable) -> Iterator[None]:
        """Within: every forward of a chunk replays its rows of the table."""
        self._num_forwards.clear()
        self._is_training = True
        try:
            with self.replay.replaying(table):
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
            self._relay.append(np.ascontiguousarray(self._rows(args, kwargs)))
        self.replay.enter_microbatch(self._relay[number])

    def _leave(self, chunk: torch.nn.Module, *output: object) -> None:
        if self._is_training:
            self.replay.leave_microbatch()


def log_rank() -> bool:
    """Whether this rank's writers are Megatron's: its last rank has them."""
    return dist.get_rank() == dist.get_world_size() - 1


def context_size() -> int:
    """Return the number of ranks that share a sequence."""
    return int(parallel_state.get_context_parallel_world_size())
