"""The entry point of the group `sglang.srt.plugins`: SGLang calls `register` in each process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..capture import OURS, CaptureSettings
from ..errors import RoutingReplayError
from . import cpu, versions

Hook = Callable[..., Any]


def register() -> None:
    """Hook the capture into this process of a server; nothing is patched on disk.

    Never raises: SGLang only logs what a plugin raises, and would go on with its own capture. A
    broken setting or an unknown SGLang stops a server when it creates a capturer; one that was not
    started with `--enable-return-routed-experts` creates none, and starts.
    """
    try:
        settings = CaptureSettings.from_environment()
        if settings.level in OURS:
            _replace_capturer(versions.targets_of(versions.installed()), settings)
    except RoutingReplayError as error:
        target = f"{versions.PREFIX}{versions.Targets.capturer}.create"
        _around(target, _refuse(error))
    cpu.enable_cpu()


def _replace_capturer(targets: versions.Targets, settings: CaptureSettings) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from .capturer import Capturer

    HookRegistry.register(versions.PREFIX + targets.capturer, Capturer, HookType.REPLACE)
    hooks: dict[str | None, Hook] = {
        targets.router: _route,
        targets.collect: _collect,
        targets.prefill_result: _process_prefill,
        targets.release: _release,
        targets.rename: _rename_weights,
        targets.output: _output,
        **dict.fromkeys(targets.updates, _update_weights),
    }
    # Ids alone are what stock captures: the model's forward then stays as it is.
    required = targets.required(settings.hooks_routers)
    for name, hook in hooks.items():
        if name is not None and versions.PREFIX + name in required:
            _around(versions.PREFIX + name, hook)


def hook_features(targets: versions.Targets, needed: list[str]) -> None:
    """Hook what the features of this server need: their modules are not loaded without them.

    Args:
        targets: Of the installed version.
        needed: Full names, of `Targets.of_features`.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks: dict[str | None, Hook] = {
        targets.to_host: _save_to_host,
        targets.from_host: _load_from_host,
        targets.accept: _accept_drafts,
        targets.ngram: _keep_output,
        targets.prefilled_for_another: _process_prefill,
        targets.transfer: _prepare_transferred,
        targets.transferred_result: _end_transferred,
        **dict(zip(targets.stages, (_launch_stage, _send_round, _arrive), strict=False)),
    }
    for name, hook in hooks.items():
        if name is not None and versions.PREFIX + name in needed:
            _around(versions.PREFIX + name, hook)
    if needed:
        HookRegistry.apply_hooks()


def _around(target: str, hook: Hook) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(target, hook, HookType.AROUND)


def _refuse(error: RoutingReplayError) -> Hook:
    def create(stock: Hook, *arguments: Any, **named: Any) -> None:
        # SGLang decides whether routes are wanted; each version reads another setting.
        if stock(*arguments, **named) is not None:
            raise error

    return create


def _capturer() -> Any:
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    return get_global_experts_capturer()


def _route(stock: Hook, *arguments: Any, **named: Any) -> Any:
    capturer = _capturer()
    if capturer is None:
        return stock(*arguments, **named)
    return capturer.route(stock, *arguments, **named)


def _collect(stock: Hook, scheduler: Any, req: Any) -> None:
    from .rows import collect, name_output

    capturer = _capturer()
    if capturer is None:
        return
    name_output(capturer, req, scheduler.req_to_token_pool)
    if req.return_routed_experts:
        req.routed_experts = collect(capturer, req, scheduler.req_to_token_pool)


def _process_prefill(
    stock: Hook, scheduler: Any, batch: Any, result: Any, *arguments: Any, **named: Any
) -> Any:
    from .rows import keep_prefill

    if _capturer() is not None:
        keep_prefill(batch, result)
    return stock(scheduler, batch, result, *arguments, **named)


def _release(stock: Hook, *arguments: Any, **named: Any) -> Any:
    from .rows import keep_retracted

    capturer = _capturer()
    if capturer is not None:
        keep_retracted(capturer, *versions.released(*arguments, **named))
    return stock(*arguments, **named)


def _update_weights(stock: Hook, owner: Any, recv_req: Any, *arguments: Any, **named: Any) -> Any:
    from .gates import parse_version

    capturer = _capturer()
    # Until the update has succeeded, the weights have no version.
    if capturer is not None:
        capturer.weight_version = parse_version(None)
    result = stock(owner, recv_req, *arguments, **named)
    if capturer is not None and result.success:
        capturer.weight_version = parse_version(recv_req.weight_version)
    return result


def _rename_weights(stock: Hook, scheduler: Any, recv_req: Any) -> Any:
    from .gates import parse_version

    capturer = _capturer()
    if capturer is not None:
        capturer.weight_version = parse_version(recv_req.new_version)
    return stock(scheduler, recv_req)


def _save_to_host(stock: Hook, controller: Any, *arguments: Any, **named: Any) -> Any:
    host, capturer = stock(controller, *arguments, **named), _capturer()
    if capturer is not None and host is not None:
        device = arguments[0] if arguments else named["device_indices"]
        capturer.save_to_host(controller.mem_pool_host.size, device, host)
    return host


def _load_from_host(stock: Hook, controller: Any, *arguments: Any, **named: Any) -> Any:
    device, capturer = stock(controller, *arguments, **named), _capturer()
    if capturer is not None and device is not None:
        host = arguments[0] if arguments else named["host_indices"]
        capturer.load_from_host(host, device)
    return device


def _accept_drafts(
    stock: Hook, batch: Any, accept_index: Any, *arguments: Any, **named: Any
) -> Any:
    capturer = _capturer()
    if capturer is not None and capturer.last_output is not None:
        capturer.last_output.accept(accept_index)
    return stock(batch, accept_index, *arguments, **named)


def _keep_output(stock: Hook, worker: Any, *arguments: Any, **named: Any) -> Any:
    """The n-gram worker makes a new result and leaves the rows behind."""
    result, capturer = stock(worker, *arguments, **named), _capturer()
    if capturer is not None and result.routed_experts_output is None:
        result.routed_experts_output = capturer.last_output
    return result


def _prepare_transferred(stock: Hook, batch: Any) -> None:
    stock(batch)
    capturer = _capturer()
    if capturer is not None:
        capturer.slots.unname(batch.out_cache_loc.cpu().numpy())


def _end_transferred(stock: Hook, processor: Any, batch: Any) -> None:
    """SGLang sends an answer of the first token alone without rows."""
    for req in batch.reqs:
        req.update_finish_state()  # as it is about to do, to the same effect
        if req.finished():
            processor._maybe_collect_routed_experts(req)
    stock(processor, batch)


def _launch_stage(stock: Hook, scheduler: Any, *arguments: Any) -> Any:
    from . import pipeline

    return pipeline.launch(stock, _capturer(), scheduler, arguments)


def _send_round(stock: Hook, *arguments: Any) -> Any:
    from . import pipeline

    return stock(*arguments) | pipeline.leaving(_capturer())


def _arrive(stock: Hook, scheduler: Any, batch: Any, note: Any, outputs: Any) -> Any:
    from . import pipeline

    result = stock(scheduler, batch, note, outputs)
    pipeline.arrive(_capturer(), note, outputs.tensors, result)
    return result


def _output(stock: Hook, scheduler: Any, reqs: Any, *arguments: Any, **named: Any) -> Any:
    """SGLang 0.5.12: give every request of a mixed batch its place in the list of routes."""
    without_routes = [req for req in reqs if not req.return_routed_experts]
    if len(without_routes) == len(reqs):
        return stock(scheduler, reqs, *arguments, **named)
    try:
        for req in without_routes:
            req.return_routed_experts = True
        return stock(scheduler, reqs, *arguments, **named)
    finally:
        for req in without_routes:
            req.return_routed_experts = False
