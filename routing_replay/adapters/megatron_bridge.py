"""Routing replay in Megatron-Bridge's own loop, by one of its callbacks.

    pretrain(config, forward_step, callbacks=[RoutingReplay()])            (megatron-bridge 0.6.2)

Routes and tokens come from a file: ROUTING_REPLAY_ROUTES, or `AdapterSettings(routes=...)`.
Evaluation is stock. The events are Bridge's public interface, so nothing of it is replaced.
"""

from __future__ import annotations

import contextlib
from importlib.metadata import version
from typing import Any

from ..metrics.sinks import Sink, TensorBoardSink, WandbSink
from . import contracts
from .forwards import FileReplay
from .job import Job, json_sink
from .routes_file import RoutesFile
from .settings import AdapterSettings


class RoutingReplay:
    """A `megatron.bridge.training.callbacks.Callback`: replays in every training step.

    Bridge calls the methods by their names; a base class would import it.

    Args:
        settings: From the environment (ROUTING_REPLAY_ROUTES, ...) if None.

    Raises:
        ConfigError: No routes are named, or a setting cannot work.
        PreflightError: A Megatron-Bridge without the events on which this relies.
    """

    def __init__(self, settings: AdapterSettings | None = None):
        self._settings = settings or AdapterSettings.from_environment()
        self._settings.require_routes_file()
        contracts.require("megatron-bridge")
        bridge = f"megatron-bridge {version('megatron-bridge')}"
        self._job = Job(self._settings, bridge, self._open_sinks, self._step)
        self._replay = FileReplay(self._job, RoutesFile(self._settings.routes))
        self._scope = contextlib.ExitStack()
        self._state: Any = None
        self._job.require_replayed_at_exit()

    def on_train_step_start(self, context: Any) -> None:
        """Open the scope; Bridge calls it on every rank, before it runs the schedule."""
        if self._settings.is_enabled:
            self._state = context.state
            self._scope.enter_context(self._replay.step(context.model, self._step()))

    def on_train_step_end(self, context: Any) -> None:
        """Close the scope: the receipt, and the step's metrics."""
        self._scope.close()

    def on_train_end(self, context: Any) -> None:
        """Raise ReplayError unless the job replayed a row."""
        self._job.require_replayed()

    def _step(self) -> int:
        """Return Bridge's own number of the step, which a resume does not upset."""
        return int(self._state.train_state.step)

    def _open_sinks(self, settings: AdapterSettings) -> list[Sink]:
        """Ours, and the loggers that Bridge has on its last rank."""
        sinks = json_sink(settings)
        if self._state.tensorboard_logger is not None:
            sinks.append(TensorBoardSink(self._state.tensorboard_logger))
        if self._state.wandb_logger is not None:
            sinks.append(WandbSink(self._state.wandb_logger))
        return sinks
