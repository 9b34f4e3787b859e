"""Check SGLang's own source for everything that the plugin hooks, without importing it.

    python -m routing_replay.sglang.sources FOLDER...

Each folder holds one unpacked wheel of SGLang. So a version can be checked that is not installed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from . import versions

# What `Capturer.route` reads of a call.
ROUTER_ARGUMENTS = ("topk_config", "topk_weights", "router_logits")


def check_sources(root: Path, version: tuple[int, ...]) -> list[str]:
    """Return what the plugin would miss in one SGLang; nothing if it is supported.

    Args:
        root: The folder that contains `sglang/`.
        version: Its release numbers, for the differences in `versions`.
    """
    folder, targets = root / "sglang" / "srt", versions.targets_of(version)
    problems = []
    for target, parameters in _wanted(targets).items():
        node = _find(folder, target.split("."))
        if node is None:
            problems.append(f"{target} does not exist")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            missing = set(parameters) - set(_parameters(node))
            problems += [f"{target} has no parameter {name}" for name in sorted(missing)]
    return problems + list(_bad_calls(folder, targets.router))


def _wanted(targets: versions.Targets) -> dict[str, tuple[str, ...]]:
    """Return the parameters that each target must have."""
    capturer = targets.capturer
    is_method = targets.release.endswith("ScheduleBatch.release_req")
    wanted: dict[str, tuple[str, ...]] = {
        capturer: (),
        f"{capturer}.create": ("model_config",),
        f"{capturer}.__init__": ("model_config", "num_tokens"),
        f"{capturer}.capture": ("layer_id", "topk_indices"),
        "state_capturer.base.BaseTopkCapturer.on_forward_end": (
            *("forward_batch", "can_run_graph", "cuda_graph_batch", "no_copy_to_cpu"),
        ),
        "state_capturer.base.TopkCaptureOutput.finalize": (),
        targets.router: ("topk_ids", "layer_id", *ROUTER_ARGUMENTS),
        targets.collect: ("req",),
        targets.prefill_result: ("batch", "result"),
        targets.release: ("idx",) if is_method else ("req", "req_to_token_pool"),
        **dict.fromkeys(targets.updates, ("recv_req",)),
        "managers.schedule_batch.Req.output_ids_through_stop": (),
        "plugins.hook_registry.HookRegistry.register": ("target", "hook", "hook_type"),
    }
    if targets.rename is not None:
        wanted[targets.rename] = ("recv_req",)
    optional: dict[str | None, tuple[str, ...]] = {
        targets.output: ("reqs",),
        targets.to_host: ("device_indices",),
        targets.from_host: ("host_indices",),
        targets.accept: ("batch", "accept_index"),
        targets.ngram: ("batch",),
        targets.prefilled_for_another: ("batch", "result"),
        targets.transfer: (),
        targets.transferred_result: ("batch",),
    }
    stages = (
        ("mb_id", "pp_proxy_tensors", "mb_metadata"),
        ("result",),
        ("mb_metadata", "pp_outputs"),
    )
    optional |= dict(zip(targets.stages, stages, strict=False))
    wanted |= {target: names for target, names in optional.items() if target is not None}
    return wanted


def _bad_calls(folder: Path, target: str) -> Iterator[str]:
    """Name the calls of the router's function that hide an argument which the capture reads."""
    node, function = _find(folder, target.split(".")), target.rsplit(".", 1)[1]
    if not isinstance(node, ast.FunctionDef):
        return
    parameters = _parameters(node)
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        calls = ast.walk(ast.parse(text)) if f"{function}(" in text else ()
        for call in calls:
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) == function:
                passed = {*parameters[: len(call.args)], *(k.arg for k in call.keywords)}
                hides_names = any(isinstance(a, ast.Starred) for a in call.args)
                missing = set(ROUTER_ARGUMENTS) - (set() if hides_names else passed)
                if missing:
                    where = f"{path.relative_to(folder)}:{call.lineno}"
                    yield f"{where} calls {function} without {', '.join(sorted(missing))}"


def _find(folder: Path, parts: list[str]) -> ast.AST | None:
    """Return the syntax node of a dotted name below a folder."""
    for depth in range(len(parts), 0, -1):
        path = folder.joinpath(*parts[:depth]).with_suffix(".py")
        if path.is_file():
            node: ast.AST | None = ast.parse(path.read_text(encoding="utf-8"))
            for name in parts[depth:]:
                children = getattr(node, "body", ())
                node = next((n for n in children if getattr(n, "name", None) == name), None)
            return node
    return None


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = node.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def main(folders: list[str]) -> int:
    """Print one line for each folder; return how many are not as the plugin expects."""
    num_bad = 0
    for folder in folders:
        (info,) = Path(folder).glob("sglang-*.dist-info")
        version = versions.parse(info.name.split("-")[1].removesuffix(".dist"))
        problems = check_sources(Path(folder), version)
        num_bad += bool(problems)
        print(".".join(map(str, version)), "; ".join(problems) or "ok")
    return num_bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
