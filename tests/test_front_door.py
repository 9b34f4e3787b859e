"""What `import routing_replay` gives, and what it does not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import routing_replay as rr

ROOT = Path(__file__).parent.parent
LIBRARIES = ("torch", "numpy", "safetensors", "megatron", "sglang", "transformers")


def loaded_after(code):
    """Which libraries a new interpreter has loaded after running `code`."""
    code += f"\nimport sys; print(*[m for m in {LIBRARIES} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_no_library():
    assert loaded_after("import routing_replay; dir(routing_replay)") == set()


def test_routes_and_tables_need_numpy_only():
    code = "from routing_replay import Routes, RouteTable, MoEShape, ReplayConfig, TableError"
    assert loaded_after(code) == {"numpy"}


def test_the_check_of_loaded_libraries_can_fail():
    assert loaded_after("import routing_replay, safetensors") == {"safetensors"}


def test_importing_the_package_takes_less_than_a_fifth_of_a_second():
    code = (
        "import time; start = time.perf_counter(); import routing_replay;"
        "print(time.perf_counter() - start)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 0.2


@pytest.mark.parametrize("name", sorted(set(rr.__all__) - {"attach"}))
def test_every_public_name_can_be_touched(name):
    assert getattr(rr, name) is not None and name in dir(rr)


def test_every_error_class_is_public():
    from routing_replay import errors

    base = errors.RoutingReplayError
    classes = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, base)}
    assert len(classes) > 5 and {c.__name__ for c in classes} <= set(rr.__all__)


def test_type_checkers_see_every_public_name():
    tree = ast.parse((ROOT / "routing_replay/__init__.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    assert names - {"annotations", "TYPE_CHECKING", "Any"} == set(rr.__all__) - {"__version__"}
    assert (ROOT / "routing_replay/py.typed").exists()


def test_subpackages_are_reachable_as_attributes():
    code = "import routing_replay as rr; assert rr.routes.RouteTable is rr.RouteTable"
    assert "megatron" not in loaded_after(code)


def test_every_folder_is_a_subpackage():
    folders = {path.parent.name for path in (ROOT / "routing_replay").glob("*/__init__.py")}
    assert folders <= set(dir(rr))


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'routing_replay' has no attribute 'atach'"):
        _ = rr.atach
