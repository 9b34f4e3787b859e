"""The hook of Ray: what it adds to a job's runtime environment, and what it keeps."""

import subprocess
import sys

import pytest

from routing_replay.adapters import ray

SETUP = "routing_replay.adapters.ray.setup"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (ray.NEXT_HOOK, ray.NEXT_SETUP):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ROUTING_REPLAY_MODE", "R3")


def test_a_job_without_an_environment_gets_the_setup_and_our_variables():
    changed = ray.runtime_env_hook(None)
    assert changed["worker_process_setup_hook"] == SETUP
    assert changed["env_vars"]["ROUTING_REPLAY_MODE"] == "R3"


def test_what_the_job_sets_stays_and_its_dictionary_is_not_changed():
    own = {"pip": ["a"], "env_vars": {"ROUTING_REPLAY_MODE": "R2", "OTHER": "1"}}
    changed = ray.runtime_env_hook(own)
    assert changed["pip"] == ["a"]
    assert changed["env_vars"]["ROUTING_REPLAY_MODE"] == "R2"
    assert changed["env_vars"]["OTHER"] == "1"
    assert own == {"pip": ["a"], "env_vars": {"ROUTING_REPLAY_MODE": "R2", "OTHER": "1"}}


def test_a_setup_of_the_job_runs_after_ours(monkeypatch):
    changed = ray.runtime_env_hook({"worker_process_setup_hook": "own.module.setup"})
    assert changed["worker_process_setup_hook"] == SETUP
    assert changed["env_vars"][ray.NEXT_SETUP] == "own.module.setup"
    calls = []
    monkeypatch.setattr(ray, "setup", lambda: calls.append("ours"))
    changed = ray.runtime_env_hook({"worker_process_setup_hook": lambda: calls.append("own")})
    changed["worker_process_setup_hook"]()
    assert calls == ["ours", "own"]


def test_the_hook_of_a_hooked_environment_changes_nothing_more():
    once = ray.runtime_env_hook({})
    assert ray.runtime_env_hook(once) == once


def test_another_hook_is_called_first(monkeypatch):
    monkeypatch.setenv(ray.NEXT_HOOK, "tests_other_hook.hook")
    other = type(sys)("tests_other_hook")
    other.hook = lambda runtime_env: {**(runtime_env or {}), "py_executable": "uv run"}
    monkeypatch.setitem(sys.modules, "tests_other_hook", other)
    changed = ray.runtime_env_hook({"pip": ["a"]})
    assert changed["py_executable"] == "uv run" and changed["pip"] == ["a"]
    assert changed["worker_process_setup_hook"] == SETUP


def test_the_setup_loads_neither_torch_nor_a_framework():
    code = (
        "from routing_replay.adapters import ray; ray.setup(); import sys;"
        "print(*[m for m in ('torch', 'megatron', 'ray', 'nemo_rl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("mode", "expected"), [("R3", "True"), ("disabled", "False"), (None, "False")]
)
def test_a_module_is_patched_after_its_import_if_the_mode_asks_for_it(
    tmp_path, monkeypatch, mode, expected
):
    (tmp_path / "framework.py").write_text("is_patched = False")
    (tmp_path / "ours.py").write_text("def patch(module): module.is_patched = True")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    if mode is None:
        monkeypatch.delenv("ROUTING_REPLAY_MODE")
    else:
        monkeypatch.setenv("ROUTING_REPLAY_MODE", mode)
    code = (
        "from routing_replay.adapters import ray; ray.PATCHES = {'framework': 'ours:patch'};"
        "ray.setup(); import framework; print(framework.is_patched)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
