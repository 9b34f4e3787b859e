"""Routing replay in SkyRL's Megatron workers, by variables and two keys of its own:

    RAY_RUNTIME_ENV_HOOK=routing_replay.adapters.ray.runtime_env_hook ROUTING_REPLAY_MODE=R3 \
        python -m skyrl.train.entrypoints.main_base ... \
        trainer.policy.megatron_config.moe_enable_routing_replay=true

The key stays on: it carries the routes, and it marks the policy. SkyRL packs, pads and slices them
with the tokens; row numbers take their place, so its own replay never runs.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ..errors import ReplayError
from ..metrics.sinks import scalars
from . import contracts
from .batch import StepBatch
from .job import Job, ScheduleCall
from .patches import rebind
from .routes import as_array, of_padded
from .settings import AdapterSettings

ROUTES, WITHOUT = "rollout_expert_indices", "router_padding_mask"
MISSING = -1
FORWARD = ("rollout_expert_indices", "router_padding_mask", "metadata_layout", "model_config")


def patch_wrapper(module: ModuleType) -> None:
    """Replay in the passes of `megatron_model_wrapper`, once it is imported."""
    contracts.require("skyrl")
    settings = AdapterSettings.from_environment(mode="disabled")
    if not settings.is_enabled:
        return
    policy = _Policy(Job(settings, "SkyRL"), module)
    rebind(module, "get_forward_backward_func", policy.replay)
    rebind(module, "setup_per_microbatch_replay_forward", policy.announce, FORWARD)
    rebind(module, "setup_per_microbatch_replay_backward", lambda _: lambda: None)
    rebind(module, "router_replay_schedule", lambda _: lambda enabled: contextlib.nullcontext())


class _Policy:
    """The one policy of a worker process."""

    def __init__(self, job: Job, module: Any):
        self.job = job
        self.module = module

    def replay(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Open a pass around every schedule; add the metrics to those of its microbatches."""

        def get_forward_backward_func(*passed: Any, **named: Any) -> Any:
            schedule = self.job.wrap(stock(*passed, **named), self.batch_of)

            def reporting(**named: Any) -> Any:
                outputs = schedule(**named)
                if not named["forward_only"]:
                    for metrics in outputs:
                        metrics |= scalars(self.job.metrics)
                return outputs

            return reporting

        return get_forward_backward_func

    def batch_of(self, call: ScheduleCall) -> StepBatch | None:
        """Return the batch of a pass of the policy; its microbatches get numbers for routes.

        Raises:
            ReplayError: A model without the key is trained.
        """
        if not self.module.get_model_config(call.chunks[0]).moe_enable_routing_replay:
            if call.forward_only:  # a reference
                return None
            raise ReplayError(
                "the policy trains without replay",
                expected="trainer.policy.megatron_config.moe_enable_routing_replay=true",
                got="false",
                fix="Set it, or unset ROUTING_REPLAY_MODE",
            )
        iterator = call.data_iterator
        micro_batches = list(copy.copy(iterator[0] if isinstance(iterator, list) else iterator))
        tokens, routed = [], []
        for micro in micro_batches:
            tokens += of_padded(micro["sequences"], micro["attention_mask"])
            if micro[ROUTES] is not None:
                routed += _routes(micro)
        batch = StepBatch(tokens, routed or None, missing=MISSING)
        if routed or self.job.settings.mode == "R2":
            self._number(micro_batches, batch.numbers())
        return batch

    def _number(self, micro_batches: list[dict[str, Any]], numbers: list[torch.Tensor]) -> None:
        packed, first = self.module.PackedTensor, 0
        for micro in micro_batches:
            own = numbers[first : first + len(micro["sequences"])]
            first += len(own)
            micro[ROUTES] = packed.from_segments([rows[:, None, None] for rows in own])
            if micro.get(WITHOUT) is None:  # R2 without capture
                micro[WITHOUT] = micro["attention_mask"] == 0

    def announce(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Lay the numbers out by SkyRL's own functions, where it would set up its replay."""
        own: Any = sys.modules[stock.__module__]

        def setup_per_microbatch_replay_forward(
            rollout_expert_indices: Any,
            router_padding_mask: torch.Tensor,
            attention_mask: torch.Tensor,
            *,
            model: Any,
            model_config: Any,
            metadata_layout: Any,
            **unused: Any,
        ) -> dict[str, Any]:
            numbers = own.align_packed_token_metadata(rollout_expert_indices, metadata_layout, 0)
            self.job.enter(numbers[..., 0, 0])
            mask = own.align_token_metadata(router_padding_mask.bool(), metadata_layout, True)
            mask = own.scatter_router_padding_mask_for_model(mask, model, model_config)
            return {"padding_mask": mask}

        return setup_per_microbatch_replay_forward


def _routes(micro: dict[str, Any]) -> list[Any]:
    """Routes of each sequence; SkyRL's dummy rows become rows without routes."""
    masks = of_padded(micro[WITHOUT], micro["attention_mask"])
    routed = [as_array(micro[ROUTES].segment(i)).astype("int32") for i in range(len(masks))]
    for ids_TLK, without_T in zip(routed, masks, strict=True):
        ids_TLK[without_T.astype(bool)] = MISSING
    return routed
