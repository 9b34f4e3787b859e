"""Where SGLang's versions differ: one small function each, with the versions it covers.

Everything else the plugin touches is the same from 0.5.12 to 0.5.23.
"""

from __future__ import annotations

import functools
from importlib import metadata

from ..errors import ServerError

OLDEST, TESTED = (0, 5, 12), (0, 5, 23)
PROCESSOR = "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
UPDATER = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
UPDATES = ("disk", "distributed", "tensor", "ipc")


@functools.cache
def version() -> tuple[int, ...]:
    """The installed SGLang's version, without suffixes."""
    numbers = metadata.version("sglang").split("+")[0].split(".")[:3]
    return tuple(int("".join(c for c in number if c.isdigit()) or 0) for number in numbers)


def check_version() -> None:
    """Raise ServerError for versions whose seams are unknown or absent."""
    if not OLDEST <= version() < (0, 6):
        raise ServerError(
            "an SGLang that the capture does not know",
            expected="0.5.12 to 0.5.x",
            got=".".join(map(str, version())),
            fix="See the supported versions in docs/capture.md",
        )


def collect_target() -> str:
    """The method that fills a finished request's routes. Its class came in 0.5.13."""
    if version() < (0, 5, 13):
        return (
            "managers.scheduler_output_processor_mixin.SchedulerOutputProcessorMixin"
            ".maybe_collect_routed_experts"
        )
    return f"{PROCESSOR}._maybe_collect_routed_experts"


def prefill_result_target() -> str:
    """The method that processes the result of a prefill. Its class came in 0.5.13."""
    if version() < (0, 5, 13):
        return (
            "managers.scheduler_output_processor_mixin.SchedulerOutputProcessorMixin"
            ".process_batch_result_prefill"
        )
    return f"{PROCESSOR}.process_batch_result_prefill"


def release_target() -> str:
    """What takes a retracted request's slots away. A function since 0.5.13, a method before."""
    if version() < (0, 5, 13):
        return "managers.schedule_batch.ScheduleBatch.release_req"
    return "managers.schedule_batch.release_req"


def released(*arguments, **named):
    """The request and the pool in the arguments of `release_target`."""
    if "req" in named:
        return named["req"], named["req_to_token_pool"]
    batch, index = arguments[:2] if len(arguments) > 1 else (arguments[0], named["idx"])
    return batch.reqs[index], batch.req_to_token_pool


def update_targets() -> list[str]:
    """The methods that change the weights. Their class came in 0.5.13."""
    owner = UPDATER
    if version() < (0, 5, 13):
        owner = "managers.scheduler_update_weights_mixin.SchedulerUpdateWeightsMixin"
    return [f"{owner}.update_weights_from_{source}" for source in UPDATES]


def rename_target() -> str | None:
    """The method that renames the weights without changing them; known since 0.5.19."""
    if version() < (0, 5, 19):
        return None
    return "managers.scheduler.Scheduler.handle_update_weight_version"


def output_target() -> str | None:
    """0.5.12 lists the routes of opted-in requests only and so shifts them in a mixed batch."""
    if version() < (0, 5, 13):
        return (
            "managers.scheduler_output_processor_mixin.SchedulerOutputProcessorMixin"
            ".stream_output_generation"
        )
    return None


def server_args():
    """The server's arguments. Their accessor moved in 0.5.15."""
    if version() < (0, 5, 15):
        from sglang.srt.server_args import get_global_server_args

        return get_global_server_args()
    from sglang.srt.runtime_context import get_server_args

    return get_server_args()


def req_pool_index(req) -> int | None:
    """Row of the request in `req_to_token`, None without slots. In `req.kv` since 0.5.19."""
    return req.req_pool_idx if version() < (0, 5, 19) else req.kv.req_pool_idx


def check_hooks(targets) -> None:
    """SGLang logs a hook that it could not apply, and serves without it; we do not.

    Raises:
        ServerError: A hook is missing.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = sorted(set(targets) - HookRegistry._patched)
    if missing:
        raise ServerError(
            "the capture could not be hooked into this SGLang",
            expected="all hooks applied",
            got=f"missing {', '.join(missing)}",
            fix="See the supported versions in docs/capture.md",
        )
