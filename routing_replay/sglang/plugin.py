"""The entry point of the group `sglang.srt.plugins`: SGLang calls `register` in each process."""

from __future__ import annotations

from . import cpu
from .settings import OURS, CaptureSettings


def register() -> None:
    """Hook the capture into this process of a server; nothing is patched on disk.

    A server that was not started with `--enable-return-routed-experts` creates no capturer, and
    every hook is then a plain call of what it hooks.

    Raises:
        ConfigError: Settings in the environment that cannot be.
    """
    cpu.enable_cpu()
    if CaptureSettings.from_environment().level not in OURS:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from .capturer import Capturer

    for target, hook, kind in (
        ("state_capturer.routed_experts.RoutedExpertsCapturer", Capturer, HookType.REPLACE),
        ("layers.moe.topk._post_process_topk_ids", _with_logits, HookType.AROUND),
        (f"{PROCESSOR}._maybe_collect_routed_experts", _collect, HookType.AROUND),
        (f"{PROCESSOR}.process_batch_result_prefill", _before_prefill_result, HookType.BEFORE),
        ("managers.schedule_batch.release_req", _before_release, HookType.BEFORE),
    ):
        HookRegistry.register(f"sglang.srt.{target}", hook, kind)


PROCESSOR = "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"


def _capturer():
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    return get_global_experts_capturer()


def _with_logits(post_process, *arguments, **named):
    capturer = _capturer()
    if capturer is None:
        return post_process(*arguments, **named)
    # SGLang names its arguments here in every version; their order is not the same in all.
    with capturer.routing(named["router_logits"], named["topk_config"]):
        return post_process(*arguments, **named)


def _collect(stock, processor, req) -> None:
    from .rows import collect

    capturer = _capturer()
    if capturer is not None and req.return_routed_experts:
        req.routed_experts = collect(capturer, req, processor.req_to_token_pool)


def _before_prefill_result(processor, batch, result) -> None:
    from .rows import keep_prefill

    if _capturer() is not None:
        keep_prefill(batch, result)


def _before_release(*, req, req_to_token_pool, **others) -> None:
    from .rows import keep_retracted

    capturer = _capturer()
    if capturer is not None:
        keep_retracted(capturer, req, req_to_token_pool)
