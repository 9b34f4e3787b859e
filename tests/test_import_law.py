"""The import law: a room imports only from the rooms named beside it.

A room is a folder, or a module in the root of `routing_replay/`. The rooms are listed in the order
of the data flow, so the law also says in which direction data goes.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE_LIBRARIES = {"torch", "numpy", "safetensors"}
# Room: the rooms that it may import when it is loaded, itself included. `cli` may import any room,
# but only inside functions: a verb loads what it needs.
CORE = {
    "errors": set(),
    "files": set(),
    "findings": {"errors"},
    "capture": {"errors"},
    "config": {"errors"},
    "routes": {"errors", "files"},
    "balance": {"errors", "routes"},
    "metrics": {"errors", "files", "routes"},
    "objectives": {"errors", "metrics"},
    "analysis": {"errors", "files", "routes", "metrics"},
    "report": {"errors", "files", "findings", "metrics"},
    "cli": {"errors", "files", "findings", "config", "routes"},
}
EDGES = {
    "kernels": {"errors"},
    "rollout": {"errors", "capture", "routes"},
    "sglang": {"errors", "kernels", "capture", "routes"},
    "megatron": {"errors", "findings", "kernels", "config", "routes", "balance", "metrics"},
    "adapters": {"errors", "config", "routes", "metrics", "objectives", "megatron"},
}
LAW = CORE | EDGES
# What an edge may load besides the core's libraries.
EDGE_LIBRARIES = {
    "kernels": {"triton"},
    "rollout": {"aiohttp"},
    "sglang": {"sglang", "packaging"},
    "megatron": {"megatron", "packaging"},
    "adapters": {"megatron", "tensordict", "verl"},
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, is_lazy) of every import in a file, relative ones resolved."""
    tree = ast.parse(path.read_text())
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(node)
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
            for alias in node.names:
                yield f"{module}.{alias.name}", id(node) in lazy


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "routing_replay").with_suffix("").parts[0]


def violations(path: Path, modules: list[tuple[str, bool]]) -> Iterator[str]:
    """What a file imports against the law."""
    room = room_of(path)
    for module, is_lazy in modules:
        top, _, rest = module.partition(".")
        target = rest.partition(".")[0]
        if top in ("recipes", "tools", "tests", "examples"):
            yield f"{path.name}: the package imports {module}"
        elif top == "routing_replay":
            is_free = is_lazy and room in ("cli", "__init__")
            if target in LAW and target != room and not is_free and target not in LAW[room]:
                yield f"{path.name}: {room} imports {module}"
        elif not is_lazy and top not in (
            sys.stdlib_module_names | CORE_LIBRARIES | EDGE_LIBRARIES.get(room, set())
        ):
            yield f"{path.name}: {room} loads {module}"


def test_every_room_obeys_the_import_law():
    files = sorted((ROOT / "routing_replay").rglob("*.py"))
    assert {room_of(path) for path in files} - {"__init__"} == set(LAW)
    assert [v for path in files for v in violations(path, list(imports(path)))] == []


def test_the_order_of_the_rooms_is_the_order_of_the_flow():
    rooms = list(LAW)
    for room, allowed in LAW.items():
        assert all(rooms.index(other) < rooms.index(room) for other in allowed), room


@pytest.mark.parametrize(
    ("where", "module"),
    [
        ("routing_replay/routes/table.py", "megatron.core"),
        ("routing_replay/routes/routes.py", "routing_replay.metrics.typed"),
        ("routing_replay/megatron/replay.py", "routing_replay.sglang.plugin"),
        ("routing_replay/rollout/client.py", "sglang.srt"),
        ("routing_replay/rollout/client.py", "recipes.minirl"),
    ],
)
def test_the_law_can_be_broken(where, module):
    assert list(violations(ROOT / where, [(module, False)]))


LOADED = "import sys; import {}; print(*[m for m in {} if m in sys.modules])"
ENGINES = ["megatron", "sglang", "transformers", "aiohttp", "yaml"]


def loaded_by(module):
    code = LOADED.format(module, ENGINES)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_core_loads_no_engine():
    core = ", ".join(f"routing_replay.{room}" for room in CORE)
    assert loaded_by(f"routing_replay, routing_replay.routes.table, {core}") == []


def test_the_megatron_package_loads_megatron_when_a_name_is_touched():
    names = "Receipt, Recording, Replay, attach"
    code = f"""import sys, routing_replay.megatron as package
assert ', '.join(package.__all__) == {names!r}
assert not {{'megatron', 'torch'}} & set(sys.modules), 'loaded by the import'
try:
    package.nothing
except AttributeError as error:
    print(error)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "module 'routing_replay.megatron' has no attribute 'nothing'", (
        done.stderr
    )


def test_the_client_loads_no_engine():
    assert set(loaded_by("routing_replay.rollout.client")) <= {"aiohttp"}


def test_the_subprocess_would_see_a_loaded_library():
    assert loaded_by("yaml") == ["yaml"]
