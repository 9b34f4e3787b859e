"""The frameworks of .venv-frameworks import on a machine without CUDA."""

import subprocess
import sys
from pathlib import Path

import pytest

ENGINES = {
    "verl": "verl.workers.engine.megatron",
    "skyrl": "skyrl.backends.skyrl_train.utils.replay_utils",
    "megatron-bridge": "megatron.bridge",
}


@pytest.mark.parametrize("module", ENGINES.values(), ids=ENGINES)
def test_a_framework_imports_with_the_stand_ins(module):
    code = f"import stand_ins; stand_ins.prepare(); import {module}"
    environment = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent.parent}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
