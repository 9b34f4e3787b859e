"""Routing replay in slime and its fork miles, by two flags of theirs:

    --use-rollout-routing-replay --custom-megatron-init-path routing_replay.adapters.slime.init

The first makes the rollout return routes (R3); `--use-routing-replay` alone means R2. Their own
replay is switched off in the trainer's process, so stock megatron-core suffices.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..errors import ConfigError
from ..metrics.sinks import scalars
from . import contracts
from .batch import StepBatch
from .job import Job, ScheduleCall
from .patches import rebind
from .settings import AdapterSettings

# Where the two differ: the module by whose `log` they write metrics.
LOGGERS = {
    "slime": "slime.observability.logging_utils",
    "miles": "miles.utils.tracking_utils.tracking",
}
STEP_KEY = "train/step"
# What their get_batch reads beside the tokens, to lay them out.
LAYOUT_KEYS = ("tokens", "loss_masks", "total_lengths", "response_lengths", "max_seq_lens")
LAYOUT_ARGUMENTS = ("qkv_format", "allgather_cp")
ROUTES = "rollout_routed_experts"


def init(args: Any) -> None:
    """Take the replay of a trainer's process over; called at the end of their `initialize.init`.

    Settings beside the flags: keys `routing_replay_...` of `--custom-config-path`.

    Raises:
        ConfigError: Neither of their replay flags is on.
        PreflightError: Another version than the adapter was written for.
    """
    package = next(p for p in LOGGERS if f"{p}.backends.megatron_utils.initialize" in sys.modules)
    settings = AdapterSettings.from_mapping({"routing_replay_mode": _mode(args)} | vars(args))
    if not settings.is_enabled:
        return
    contracts.require(package)
    args.use_rollout_routing_replay = args.use_routing_replay = False
    os.environ["ENABLE_ROUTING_REPLAY"] = "0"  # slime's own switch
    _Trainer(package, args, settings)


def _mode(args: Any) -> str:
    if args.use_rollout_routing_replay:
        return "R3"
    if args.use_routing_replay:
        return "R2"
    raise ConfigError(
        "the adapter is loaded, and no replay is asked for",
        expected="--use-rollout-routing-replay (R3) or --use-routing-replay (R2)",
        got="neither",
        fix="Add one of them, or drop --custom-megatron-init-path",
    )


class _Trainer:
    """Their trainer's modules, rebound to a job."""

    def __init__(self, package: str, args: Any, settings: AdapterSettings):
        backend = f"{package}.backends.megatron_utils"
        model = importlib.import_module(f"{backend}.model")
        self._args = args
        self._settings = settings
        self._get_batch = model.get_batch
        self._is_actor = True
        self.job = Job(settings, package)
        self.job.wrap_schedules(model, self._batch_of, self._lay_out)
        rebind(importlib.import_module(f"{backend}.actor"), "forward_only", self._forward_only)
        rebind(importlib.import_module(LOGGERS[package]), "log", self._log, ("metrics", "step_key"))

    def _forward_only(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def forward_only(*passed: Any, store_prefix: str = "", **named: Any) -> Any:
            self._is_actor = not store_prefix  # the others are "ref_" and "teacher_"
            try:
                return stock(*passed, store_prefix=store_prefix, **named)
            finally:
                self._is_actor = True

        return forward_only

    def _batch_of(self, call: ScheduleCall) -> StepBatch | None:
        if not self._is_actor or getattr(call.chunks[0], "role", "actor") != "actor":
            return None
        iterator = call.data_iterator[0]
        # The iterators of a rollout serve all its passes; the batch lives as long as they do.
        if not hasattr(iterator, "routing_replay_batch"):
            data = iterator.rollout_data
            routed = data.get(ROUTES) if self._settings.mode == "R3" else None
            iterator.routing_replay_batch = StepBatch(data["tokens"], routed)
        batch: StepBatch = iterator.routing_replay_batch
        return batch

    def _lay_out(self, iterator: Any, numbers: list[torch.Tensor]) -> torch.Tensor:
        twin = copy.copy(iterator)  # reads the next microbatch, and the job's iterator stays
        twin.rollout_data = {**iterator.rollout_data, "tokens": numbers}
        taken = inspect.signature(self._get_batch).parameters
        named = {n: getattr(self._args, n) for n in LAYOUT_ARGUMENTS if n in taken}
        named |= {"keys": LAYOUT_KEYS, "pad_multiplier": self._args.data_pad_size_multiplier}
        laid_out: torch.Tensor = self._get_batch(data_iterator=twin, **named)["tokens"]
        return laid_out

    def _log(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def log(args: Any, metrics: dict[str, Any], step_key: str) -> Any:
            if step_key == STEP_KEY:
                ours = scalars(self.job.metrics)
                metrics = metrics | {f"train/{name}": value for name, value in ours.items()}
            return stock(args, metrics, step_key)

        return log


def compact(args: Any, sample: Any, *, rollout_id: int, evaluation: bool) -> Any:
    """Store a sample's routes in one byte a slot: slime's `--rollout-sample-hook-path`."""
    routed = getattr(sample, ROUTES, None)
    if isinstance(routed, torch.Tensor) and args.num_experts <= 256:
        setattr(sample, ROUTES, routed.to(torch.uint8))
    return sample
