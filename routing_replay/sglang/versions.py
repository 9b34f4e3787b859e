"""Where SGLang's versions differ, one small function each with the versions it covers.

Everything else the plugin touches is the same from 0.5.12 to 0.5.23.
"""

from __future__ import annotations

from ..errors import ServerError

HOOKED = {
    "sglang.srt.state_capturer.routed_experts.RoutedExpertsCapturer",
    "sglang.srt.layers.moe.topk._post_process_topk_ids",
    "sglang.srt.managers.scheduler_components.batch_result_processor"
    ".SchedulerBatchResultProcessor._maybe_collect_routed_experts",
    "sglang.srt.managers.scheduler_components.batch_result_processor"
    ".SchedulerBatchResultProcessor.process_batch_result_prefill",
    "sglang.srt.managers.schedule_batch.release_req",
}


def check_hooks() -> None:
    """SGLang logs a hook that it could not apply, and serves without it; we do not.

    Raises:
        ServerError: A hook is missing.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = sorted(HOOKED - HookRegistry._patched)
    if missing:
        raise ServerError(
            "the capture could not be hooked into this SGLang",
            expected="all hooks applied",
            got=f"missing {', '.join(missing)}",
            fix="See the supported versions in docs/capture.md",
        )


def weight_version() -> int:
    """Version of the weights in use; -1 if it is no number, or nobody named it."""
    from sglang.srt.runtime_context import get_serving

    try:
        return int(get_serving().weight_version)
    except (TypeError, ValueError):
        return -1


def req_pool_index(req) -> int | None:
    """Row of the request in `req_to_token`; None if it holds no slots."""
    return req.kv.req_pool_idx
