"""Packaging: pins, extras, entry points, and the commands that the README names."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


@pytest.mark.parametrize("package", PINS)
def test_the_tests_run_with_the_pinned_version(package):
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed: the core lane needs no engine")
    # A build's own suffix (torch's +cu130) says where it is from, not which version it is.
    assert version.split("+")[0] == PINS[package]


def test_every_extra_that_the_environment_installs_exists_and_is_pinned():
    metadata = importlib.metadata.metadata("routing_replay")
    extras = re.search(r"^EXTRAS\s*:=\s*(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for extra in extras.group(1).split(","):
        assert extra in metadata.get_all("Provides-Extra")
        requirements = {
            re.match(r"[\w-]+", requirement).group().lower()
            for requirement in metadata.get_all("Requires-Dist")
            if f'extra == "{extra}"' in requirement
        }
        assert requirements, extra
        assert requirements - set(PINS) == set(), extra


def test_sglang_finds_the_plugin_and_the_shell_the_command():
    plugins = importlib.metadata.entry_points(group="sglang.srt.plugins")
    assert [p.load().__name__ for p in plugins if p.name == "routing_replay"] == ["register"]
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert [s.value for s in scripts if s.name == "routing-replay"] == ["routing_replay.cli:main"]


def test_make_help_names_every_target():
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    listed = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"^\s*make ([a-z-]+)", listed, re.MULTILINE) == phony.split()


def find_python(**environment):
    return subprocess.run(
        [str(ROOT / ".ci" / "find_python")], capture_output=True, text=True, env=environment
    )


def test_a_python_that_is_named_or_in_pyenv_is_found(tmp_path):
    base = os.path.realpath(sys.executable)
    found = find_python(PATH="/usr/bin:/bin", HOME="/nowhere", PYTHON=base)
    assert found.returncode == 0
    bin_folder = tmp_path / "versions" / "3.12.99" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").symlink_to(base)
    found = find_python(PATH="/usr/bin:/bin", HOME="/nowhere", PYENV_ROOT=str(tmp_path))
    assert found.returncode == 0
    version = [found.stdout.strip(), "-c", "import sys; print(sys.version_info[:2])"]
    assert subprocess.run(version, capture_output=True, text=True).stdout == "(3, 12)\n"


def test_without_a_python_the_message_says_what_to_install(tmp_path):
    (tmp_path / "sh").symlink_to("/bin/sh")
    found = find_python(PATH=str(tmp_path), HOME=str(tmp_path))
    if found.returncode == 0:
        pytest.skip("a Python 3.12 lies in a folder that is always searched")
    assert "no Python 3.12" in found.stderr
    assert "make env PYTHON=" in found.stderr


def test_ci_runs_the_test_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["pytest"]["ini_options"]["timeout"] > 0
