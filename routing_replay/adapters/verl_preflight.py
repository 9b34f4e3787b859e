"""Settings of a verl actor under which replay would be wrong: refused before the model is built."""

from __future__ import annotations

from typing import Any

from ..errors import PreflightError


def require_replayable(engine: Any, model: Any) -> None:
    """Raise PreflightError unless an actor of these settings can replay.

    Args:
        engine: verl's `McoreEngineConfig`.
        model: verl's `HFModelConfig`.
    """
    actor, hf_config = "actor_rollout_ref.actor.megatron", model.hf_config
    for is_wrong, what, expected in (
        (
            engine.router_replay.mode != "disabled",
            "verl's own router replay is on: routes would be replayed twice",
            f"{actor}.router_replay.mode=disabled; enable_rollout_routing_replay brings the routes",
        ),
        (
            engine.dynamic_context_parallel,
            "dynamic context parallelism moves sequences between data-parallel ranks",
            f"{actor}.dynamic_context_parallel=False",
        ),
        (
            hasattr(hf_config, "vision_config"),
            "a vision-language model packs its tokens inside the model",
            "a language model",
        ),
        (
            getattr(hf_config, "num_experts_per_tok", 2) == 1,
            "verl fills missing routes with zeros, which is expert 0 to a top-1 model",
            "a model with top-k of 2 or more",
        ),
    ):
        if is_wrong:
            raise PreflightError(what, expected=expected)
