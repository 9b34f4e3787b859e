"""The lanes of conftest.py: what a file name says, and that the core lane notices an engine."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on the copied conftest.py and the test files of a folder."""
    (folder / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    settings = TESTS.parent / "pyproject.toml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(
        [*command, "-c", settings, "--rootdir", folder, folder],
        capture_output=True,
        text=True,
        cwd=folder,
    )


@pytest.mark.parametrize("engine", ["megatron", "sglang"])
def test_a_core_test_that_imports_an_engine_fails(tmp_path, engine):
    (tmp_path / engine).mkdir()
    (tmp_path / engine / "__init__.py").touch()
    (tmp_path / "test_routes.py").write_text(f"def test_import():\n    import {engine}\n")
    result = run_pytest(tmp_path, "--lane", "core")
    assert result.returncode == 1
    assert f"imports no engine: expected none, got ['{engine}']" in result.stdout


def test_the_core_lane_never_imports_a_file_of_another_lane(tmp_path):
    (tmp_path / "test_routes.py").write_text("def test_core(): pass\n")
    for need in ("megatron", "sglang", "recipe", "gpu"):
        (tmp_path / f"test_{need}_x.py").write_text("raise RuntimeError('imported')\n")
    result = run_pytest(tmp_path, "--lane", "core")
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout


def test_the_slow_lanes_come_first(tmp_path):
    for lane in ("core", "megatron", "recipe", "sglang"):
        (tmp_path / f"test_{lane}_x.py").write_text("def test_one(): pass\n")
    listed = run_pytest(tmp_path, "--collect-only").stdout.splitlines()
    order = [line.split("_")[1] for line in listed if "::" in line]
    assert order == ["recipe", "sglang", "megatron", "core"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_megatron_replay.py", "megatron"),
        ("test_sglang_rows.py", "sglang"),
        ("test_recipe_policy.py", "both"),
        ("test_gpu_kernels.py", "gpu"),
        ("test_routes.py", "core"),
        ("test_minirl_config.py", "core"),
    ],
)
def test_the_file_name_says_what_a_test_needs(name, expected, request):
    (conftest,) = (
        plugin
        for plugin in request.config.pluginmanager.get_plugins()
        if getattr(plugin, "__file__", None) == str(TESTS / "conftest.py")
    )
    assert conftest.need_of(Path(name)) == expected
