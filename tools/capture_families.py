"""Write docs/capture_families.md: which models of an SGLang report routes, read from its sources.

    python -m tools.capture_families [FOLDER]

FOLDER contains `sglang/`; the installed one by default. Nothing of SGLang is imported.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path

from routing_replay.sglang.refusals import IN_KERNEL_BACKENDS

PAGE = Path(__file__).parents[1] / "docs" / "capture_families.md"
PREFIX = "sglang.srt.models."
ROUTERS = ("TopK", "HashTopK")
# Draft models never write the rows of their target.
DRAFT_ENDINGS = ("NextN", "MTP", "Eagle", "Eagle3", "DraftModel")
INTRODUCTION = """\
# Model families

Which models of SGLang {version} report their routes, read from its sources by
`python -m tools.capture_families`. "Run": on a CPU, with rows compared with transformers.

A model reports where its MoE layers select with SGLang's `TopK` module. It then reports ids. Gates
and logits need the router's logits and a known score function, which a router with a function of
its own does not give. A model without `TopK`, and one in which two routers have one layer number,
are refused when the server starts.

For some models SGLang chooses a MoE runner by itself that routes inside its kernel, on some GPUs or
with some quantizations. The server is then refused at its start, with the runner's name. Where the
weights allow it, `--moe-runner-backend triton` or `flashinfer_trtllm_routed` reports.

| architecture | reports | routers | known by | runners without reports that it may choose |
| --- | --- | --- | --- | --- |
"""
# `tests/test_sglang_*.py` compare their rows.
WERE_RUN = (
    *("Glm4MoeForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM", "Qwen3MoeForCausalLM"),
)


@dataclass(kw_only=True, eq=False)
class Class:
    """A class of a model file: the names that its body uses, and the routers that it builds."""

    names: set[str] = field(default_factory=set)
    routers: list[ast.Call] = field(default_factory=list)


@dataclass(kw_only=True, eq=False)
class Module:
    """A model file: its classes, what it imports from other model files, and those files."""

    classes: dict[str, Class]
    imports: dict[str, tuple[str, str]]
    files: list[str]
    entries: list[str]


def read_module(path: Path) -> Module:
    """Return the classes, imports and entry classes of a model file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = Module(classes={}, imports={}, files=[], entries=[])
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            module.classes[node.name] = _read_class(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PREFIX):
            source = (node.module or "").removeprefix(PREFIX)
            for alias in node.names:
                module.imports[alias.asname or alias.name] = (source, alias.name)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith(PREFIX)]
            module.files += [name.removeprefix(PREFIX) for name in names]
        elif isinstance(node, ast.Assign) and "EntryClass" in map(_name, node.targets):
            module.entries += [n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)]
    return module


def _read_class(node: ast.ClassDef) -> Class:
    result = Class()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            result.names.add(inner.id)
        elif isinstance(inner, ast.Attribute):
            result.names.add(inner.attr)
        elif isinstance(inner, ast.Call) and _name(inner.func) in ROUTERS:
            result.routers.append(inner)
    return result


def _name(node: ast.expr) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def routers_of(modules: dict[str, Module], source: str, name: str) -> Iterator[ast.Call]:
    """Yield the routers that a class builds, by itself or through the classes that it names."""
    waiting, seen = [(source, name)], set()
    while waiting:
        source, name = waiting.pop()
        module = modules.get(source)
        if module is None or (source, name) in seen:
            continue
        seen.add((source, name))
        if name in module.imports:
            waiting.append(module.imports[name])
        elif name in module.classes:
            yield from module.classes[name].routers
            waiting += [(source, used) for used in sorted(module.classes[name].names)]
        else:
            waiting += [(file, name) for file in module.files]


def describe(routers: Sequence[ast.Call]) -> tuple[str, str]:
    """Return what a model with these routers reports, and how they select."""
    selecting = [call for call in routers if _name(call.func) == "TopK"]
    arguments = [{k.arg: ast.unparse(k.value) for k in call.keywords} for call in selecting]
    has_own = any(a.get("custom_routing_function", "None") != "None" for a in arguments)
    traits = ["its own function" if has_own else "", "grouped" if _is_grouped(arguments) else ""]
    traits.append("bias" if any("correction_bias" in a for a in arguments) else "")
    if len(selecting) < len(routers):
        traits.append("hash-routed layers, if any, never report")
    reports = "ids" if has_own else "ids, gates, logits"
    return reports, ", ".join(trait for trait in traits if trait) or "plain"


def _is_grouped(arguments: Sequence[dict[str | None, str]]) -> bool:
    return any(a.get("use_grouped_topk", "False") not in ("False", "None") for a in arguments)


def silent_runners(folder: Path) -> dict[str, list[str]]:
    """Return by architecture the runners without reports that SGLang's own choices name.

    Args:
        folder: `sglang/srt/arg_groups/model_overrides`: a file names its architectures in a
            decorator, and values of arguments in its functions.
    """
    runners: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        decorators = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and _name(node.func) == "_register_for"
        ]
        named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        for constant in [c for decorator in decorators for c in decorator.args]:
            if isinstance(constant, ast.Constant):
                runners[str(constant.value)] = [r for r in IN_KERNEL_BACKENDS if r in named]
    return runners


def page(folder: Path, version: str) -> str:
    """Return the page for the SGLang in a folder."""
    silent = silent_runners(folder / "sglang" / "srt" / "arg_groups" / "model_overrides")
    paths = sorted((folder / "sglang" / "srt" / "models").glob("*.py"))
    modules = {path.stem: read_module(path) for path in paths}
    rows = []
    for source, module in modules.items():
        for entry in module.entries:
            if entry.endswith(DRAFT_ENDINGS):
                continue
            routers = list(routers_of(modules, source, entry))
            if routers:
                reports, traits = describe(routers)
                known_by = "run" if entry in WERE_RUN else "read"
                runners = ", ".join(silent.get(entry, []))
                rows.append(f"| {entry} | {reports} | {traits} | {known_by} | {runners} |")
    return INTRODUCTION.format(version=version) + "\n".join(sorted(set(rows))) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="contains sglang/")
    folder = parser.parse_args(arguments).folder
    installed = distribution("sglang") if folder is None else None
    if installed is not None:
        folder, version = Path(str(installed.locate_file(""))), installed.version
    else:
        (info,) = folder.glob("sglang-*.dist-info")
        version = info.name.split("-")[1].removesuffix(".dist")
    PAGE.write_text(page(folder, version), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
