"""Routing replay in Megatron-LM's own loop (`megatron.training`), with no edited source.

    torchrun ... --spec routing_replay.adapters.megatron_lm layer_spec      (megatron-core 0.19.2)
    torchrun ... -m routing_replay.adapters.run pretrain_gpt.py ...         (run on 0.19.2)

Both replace `get_forward_backward_func` in `megatron.training.training`, which its train() reads
when it starts. Routes and tokens come from a file (`AdapterSettings.routes`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import PreflightError, TableError
from ..metrics.sinks import JsonLinesSink, Sink, TensorBoardSink, WandbSink
from ..routes.table import RouteTable
from .content import ContentIndex
from .job import Job, Schedule, context_size, log_rank
from .patches import require_parameters
from .settings import AdapterSettings

LOOP = "megatron.training.training"
STEP = "{step}"


class RoutesFile:
    """Routes of saved tables, found by the tokens of a batch.

    Args:
        path: A table's file; `{step}` in it stands for Megatron's 0-based iteration.
    """

    def __init__(self, path: str):
        self._path = path
        self._step = -1
        self._index: ContentIndex | None = None

    def open_step(self, step: int) -> RouteTable:
        if self._index is None or (STEP in self._path and step != self._step):
            self._step = step
            self._index = _index_of(RouteTable.open(self._path.replace(STEP, str(step))))
        return self._index.table

    def rows(self, args: Sequence[Any], kwargs: dict[str, Any]) -> np.ndarray:
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(input_ids, torch.Tensor):
            raise PreflightError(
                "the first pipeline stage runs without token ids",
                expected="model(input_ids, position_ids, attention_mask, ...)",
                got=type(input_ids).__name__,
                fix="Pass input_ids as Megatron's pretrain_gpt.py does",
            )
        if context_size() > 1:
            raise PreflightError(
                "rows cannot be found by content under context parallelism",
                expected="--context-parallel-size 1",
                got=context_size(),
                fix="Each rank sees a part of the tokens: pass token_rows in your own forward_step",
            )
        assert self._index is not None  # the step is open
        packed = kwargs.get("packed_seq_params")
        bounds = None if packed is None else packed.cu_seqlens_q.tolist()
        return self._index.rows(input_ids.cpu().numpy(), bounds)


def _index_of(table: RouteTable) -> ContentIndex:
    if table.token_ids_T is None:
        raise TableError(
            "the table has no token ids, by which this loop finds its rows",
            expected="a table saved with the tokens of its sequences",
            where=table.where,
            fix="Save RouteTable.from_routes(routes).with_tokens(tokens)",
        )
    return ContentIndex(table, table.token_ids_T)


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
    if settings.mode != "disabled":
        wrap_loop(importlib.import_module(LOOP), settings)


def wrap_loop(loop: Any, settings: AdapterSettings) -> None:
    """Replay in the loop of an imported `megatron.training.training`.

    Raises:
        PreflightError: A loop or a schedule with another signature.
    """
    require_parameters(loop.train_step, ("forward_step_func", "model"), f"{LOOP}.train_step")
    job = Job(settings, RoutesFile(settings.routes), _open_sinks, _iteration)
    stock = loop.get_forward_backward_func

    @functools.wraps(stock)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Schedule:
        return job.wrap(stock(*args, **kwargs))

    loop.get_forward_backward_func = get_forward_backward_func


def _iteration() -> int:
    """Return the loop's own step number, which a resume and a repeated step do not upset."""
    from megatron.training import get_args

    return int(get_args().curr_iteration)


def _open_sinks(settings: AdapterSettings) -> list[Sink]:
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    if not log_rank():
        return []
    sinks: list[Sink] = [JsonLinesSink(settings.metrics_dir)] if settings.metrics_dir else []
    if get_tensorboard_writer() is not None:
        sinks.append(TensorBoardSink(get_tensorboard_writer()))
    if get_wandb_writer() is not None:
        sinks.append(WandbSink(get_wandb_writer()))
    return sinks
