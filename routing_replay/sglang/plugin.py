"""The entry point of the group `sglang.srt.plugins`: SGLang calls `register` in each process."""

from __future__ import annotations

from ..capture import OURS, CaptureSettings
from . import cpu, versions

CAPTURER = "state_capturer.routed_experts.RoutedExpertsCapturer"
ROUTER = "layers.moe.topk._post_process_topk_ids"


def register() -> None:
    """Hook the capture into this process of a server; nothing is patched on disk.

    A server that was not started with `--enable-return-routed-experts` creates no capturer, and
    every hook is then a plain call of what it hooks.

    Raises:
        ConfigError: Settings in the environment that cannot be.
        ServerError: An SGLang of an unknown version.
    """
    cpu.enable_cpu()
    if CaptureSettings.from_environment().level not in OURS:
        return
    versions.installed()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from .capturer import Capturer

    HookRegistry.register(_full(CAPTURER), Capturer, HookType.REPLACE)
    for target, hook in _hooks().items():
        HookRegistry.register(target, hook, HookType.AROUND)


def targets() -> list[str]:
    """Everything that must be hooked for the rows to be true."""
    return [_full(CAPTURER), *_hooks()]


def _hooks() -> dict:
    found = versions.targets_of(versions.installed())
    # Ids alone are what stock captures: the model's forward then stays as it is.
    has_gates = CaptureSettings.from_environment().has_gates
    hooks = {
        ROUTER if has_gates else None: _route,
        found.collect: _collect,
        found.prefill_result: _process_prefill,
        found.release: _release,
        found.rename: _rename_weights,
        found.output: _output,
        **dict.fromkeys(found.updates, _update_weights),
    }
    return {_full(target): hook for target, hook in hooks.items() if target is not None}


def _full(target: str) -> str:
    return f"sglang.srt.{target}"


def _capturer():
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    return get_global_experts_capturer()


def _route(stock, *arguments, **named):
    capturer = _capturer()
    if capturer is None:
        return stock(*arguments, **named)
    return capturer.route(stock, *arguments, **named)


def _collect(stock, scheduler, req):
    from .rows import collect

    capturer = _capturer()
    if capturer is not None and req.return_routed_experts:
        req.routed_experts = collect(capturer, req, scheduler.req_to_token_pool)


def _process_prefill(stock, scheduler, batch, result, *arguments, **named):
    from .rows import keep_prefill

    if _capturer() is not None:
        keep_prefill(batch, result)
    return stock(scheduler, batch, result, *arguments, **named)


def _release(stock, *arguments, **named):
    from .rows import keep_retracted

    capturer = _capturer()
    if capturer is not None:
        keep_retracted(capturer, *versions.released(*arguments, **named))
    return stock(*arguments, **named)


def _update_weights(stock, owner, recv_req, *arguments, **named):
    from .gates import parse_version

    capturer = _capturer()
    # Until the update has succeeded under a name, nobody can name the weights.
    if capturer is not None:
        capturer.weight_version = parse_version(None)
    result = stock(owner, recv_req, *arguments, **named)
    if capturer is not None and result.success:
        capturer.weight_version = parse_version(recv_req.weight_version)
    return result


def _rename_weights(stock, scheduler, recv_req):
    from .gates import parse_version

    capturer = _capturer()
    if capturer is not None:
        capturer.weight_version = parse_version(recv_req.new_version)
    return stock(scheduler, recv_req)


def _output(stock, scheduler, reqs, *arguments, **named):
    """SGLang 0.5.12: let every request of a mixed batch take its place in the list of routes."""
    others = [req for req in reqs if not req.return_routed_experts]
    if len(others) == len(reqs):
        return stock(scheduler, reqs, *arguments, **named)
    try:
        for req in others:
            req.return_routed_experts = True
        return stock(scheduler, reqs, *arguments, **named)
    finally:
        for req in others:
            req.return_routed_experts = False
