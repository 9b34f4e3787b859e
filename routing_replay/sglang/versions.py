"""Where SGLang's versions differ, each difference with the version that made it.

Everything else that the plugin touches is the same from 0.5.12 to 0.5.23 (`sources` checks it).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.version import InvalidVersion, Version

from ..errors import ServerError

OLDEST, UNKNOWN = (0, 5, 12), (0, 6)
PREFIX = "sglang.srt."
PROCESSOR = "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
OLD_PROCESSOR = "managers.scheduler_output_processor_mixin.SchedulerOutputProcessorMixin"
UPDATER = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
HOST_CACHE = "mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController"
# Caches on the host and speculative decoding were read, and tried where a CPU can, in this version.
COVERS_FEATURES = (0, 5, 23)
FEATURE_TARGETS: dict[str, Any] = {
    "to_host": f"{HOST_CACHE}.write",
    "from_host": f"{HOST_CACHE}.load",
    "accept": "speculative.spec_utils.move_accept_tokens_to_target_kvcache",
    "ngram": "speculative.ngram_worker.NGRAMWorker.forward_batch_generation",
    "prefilled_for_another": "disaggregation.prefill.SchedulerDisaggregationPrefillMixin."
    "process_batch_result_disagg_prefill",
    "transfer": "disaggregation.decode_schedule_batch_mixin."
    "ScheduleBatchDisaggregationDecodeMixin.prepare_for_prebuilt",
    "transferred_result": f"{PROCESSOR}.process_batch_result_prebuilt",
    "stages": tuple(
        f"managers.scheduler_pp_mixin.SchedulerPPMixin.{name}"
        for name in ("_pp_launch_batch", "_pp_prepare_tensor_dict", "_pp_prep_batch_result")
    ),
}
OLD_UPDATER = "managers.scheduler_update_weights_mixin.SchedulerUpdateWeightsMixin"


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Dotted names below `sglang.srt` of everything that is hooked.

    Args:
        capturer: The class that our capturer replaces.
        router: Post-processes a layer's selection; hooked where more than ids is captured.
        collect: Fills a finished request's routes.
        prefill_result: Processes the result of a prefill.
        release: Takes a retracted request's slots away.
        updates: Change the weights.
        rename: Renames the weights without changing them; None where schedulers do not know it.
        output: Lists the routes of a batch; None where it needs no repair.
        to_host, from_host: Copy a prefix to the cache on the host and back; None where the server
            is refused instead.
        accept: Moves the accepted drafts of a tree; None as above.
        ngram: Runs a step of the n-gram worker; None as above.
        prefilled_for_another: Processes the result of a prefill that another server goes on with;
            None as above.
        transfer: Makes a batch of requests whose prompts another server has computed; None as
            above.
        transferred_result: Ends those of them that need no pass here; None as above.
        stages: Run a microbatch on a pipeline stage, make what the last stage sends round, and
            make a result of it; none as above.
    """

    capturer: str = "state_capturer.routed_experts.RoutedExpertsCapturer"
    router: str = "layers.moe.topk._post_process_topk_ids"
    collect: str
    prefill_result: str
    release: str
    updates: tuple[str, ...]
    rename: str | None
    output: str | None
    to_host: str | None = None
    from_host: str | None = None
    accept: str | None = None
    ngram: str | None = None
    prefilled_for_another: str | None = None
    transfer: str | None = None
    transferred_result: str | None = None
    stages: tuple[str, ...] = ()

    def required(self, hooks_routers: bool) -> list[str]:
        """Return the full names without which rows would be wrong."""
        names = (self.capturer, self.collect, self.prefill_result, self.release, *self.updates)
        optional = (self.router if hooks_routers else None, self.rename, self.output)
        return [PREFIX + name for name in (*names, *optional) if name is not None]

    def of_features(self, server_args: Any) -> list[str]:
        """Return the full names without which rows would be wrong under the server's features."""
        names: list[str | None] = []
        if getattr(server_args, "enable_hierarchical_cache", False):
            names += [self.to_host, self.from_host]
        algorithm = getattr(server_args, "speculative_algorithm", None)
        if algorithm is not None:
            names.append(self.accept)
        if algorithm == "NGRAM":
            names.append(self.ngram)
        if is_disaggregated(server_args):
            names += [self.prefilled_for_another, self.transfer, self.transferred_result]
        if getattr(server_args, "pp_size", 1) > 1:
            names += self.stages
        return [PREFIX + name for name in names if name is not None]


def targets_of(version: tuple[int, ...]) -> Targets:
    """Return what is hooked in a version of SGLang."""
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
        **(FEATURE_TARGETS if version >= COVERS_FEATURES else {}),
    )


def parse(text: str) -> tuple[int, ...]:
    """Return the release numbers of a version.

    A candidate (0.5.12rc1) has the code of its release, so suffixes are left out instead of
    ordered before it.
    """
    try:
        return Version(text).release
    except InvalidVersion as error:
        raise ServerError("the version of SGLang is not a version", got=repr(text)) from error


@functools.cache
def installed() -> tuple[int, ...]:
    """Return the release numbers of the installed SGLang.

    Raises:
        ServerError: SGLang has no metadata, or its hook targets are unknown.
    """
    try:
        text = metadata.version("sglang")
    except metadata.PackageNotFoundError as error:
        raise ServerError(
            "SGLang has no package metadata", fix="Install it with pip, not by PYTHONPATH alone"
        ) from error
    version = parse(text)
    if not OLDEST <= version < UNKNOWN:
        raise ServerError(
            "the capture does not know this SGLang",
            expected="0.5.12 to 0.5.x",
            got=text,
            fix="See the supported versions in docs/capture.md, or start the server with "
            "ROUTING_REPLAY_CAPTURE=stock for SGLang's own capture",
        )
    return version


def released(*arguments: Any, **named: Any) -> tuple[Any, Any]:
    """Return the request and the pool in the arguments of `Targets.release`."""
    if "req" in named:
        return named["req"], named["req_to_token_pool"]
    batch = arguments[0]
    index = arguments[1] if len(arguments) > 1 else named["idx"]
    return batch.reqs[index], batch.req_to_token_pool


def server_args() -> Any:
    """Return the server's arguments. Their accessor moved in 0.5.15."""
    if installed() < (0, 5, 15):
        from sglang.srt.server_args import get_global_server_args

        return get_global_server_args()
    from sglang.srt.runtime_context import get_server_args

    return get_server_args()


def is_disaggregated(server_args: Any) -> bool:
    """Return whether the server only prefills or only decodes; it may change its role."""
    return getattr(server_args, "disaggregation_mode", None) not in (None, "null")


def has_compiled_prefill(server_args: Any) -> bool:
    """Return whether prefill graphs are made by torch.compile, which would trace our hooks.

    Some versions since 0.5.14 name it as the backend "tc_piecewise"; before, it was the default.
    """
    config = getattr(server_args, "cuda_graph_config", None)
    if config is not None:
        return bool(config.prefill.backend == "tc_piecewise")
    return not getattr(server_args, "disable_piecewise_cuda_graph", True)


def req_pool_index(req: Any) -> Any:
    """Return the request's row of `req_to_token`, None without slots. In `req.kv` since 0.5.19."""
    if installed() < (0, 5, 19):
        return req.req_pool_idx
    return req.kv.req_pool_idx


def num_committed(req: Any) -> int:
    """Return how many tokens' KV the request shares when it ends. In `req.kv` since 0.5.19."""
    holder = req if installed() < (0, 5, 19) else req.kv
    return int(getattr(holder, "kv_committed_len", 0))


def with_own_rows(output: Any) -> Any:
    """Return a step's output whose rows the next step cannot overwrite.

    SGLang copies them by itself since 0.5.18. Before, they were views of the buffers; a GPU copies
    them to the host in order, on a CPU the "copy" to the host is the buffer itself.
    """
    if installed() < (0, 5, 18) and output.topk.device.type == "cpu":
        output.topk, output.out_cache_loc = output.topk.clone(), output.out_cache_loc.clone()
    return output


def check_hooks(targets: Iterable[str]) -> None:
    """Raise for a hook that SGLang could not apply: it logs that, and would serve without it.

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
