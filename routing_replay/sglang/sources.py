"""Checks SGLang's own source for everything the plugin hooks, without importing it.

    python -m routing_replay.sglang.sources FOLDER...

Each folder holds one unpacked wheel of SGLang. So a version can be checked that is not installed.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from . import versions
from .plugin import CAPTURER, ROUTER


def check_sources(root: Path, version: tuple[int, ...]) -> list[str]:
    """What the plugin would miss in one SGLang; nothing, if it is supported.

    Args:
        root: The folder that contains `sglang/`.
        version: Its version, for the gates in `versions`.
    """
    found = versions.targets_of(version)
    wanted = {
        CAPTURER: (),
        f"{CAPTURER}.create": ("model_config",),
        f"{CAPTURER}.__init__": ("model_config", "num_tokens"),
        f"{CAPTURER}.capture": ("layer_id", "topk_indices"),
        "state_capturer.base.BaseTopkCapturer.on_forward_end": (
            *("forward_batch", "can_run_graph", "cuda_graph_batch", "no_copy_to_cpu"),
        ),
        "state_capturer.base.TopkCaptureOutput.finalize": (),
        ROUTER: ("topk_ids", "topk_config", "router_logits", "layer_id"),
        found.collect: ("req",),
        found.prefill_result: ("batch", "result"),
        found.release: ("req", "req_to_token_pool")
        if not found.release.endswith("ScheduleBatch.release_req")
        else ("idx",),
        found.rename: ("recv_req",),
        found.output: ("reqs",),
        **dict.fromkeys(found.updates, ("recv_req",)),
        "managers.schedule_batch.Req.output_ids_through_stop": (),
        "plugins.hook_registry.HookRegistry.register": ("target", "hook", "hook_type"),
    }
    problems = []
    for target, parameters in wanted.items():
        if target is None:
            continue
        node = _find(root / "sglang" / "srt", target.split("."))
        if node is None:
            problems.append(f"{target} does not exist")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            missing = set(parameters) - _parameters(node)
            problems += [f"{target} has no parameter {name}" for name in sorted(missing)]
    return problems


def _find(folder: Path, parts: list[str]):
    """The syntax node of a dotted name below a folder."""
    for depth in range(len(parts), 0, -1):
        path = folder.joinpath(*parts[:depth]).with_suffix(".py")
        if path.is_file():
            node = ast.parse(path.read_text(encoding="utf-8"))
            for name in parts[depth:]:
                node = next((n for n in node.body if getattr(n, "name", None) == name), None)
                if node is None:
                    return None
            return node
    return None


def _parameters(node: ast.FunctionDef) -> set[str]:
    arguments = node.args
    return {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


def main(folders: list[str]) -> int:
    """Print one line for each folder; returns how many are not as the plugin expects."""
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
