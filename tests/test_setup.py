"""Packaging: pins, extras, entry points, and the commands that the README names."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import routing_replay

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


def test_every_suite_on_older_engines_exists():
    script = (ROOT / ".ci" / "test_versions").read_text()
    suites = re.findall(r'"(tests/\w+\.py)"', script)
    assert len(suites) > 4
    assert [path for path in suites if not (ROOT / path).is_file()] == []


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


def test_the_package_says_its_license_and_where_it_lives():
    metadata = importlib.metadata.metadata("routing_replay")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == routing_replay.__version__
    links = {entry.split(",")[0] for entry in metadata.get_all("Project-URL")}
    assert links == {"Repository", "Issues", "Changelog"}
    license_text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in license_text and "The routing_replay authors" in license_text


def test_the_citation_file_agrees_with_the_metadata():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0"
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert citation["repository-code"] == urls["Repository"]


def test_the_fast_lane_of_the_workflow_installs_no_engine():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    fast = workflow["jobs"]["fast"]
    extras = set(fast["env"]["EXTRAS"].split(","))
    assert "test" in extras and not extras & {"sglang", "megatron"}
    commands = [step.get("run") for step in fast["steps"]]
    assert {"make check EXTRAS=$EXTRAS", "make test-fast EXTRAS=$EXTRAS"} <= set(commands)


def test_the_bug_report_asks_for_the_doctor():
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text()
    (doctor,) = (field for field in yaml.safe_load(form)["body"] if field["id"] == "doctor")
    assert "routing-replay doctor" in doctor["attributes"]["label"]
    assert doctor["validations"]["required"]


def test_sglang_finds_the_plugin_and_the_shell_the_command():
    plugins = importlib.metadata.entry_points(group="sglang.srt.plugins")
    assert [p.load().__name__ for p in plugins if p.name == "routing_replay"] == ["register"]
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert [s.value for s in scripts if s.name == "routing-replay"] == ["routing_replay.cli:main"]


def test_make_help_names_every_target():
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    listing = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"^\s*make ([a-z-]+)", listing, re.MULTILINE) == phony.split()


def find_python(**environment):
    return subprocess.run(
        [str(ROOT / ".ci" / "find_python")], capture_output=True, text=True, env=environment
    )


def test_a_python_that_is_named_or_in_pyenv_is_found(tmp_path):
    base = os.path.realpath(sys.executable)
    result = find_python(PATH="/usr/bin:/bin", HOME="/nowhere", PYTHON=base)
    assert result.returncode == 0
    bin_folder = tmp_path / "versions" / "3.12.99" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").symlink_to(base)
    result = find_python(PATH="/usr/bin:/bin", HOME="/nowhere", PYENV_ROOT=str(tmp_path))
    assert result.returncode == 0
    version = [result.stdout.strip(), "-c", "import sys; print(sys.version_info[:2])"]
    assert subprocess.run(version, capture_output=True, text=True).stdout == "(3, 12)\n"


def test_without_a_python_the_message_says_what_to_install(tmp_path):
    (tmp_path / "sh").symlink_to("/bin/sh")
    result = find_python(PATH=str(tmp_path), HOME=str(tmp_path))
    if result.returncode == 0:
        pytest.skip("a Python 3.12 lies in a folder that is always searched")
    assert "no Python 3.12" in result.stderr
    assert "make env PYTHON=" in result.stderr


def test_ci_runs_the_test_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["pytest"]["ini_options"]["timeout"] > 0
