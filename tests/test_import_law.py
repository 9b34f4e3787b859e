"""The import law of docs/architecture.md, enforced on the syntax tree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE_LIBRARIES = {"torch", "numpy", "safetensors"}
# Low to high; a module imports only modules before it, or itself for a package.
RANKS = [
    "errors",
    "metrics",
    "routes",
    "payload_text",
    "engine_payloads",
    "payload",
    "table_file",
    "table",
    "config",
    "policy_kl",
    "logprobs",
    "agreement",
    "objectives",
    "telemetry",
    "rollout_batch",
    "explanation",
    "differences",
    "inspection",
    "comparison",
    "spool",
    "conversion",
    "attribution",
    "doctor",
    "report_data",
    "report_findings",
    "report_charts",
    "report_sections",
    "report",
    "cli",
]


def imports(path):
    """(module, is_lazy) of every import in a file, relative ones resolved."""
    tree = ast.parse(path.read_text())
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in lazy
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if node.level and not node.module or module == "routing_replay":
                for alias in node.names:
                    yield f"{module}.{alias.name}", id(node) in lazy
            else:
                yield module, id(node) in lazy


def rank_of(module):
    return RANKS.index(module.split(".")[1])


def violations(path, found):
    """What a file may not import."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    area = parts[1] if len(parts) > 2 else "core"
    for module, is_lazy in found:
        top = module.split(".")[0]
        if top in ("recipes", "tools", "tests"):
            yield f"{path.name}: imports {module}"
        if top == "routing_replay" and len(module.split(".")) > 1:
            target = module.split(".")[1]
            if target == "__version__":
                continue
            if area in ("megatron", "sglang"):
                other = {"megatron": "sglang", "sglang": "megatron"}[area]
                if target == other:
                    yield f"{path.name}: {area}/ imports {module}"
            elif target in ("megatron", "sglang"):
                if not is_lazy:
                    yield f"{path.name}: core imports {module} when it is loaded"
            elif parts[1] != "__init__" and rank_of(module) > RANKS.index(parts[1]):
                yield f"{path.name}: imports the higher {module}"
        elif area not in ("megatron", "sglang") and not is_lazy:
            is_known = top in sys.stdlib_module_names or top in CORE_LIBRARIES
            if not is_known and top != "routing_replay":
                yield f"{path.name}: core imports {module} when it is loaded"


def test_every_module_obeys_the_import_law():
    files = sorted((ROOT / "routing_replay").rglob("*.py"))
    assert len(files) > 30
    stubs = "cpu_stubs"
    wrong = [v for f in files if stubs not in f.parts for v in violations(f, imports(f))]
    assert wrong == []


@pytest.mark.parametrize(
    ("where", "module"),
    [
        ("routing_replay/table.py", "megatron.core"),
        ("routing_replay/routes.py", "routing_replay.table"),
        ("routing_replay/megatron/replay.py", "routing_replay.sglang.client"),
        ("routing_replay/sglang/client.py", "recipes.minirl"),
    ],
)
def test_the_law_can_be_broken(where, module):
    assert list(violations(ROOT / where, [(module, False)]))


LOADED = "import sys; import {}; print(*[m for m in {} if m in sys.modules])"
ENGINES = ["megatron", "sglang", "transformers", "httpx", "yaml"]


def loaded_by(module):
    code = LOADED.format(module, ENGINES)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_core_loads_no_engine():
    assert loaded_by("routing_replay, routing_replay.table, routing_replay.objectives") == []


def test_the_subprocess_would_see_a_loaded_library():
    assert loaded_by("yaml") == ["yaml"]
