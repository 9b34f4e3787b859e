"""`Job`: routing replay in a training loop that knows nothing of it.

Frameworks of Megatron import `get_forward_backward_func` by name and call what it returns once per
pass. `Job.wrap` takes that one function: it gives the model, the batch and the difference between
the actor and everything else, which stays stock. An adapter whose framework has an engine class
opens `Job.actor_pass` itself.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ..errors import ReplayError
from ..megatron.replay import Replay, attach
from ..metrics.sinks import JsonLinesSink, Sink
from ..metrics.typed import Value, to_floats
from ..routes.shape import MoEShape
from ..routes.table import RouteTable
from .batch import RecordedRoutes, StepBatch
from .coverage import covered_table, uncovered
from .patches import rebind, require_parameters
from .settings import AdapterSettings

Schedule = Callable[..., Any]
SCHEDULE_PARAMETERS = ("forward_step_func", "data_iterator", "model", "forward_only")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ScheduleCall:
    """The arguments with which a framework calls Megatron's schedule.

    Args:
        forward_step_func: The framework's, `(iterator, model, ...)`.
        data_iterator: One iterator, or one for each model chunk.
        chunks: This rank's model chunks.
        forward_only: No backward follows.
    """

    forward_step_func: Callable[..., Any]
    data_iterator: Any
    chunks: Sequence[torch.nn.Module]
    forward_only: bool


# Return the batch of a pass of the actor; None for every other pass, which stays stock.
BatchOf = Callable[[ScheduleCall], StepBatch | None]
# Return the numbers of `StepBatch.numbers` in the layout of the iterator's next microbatch; the
# iterator must not advance.
LayOut = Callable[[Any, list[torch.Tensor]], torch.Tensor]


class Job:
    """Replay in a framework's actor: attached at its first pass.

    Args:
        settings: Mode and telemetry.
        framework: Name and version, for the first line.
        open_sinks: Called once on every rank, after the framework has opened its own writers; ours
            is a JSON-lines file on the last rank if None.
        current_step: The framework's 0-based number of the running step; counted if None.

    Attributes:
        metrics: Of the last replaying pass, over all ranks, for the framework's own logger; empty
            before. `metrics.sinks.scalars` expands the layers.
    """

    def __init__(
        self,
        settings: AdapterSettings,
        framework: str = "",
        open_sinks: Callable[[AdapterSettings], list[Sink]] | None = None,
        current_step: Callable[[], int] | None = None,
    ):
        self.settings = settings
        self.framework = framework
        self.metrics: dict[str, Value] = {}
        self._open_sinks = open_sinks or json_sink
        self._current_step = current_step
        self._sinks: list[Sink] | None = None
        self._replay: Replay | None = None
        self._chunks: Sequence[torch.nn.Module] = ()
        self._recorded = RecordedRoutes()
        self._covered_R: np.ndarray | None = None
        self._is_entered = False
        self._num_updates = 0
        self._num_replayed_rows = 0.0

    def wrap_schedules(self, module: Any, batch_of: BatchOf, lay_out: LayOut | None = None) -> None:
        """Replay in every schedule that a module gets by the name `get_forward_backward_func`.

        Args:
            module: The framework's module that imports the name.
            batch_of: See `BatchOf`.
            lay_out: See `LayOut`. None: the adapter calls `enter` itself within the framework's
                forward step; `leave` follows by itself.

        Raises:
            PreflightError: The module has no such name, or the schedule another signature.
        """

        def replacement(stock: Callable[..., Schedule]) -> Callable[..., Schedule]:
            return lambda *args, **named: self.wrap(stock(*args, **named), batch_of, lay_out)

        rebind(module, "get_forward_backward_func", replacement)

    def wrap(
        self, schedule: Schedule, batch_of: BatchOf, lay_out: LayOut | None = None
    ) -> Schedule:
        """Return the schedule with a scope around every pass of the actor; see `wrap_schedules`."""
        require_parameters(schedule, SCHEDULE_PARAMETERS, "Megatron's schedule")

        def replayed(**named: Any) -> Any:
            call = schedule_call(named)
            batch = _batch_on_all_ranks(batch_of, call)
            if batch is None:
                return schedule(**named)
            numbers = batch.numbers()

            def step(iterator: Any, *args: Any, **kwargs: Any) -> Any:
                if lay_out is not None:
                    self.enter(lay_out(iterator, numbers))
                output = call.forward_step_func(iterator, *args, **kwargs)
                self.leave()
                return output

            with self.actor_pass(call.chunks, batch, is_update=not call.forward_only):
                return schedule(**named | {"forward_step_func": step})

        return replayed

    @contextlib.contextmanager
    def actor_pass(
        self, chunks: Sequence[torch.nn.Module], batch: StepBatch, *, is_update: bool
    ) -> Iterator[None]:
        """Around one pass of the actor over a batch; collective over all ranks.

        R3 replays the batch's routes in every pass. R2 records in a pass without update, and
        replays in the update.

        Raises:
            ReplayError: On all ranks, if the pass cannot open on one of them; or at the end, a
                replaying pass without a replayed row.
        """
        if self.settings.mode == "R3":
            passing = self.replaying(chunks, batch.table, is_update=is_update, needs_rows=True)
        elif is_update:
            passing = self.replaying(chunks, lambda _: self._recorded.table(batch), needs_rows=True)
        else:
            passing = self._recording(self.attach(chunks), batch)
        with passing:
            yield

    @contextlib.contextmanager
    def replaying(
        self,
        chunks: Sequence[torch.nn.Module],
        table_of: Callable[[MoEShape], RouteTable],
        *,
        is_update: bool = True,
        needs_rows: bool = False,
    ) -> Iterator[Replay]:
        """Around one pass that replays a table; collective over all ranks.

        Args:
            chunks: This rank's model chunks.
            table_of: Makes the pass's table; called on every rank.
            is_update: The metrics go to the sinks.
            needs_rows: Every pass must replay a row, not the first one only.

        Raises:
            ReplayError, RoutesError: On all ranks: a table cannot be made, or more of its rows are
                not covered than `max_uncovered` allows.
        """
        replay = self.attach(chunks)
        limit = self.settings.max_uncovered
        table = on_all_ranks(lambda: covered_table(table_of(replay.shape), limit))
        self._covered_R = np.asarray(table.covered_T)
        with replay.replaying(table), self._ending_microbatch():
            yield replay
        self._report(replay, table, is_update, needs_rows)

    def attach(self, chunks: Sequence[torch.nn.Module]) -> Replay:
        """Return the handle of the actor; collective over the pipeline group at the first call.

        Raises:
            ReplayError: The chunks are not those of the first call.
        """
        if self._replay is None:
            self._chunks = list(chunks)
            self._replay = attach(self._chunks, self.settings.replay_config)
            self._say(self._first_line(self._replay))
        if [id(chunk) for chunk in chunks] != [id(chunk) for chunk in self._chunks]:
            raise ReplayError(
                "a pass of another model came to the job of the actor",
                expected="the model chunks of the first pass",
                fix="Use one Job for each actor of a process",
            )
        return self._replay

    def enter(self, numbers: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Announce the next forward.

        Args:
            numbers: Rows plus 1, laid out as `input_ids` on this rank; 0 routes live. Any integer
                type, shape and device; a copy from a GPU waits for it.
            mask: Tokens that the metrics look at; all if None.
        """
        rows = numbers.detach().cpu().long().numpy() - 1
        rows = rows.reshape(-1, rows.shape[-1])
        if self._covered_R is not None and len(self._covered_R):
            rows = np.where((rows >= 0) & ~self._covered_R[rows.clip(min=0)], -1, rows)
        assert self._replay is not None, "a forward is announced within a pass"
        self._replay.enter_microbatch(
            rows, None if mask is None else mask.cpu().reshape(rows.shape)
        )
        self._is_entered = True

    def leave(self) -> None:
        """End what `enter` began; nothing if nothing was entered."""
        if self._is_entered and self._replay is not None:
            self._is_entered = False
            self._replay.leave_microbatch()

    @contextlib.contextmanager
    def microbatch(self, numbers: torch.Tensor, mask: torch.Tensor | None = None) -> Iterator[None]:
        """Around one forward; arguments as of `enter`."""
        self.enter(numbers, mask)
        yield
        self.leave()

    def require_replayed(self) -> None:
        """Raise ReplayError unless some row was replayed; call it when the job has ended."""
        if self.settings.is_enabled and not self._num_replayed_rows:
            raise ReplayError(
                "the job ended without a single replayed row",
                expected=f"replay in mode {self.settings.mode}",
                got=f"{self._num_updates} updates that replayed nothing"
                if self._num_updates
                else "no update that routing replay saw",
                where=self.framework or None,
                fix="Check the adapter's flags (docs/adopt) and run routing-replay doctor",
            )

    def require_replayed_at_exit(self) -> None:
        """Check `require_replayed` when the process ends: its message, and exit status 1."""
        atexit.register(self._check_at_exit)

    def _check_at_exit(self) -> None:
        if hasattr(sys, "last_value"):  # an exception ended the process: it says why
            return
        try:
            self.require_replayed()
        except ReplayError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)  # no exception leaves a handler of atexit

    @contextlib.contextmanager
    def _recording(self, replay: Replay, batch: StepBatch) -> Iterator[Replay]:
        self._covered_R = None
        # A framework may run the passes over parts of a batch: what was never recorded is missed
        # in the update.
        recording = replay.recording(batch.lengths, is_partial=True, is_shared=False)
        with recording as recorded, self._ending_microbatch():
            yield replay
        self._recorded.add(on_all_ranks(recorded.own_table), batch.tokens)

    @contextlib.contextmanager
    def _ending_microbatch(self) -> Iterator[None]:
        """A pass that fails leaves no microbatch behind: the scope ends what is open."""
        try:
            yield
        finally:
            self._is_entered = False

    def _report(self, replay: Replay, table: RouteTable, is_update: bool, needs_rows: bool) -> None:
        """Keep the pass's metrics; collective. Those of an update go to the sinks."""
        self.metrics = to_floats(replay.metrics()) | uncovered(table, _collective_device())
        num_rows = self.metrics["routing_replay/replayed_rows"]
        assert isinstance(num_rows, float)
        is_first = not self._num_replayed_rows
        if not num_rows and (is_first or needs_rows):
            raise self._no_rows(is_first)
        self._num_replayed_rows += num_rows
        if is_first:
            self._say(f"the first pass replayed {num_rows:.0f} rows of all layers and ranks")
        if not is_update:
            return
        step = self._current_step() if self._current_step else self._num_updates
        self._num_updates += 1
        if self._sinks is None:
            self._sinks = self._open_sinks(self.settings)
        for sink in self._sinks:
            sink.write(step, self.metrics)

    def _no_rows(self, is_first: bool) -> ReplayError:
        which = "the first pass" if is_first else "a pass of the actor"
        return ReplayError(
            f"no token of {which} has routes: it would train without replay",
            expected="routes of the pass's sequences",
            got="0 replayed rows",
            where=self.settings.routes or self.framework or None,
            fix="Train on the samples that were rolled out, tokenized as the server saw them; "
            "a fixed prompt template or a shifted first token changes every sequence",
        )

    def _first_line(self, replay: Replay) -> str:
        source = (
            self.settings.routes
            or {"R2": "the old policy's pass", "R3": "the rollout"}[self.settings.mode]
        )
        framework = [self.framework] if self.framework else []
        core = f"megatron-core {version('megatron-core')}"
        parts = [f"mode {self.settings.mode}", f"routes of {source}", str(replay.shape)]
        return f"{version('routing_replay')}: " + ", ".join([*parts, *framework, core])

    @staticmethod
    def _say(text: str) -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"routing_replay: {text}", file=sys.stdout, flush=True)


def schedule_call(named: Mapping[str, Any]) -> ScheduleCall:
    """Return the arguments of a schedule as an adapter reads them."""
    model = named["model"]
    return ScheduleCall(
        forward_step_func=named["forward_step_func"],
        data_iterator=named["data_iterator"],
        chunks=model if isinstance(model, list) else [model],
        forward_only=bool(named.get("forward_only")),
    )


def _batch_on_all_ranks(batch_of: BatchOf, call: ScheduleCall) -> StepBatch | None:
    """The batch of a call; collective only if the call is the actor's, or fails on some rank."""
    try:
        batch = batch_of(call)
    except Exception as raised:
        error = raised

        def fail() -> None:
            raise error

        on_all_ranks(fail)
    if batch is not None:
        on_all_ranks(lambda: None)
    return batch


def on_all_ranks(function: Callable[[], Result]) -> Result:
    """Return `function()`, or raise on every rank if it raised on one; collective over the world.

    A rank that raised alone would leave the others waiting in the model's collectives.
    """
    error: Exception | None = None
    try:
        result = function()
    except Exception as raised:
        error = raised
    if dist.is_initialized() and dist.get_world_size() > 1:
        has_failed = torch.tensor([int(error is not None)], device=_collective_device())
        dist.all_reduce(has_failed, op=dist.ReduceOp.MAX)
        if error is None and has_failed.item():
            raise ReplayError(
                "another rank could not open the pass",
                where=f"rank {dist.get_rank()}",
                fix="Read the error of that rank",
            )
    if error is not None:
        raise error
    return result


def _collective_device() -> str:
    """Where the tensors of the world's collectives must be."""
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


def json_sink(settings: AdapterSettings) -> list[Sink]:
    """Return the file of `metrics_dir`, on the last rank if the setting names a folder."""
    is_last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    return [JsonLinesSink(settings.metrics_dir)] if is_last and settings.metrics_dir else []
