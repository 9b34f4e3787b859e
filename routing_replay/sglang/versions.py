"""Where SGLang's versions differ, each difference with the version that made it.

Everything else the plugin touches is the same from 0.5.12 to 0.5.23 (`sources` checks it).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import metadata

from ..errors import ServerError

OLDEST, UNKNOWN = (0, 5, 12), (0, 6)
PROCESSOR = "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
OLD_PROCESSOR = "managers.scheduler_output_processor_mixin.SchedulerOutputProcessorMixin"
UPDATER = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
OLD_UPDATER = "managers.scheduler_update_weights_mixin.SchedulerUpdateWeightsMixin"


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Dotted names below `sglang.srt` of what is hooked.

    Args:
        collect: Fills a finished request's routes.
        prefill_result: Processes the result of a prefill.
        release: Takes a retracted request's slots away.
        updates: Change the weights.
        rename: Renames the weights without changing them; None where schedulers do not know it.
        output: Lists the routes of a batch; None where it needs no repair.
    """

    collect: str
    prefill_result: str
    release: str
    updates: tuple[str, ...]
    rename: str | None
    output: str | None


def targets_of(version: tuple[int, ...]) -> Targets:
    """What is hooked in a version of SGLang."""
    # 0.5.13 made classes of the scheduler's mixins, and a function of the release.
    is_old = version < (0, 5, 13)
    processor, updater = (OLD_PROCESSOR, OLD_UPDATER) if is_old else (PROCESSOR, UPDATER)
    collect = "maybe_collect_routed_experts" if is_old else "_maybe_collect_routed_experts"
    release = "ScheduleBatch.release_req" if is_old else "release_req"
    sources = ("disk", "distributed", "tensor", "ipc")
    return Targets(
        collect=f"{processor}.{collect}",
        prefill_result=f"{processor}.process_batch_result_prefill",
        release=f"managers.schedule_batch.{release}",
        updates=tuple(f"{updater}.update_weights_from_{source}" for source in sources),
        # Schedulers know the weights' name since 0.5.19.
        rename="managers.scheduler.Scheduler.handle_update_weight_version"
        if version >= (0, 5, 19)
        else None,
        # 0.5.12 lists the routes of opted-in requests only and so shifts them in a mixed batch.
        output=f"{processor}.stream_output_generation" if is_old else None,
    )


def parse(text: str) -> tuple[int, ...]:
    """The three numbers of a version; suffixes (rc1, post1, +cu130) count for nothing here."""
    parts = text.split("+")[0].split(".")[:3]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


@functools.cache
def installed() -> tuple[int, ...]:
    """The version of the installed SGLang.

    Raises:
        ServerError: One whose seams are unknown or absent.
    """
    version = parse(metadata.version("sglang"))
    if not OLDEST <= version < UNKNOWN:
        raise ServerError(
            "an SGLang that the capture does not know",
            expected="0.5.12 to 0.5.x",
            got=metadata.version("sglang"),
            fix="See the supported versions in docs/capture.md",
        )
    return version


def released(*arguments, **named):
    """The request and the pool in the arguments of `Targets.release`, function or method."""
    if "req" in named:
        return named["req"], named["req_to_token_pool"]
    batch = arguments[0]
    index = arguments[1] if len(arguments) > 1 else named["idx"]
    return batch.reqs[index], batch.req_to_token_pool


def server_args():
    """The server's arguments. Their accessor moved in 0.5.15."""
    if installed() < (0, 5, 15):
        from sglang.srt.server_args import get_global_server_args

        return get_global_server_args()
    from sglang.srt.runtime_context import get_server_args

    return get_server_args()


def req_pool_index(req) -> int | None:
    """Row of the request in `req_to_token`, None without slots. In `req.kv` since 0.5.19."""
    if installed() < (0, 5, 19):
        return req.req_pool_idx
    return req.kv.req_pool_idx


def with_own_rows(output):
    """A step's output whose rows the next step cannot overwrite. Copies by itself since 0.5.18.

    Before, they were views of the buffers; a GPU copies them to the host in order, on a CPU the
    "copy" to the host is the buffer itself.
    """
    if installed() < (0, 5, 18) and output.topk.device.type == "cpu":
        output.topk, output.out_cache_loc = output.topk.clone(), output.out_cache_loc.clone()
    return output


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
