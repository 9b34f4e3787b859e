"""The hook in a real Ray job: workers and actors are patched, and keep the job's environment."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: run `make test-frameworks`")

ROOT = Path(__file__).parent.parent.parent
JOB = """
import os, ray
def own_setup():
    os.environ["OWN_SETUP"] = "ran, patched: " + os.environ.get("ROUTING_REPLAY_MODE", "")
environment = {"env_vars": {"JOB": "1"}, "worker_process_setup_hook": own_setup}
ray.init(num_cpus=1, include_dashboard=False, runtime_env=environment)

def seen():
    import framework
    names = ("JOB", "ACTOR", "ROUTING_REPLAY_MODE", "OWN_SETUP")
    return [framework.is_patched, *(os.environ.get(name) for name in names)]

class Worker:
    def seen(self):
        return seen()

task = ray.remote(seen)
print("task", ray.get(task.remote()))
actor = ray.remote(Worker).options(runtime_env={"env_vars": {"ACTOR": "2"}}).remote()
print("actor", ray.get(actor.seen.remote()))
"""
OURS = """
from routing_replay.adapters import ray
ray.PATCHES = {"framework": "ours:patch"}
def patch(module):
    module.is_patched = True
"""


def test_workers_are_patched_and_keep_the_jobs_environment(tmp_path):
    (tmp_path / "framework.py").write_text("is_patched = False")
    (tmp_path / "ours.py").write_text(OURS)
    # Python imports it at its start: the worker's table of patches is the test's.
    (tmp_path / "sitecustomize.py").write_text("import ours")
    (tmp_path / "job.py").write_text(JOB)
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "RAY_RUNTIME_ENV_HOOK": "routing_replay.adapters.ray.runtime_env_hook",
        "RAY_USAGE_STATS_ENABLED": "0",
        "ROUTING_REPLAY_MODE": "R3",
    }
    done = subprocess.run(
        [sys.executable, str(tmp_path / "job.py")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=180,
    )
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " [" in line)
    own = "'ran, patched: R3'"
    assert lines == {
        "task": f"[True, '1', None, 'R3', {own}]",
        "actor": f"[True, '1', '2', 'R3', {own}]",
    }, done.stderr[-2000:]
