"""Routing replay in NeMo-RL's Megatron policy worker, by variables and one key of its own:

    RAY_RUNTIME_ENV_HOOK=routing_replay.adapters.ray.runtime_env_hook ROUTING_REPLAY_MODE=R3 \
        uv run examples/run_grpo.py ... ++policy.router_replay.enabled=true

The key stays on: it carries the routes, and says which passes replay. NeMo-RL packs, pads and
slices them with the tokens; row numbers take their place, so its own replay never runs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from megatron.core import parallel_state

from ..errors import ReplayError
from ..metrics.sinks import scalars
from . import contracts
from .batch import StepBatch
from .job import Job, ScheduleCall
from .patches import rebind
from .settings import AdapterSettings

ROUTES = "routed_experts"
MISSING = -1  # NeMo-RL's id for a token without a route


class _Worker:
    """The one policy of a worker process."""

    def __init__(self) -> None:
        contracts.require("nemo-rl")
        self.job = Job(AdapterSettings.from_environment(mode="disabled"), "NeMo-RL")
        self._batch: StepBatch | None = None

    def take_routes(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Replace the routes of a data-parallel rank's batch by the numbers of their rows."""

        def get_microbatch_iterator(data: Any, *passed: Any, **named: Any) -> Any:
            self._batch = None
            if ROUTES in data:
                lengths = data["input_lengths"].tolist()
                routed = [ids[:n] for ids, n in zip(data[ROUTES], lengths, strict=True)]
                tokens = [ids[:n] for ids, n in zip(data["input_ids"], lengths, strict=True)]
                self._batch = StepBatch(tokens, routed, missing=MISSING)
                data = copy.copy(data)
                data[ROUTES] = _padded(self._batch.numbers(), data["input_ids"])[..., None, None]
            return stock(data, *passed, **named)

        return get_microbatch_iterator

    def batch_of(self, call: ScheduleCall) -> StepBatch | None:
        """Return the batch unless the pass is a reference's.

        Raises:
            ReplayError: A pass that replays got no routes.
        """
        if not getattr(call.forward_step_func, "keywords", {}).get("use_router_replay"):
            return None
        if self._batch is None:
            raise ReplayError(
                "a batch of the actor has no routes: its tokens would route live, unnoticed",
                expected=f"{ROUTES} in the batch, in mode R2 too: it says which passes replay",
                got="none",
                fix="Leave policy.router_replay.enabled on for every rollout",
            )
        return self._batch

    def announce(self, _: Callable[..., Any]) -> Callable[..., Any]:
        def set_router_replay_forward(model: Any, routed_experts: torch.Tensor) -> None:
            self.job.enter(routed_experts[..., 0, 0])

        return set_router_replay_forward

    def report(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Add the metrics to those of the last microbatch: NeMo-RL sums them over all of them."""

        def get_forward_backward_func(*passed: Any, **named: Any) -> Any:
            schedule = self.job.wrap(stock(*passed, **named), self.batch_of)

            def reported(**arguments: Any) -> Any:
                results = schedule(**arguments)
                is_first = parallel_state.get_data_parallel_rank() == 0
                if not arguments.get("forward_only") and results and is_first:
                    results[-1] |= scalars(self.job.metrics)
                return results

            return reported

        return get_forward_backward_func


@functools.cache
def _worker() -> _Worker:
    return _Worker()


def patch_worker(module: ModuleType) -> None:
    """Rebind `nemo_rl.models.policy.workers.megatron_policy_worker`."""
    if AdapterSettings.from_environment(mode="disabled").is_enabled:
        rebind(module, "get_microbatch_iterator", _worker().take_routes, ("data",))


def patch_train(module: ModuleType) -> None:
    """Rebind `nemo_rl.models.megatron.train`."""
    if AdapterSettings.from_environment(mode="disabled").is_enabled:
        rebind(module, "get_forward_backward_func", _worker().report)
        rebind(module, "set_router_replay_forward", _worker().announce, ("model", ROUTES))
        for name in ("set_router_replay_backward", "clear_router_replay"):
            rebind(module, name, lambda _: lambda model=None: None)


def _padded(numbers: list[torch.Tensor], like_BS: torch.Tensor) -> torch.Tensor:
    """Numbers in the shape of a padded batch; 0 pads, as it routes live."""
    numbers_BS = torch.zeros_like(like_BS, dtype=torch.int64)
    for row_S, part in zip(numbers_BS, numbers, strict=True):
        row_S[: len(part)] = part.to(row_S.device)
    return numbers_BS
