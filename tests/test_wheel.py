"""The wheel: what it holds, and that it works beside torch, numpy and safetensors alone."""

import importlib.metadata
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
BASE = ("torch", "numpy", "safetensors")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build from a copy of the sources: setuptools leaves build folders behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("routing_replay", "recipes", "tools", "tests", "examples"):
        (source / name).symlink_to(ROOT / name)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder]
    run([sys.executable, "-m", "pip", "wheel", "--quiet", *options, source])
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The Python of an environment that has the wheel, and of other packages torch's needs only."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    for distribution in requirements_of(BASE).values():
        link(distribution, packages)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run([*pip, "--no-deps", "--no-index", "--no-compile", wheel])
    return python


def run(command, **options):
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def requirements_of(names):
    """Return the installed distributions of some packages and of all that they require, by name."""
    distributions, waiting = {}, list(names)
    while waiting:
        name = waiting.pop()
        if name in distributions:
            continue
        try:
            distributions[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # CUDA libraries, where torch is built for the CPU
        parsed = [Requirement(text) for text in distributions[name].requires or ()]
        waiting += [r.name for r in parsed if not r.marker or r.marker.evaluate({"extra": ""})]
    return distributions


def link(distribution, packages):
    """Link the top level of an installed distribution into a site-packages folder."""
    for name in {file.parts[0] for file in distribution.files if file.parts[0] != ".."}:
        if not (packages / name).exists():
            (packages / name).symlink_to(distribution.locate_file(name))


def test_the_wheel_holds_the_package_its_types_its_assets_and_the_license(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"routing_replay"}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "routing_replay").rglob("*.py")}
    files |= {
        f"routing_replay/{name}" for name in ("py.typed", "report/page.css", "report/page.js")
    }
    assert files - names == set()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_environment_has_no_engine_and_not_this_source_tree(python, tmp_path):
    code = (
        "import importlib.util as u, routing_replay;"
        "print([n for n in ('megatron', 'sglang', 'transformers', 'aiohttp') if u.find_spec(n)]);"
        "print(routing_replay.__file__)"
    )
    engines, path = run_alone(python, tmp_path, "-c", code).splitlines()
    assert engines == "[]"
    assert Path(path).is_relative_to(python.parent.parent)


def test_the_example_without_an_engine_runs_on_the_wheel(python, tmp_path):
    assert run_alone(python, tmp_path, ROOT / "examples" / "routes_and_tables.py")


def test_the_command_starts_on_the_wheel(python, tmp_path):
    assert "doctor" in run([python.with_name("routing-replay"), "--help"], cwd=tmp_path, env={})


def test_attach_says_which_package_is_missing(python, tmp_path):
    code = "import routing_replay as rr\ntry: rr.attach\nexcept ImportError as e: print(e)"
    assert "megatron" in run_alone(python, tmp_path, "-c", code)


def run_alone(python, folder, *arguments):
    """Run Python in an empty folder without PYTHONPATH, which would find this source tree."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return run([python, *arguments], cwd=folder, env=environment)
