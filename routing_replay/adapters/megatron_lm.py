"""Routing replay in Megatron-LM's own loop (`megatron.training`), with no edited source.

    torchrun ... --spec routing_replay.adapters.megatron_lm layer_spec      (megatron-core 0.19.2)
    torchrun ... -m routing_replay.adapters.run pretrain_gpt.py ...         (0.17.1 to 0.19.2)

Both replace `get_forward_backward_func` in `megatron.training.training`, which its train() reads
when it starts. Routes and tokens come from a file (`AdapterSettings.routes`). Evaluation is stock.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from ..metrics.sinks import Sink, TensorBoardSink, WandbSink
from . import contracts
from .forwards import FileReplay
from .job import SCHEDULE_PARAMETERS, Job, Schedule, json_sink, schedule_call
from .patches import rebind, require_parameters
from .routes_file import RoutesFile
from .settings import AdapterSettings

LOOP = "megatron.training.training"


def layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Megatron-LM's default layers, and replay as the environment says; for `--spec`.

    Settings: ROUTING_REPLAY_ROUTES and further `AdapterSettings` in capital letters.
    """
    from megatron.training.models.gpt import default_layer_spec

    _install_once()
    return default_layer_spec(config, vp_stage)


@functools.cache
def _install_once() -> None:
    settings = AdapterSettings.from_environment()
    settings.require_routes_file()
    if settings.is_enabled:
        wrap_loop(importlib.import_module(LOOP), settings)


def wrap_loop(loop: Any, settings: AdapterSettings) -> None:
    """Replay in the loop of an imported `megatron.training.training`.

    A process that ends without a replayed row fails.

    Raises:
        PreflightError: A loop or a schedule with another signature.
    """
    contracts.require("megatron-lm")
    job = Job(settings, "megatron.training", _open_sinks, _iteration)
    job.require_replayed_at_exit()
    replay = FileReplay(job, RoutesFile(settings.routes))

    def replacement(stock: Callable[..., Schedule]) -> Callable[..., Schedule]:
        return lambda *args, **named: _wrap(stock(*args, **named), replay)

    rebind(loop, "get_forward_backward_func", replacement)


def _wrap(schedule: Schedule, replay: FileReplay) -> Schedule:
    require_parameters(schedule, SCHEDULE_PARAMETERS, "Megatron's schedule")

    @functools.wraps(schedule)
    def replayed(**named: Any) -> Any:
        call = schedule_call(named)
        if call.forward_only:  # evaluation
            return schedule(**named)
        with replay.step(call.chunks, _iteration()):
            return schedule(**named)

    return replayed


def _iteration() -> int:
    """Return the loop's own step number, which a resume and a repeated step do not upset."""
    from megatron.training import get_args

    return int(get_args().curr_iteration)


def _open_sinks(settings: AdapterSettings) -> list[Sink]:
    """Ours, and the writers that Megatron has on its last rank."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    sinks = json_sink(settings)
    if get_tensorboard_writer() is not None:
        sinks.append(TensorBoardSink(get_tensorboard_writer()))
    if get_wandb_writer() is not None:
        sinks.append(WandbSink(get_wandb_writer()))
    return sinks
