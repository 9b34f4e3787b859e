"""Replay in Megatron-LM's own loop, by `--spec` and by the launcher, with a stock training script.

`loop_witness.py` saves what every router dispatched: the independent witness of replay.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from loop_routes import (
    LAYERS,
    LENGTH,
    check_dispatch,
    own_routes,
    random_routes,
    samples_of,
    save,
)
from megatron_lm_job import FLAGS, SCRIPT, STEPS

CORE = tuple(int(part) for part in version("megatron-core").split(".")[:2])
pytestmark = pytest.mark.skipif(CORE < (0, 17), reason="megatron.training: from 0.17 in the wheel")
has_spec = pytest.mark.skipif(CORE < (0, 19), reason="--spec: called by the loop from 0.19 on")

TESTS = Path(__file__).parent
SPEC = ["--spec", "routing_replay.adapters.megatron_lm", "layer_spec"]


class Run:
    """What a finished job left: its output and the witness of each rank."""

    def __init__(self, folder: Path, nproc: int, flags=(), routes: str = "", launcher=False):
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(nproc)]
        if launcher:
            command += ["-m", "routing_replay.adapters.run"]
        command += [str(SCRIPT), "--witness", str(folder)]
        command += [*FLAGS, *flags]
        if launcher:
            command += ["--routing-replay-routes", routes]
        paths = [TESTS, TESTS.parent, os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths),
            "ROUTING_REPLAY_ROUTES": "" if launcher else routes,
        }
        self.folder = folder
        done = subprocess.run(
            command, env=environment, text=True, capture_output=True, timeout=600, cwd=folder
        )
        self.status, self.output = done.returncode, done.stdout + done.stderr

    def witnesses(self) -> list[dict]:
        assert self.status == 0, self.output[-6000:]
        paths = sorted(self.folder.glob("rank*.pt"))
        return [torch.load(path) for path in paths]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("loop") / "stock", 1).witnesses()[0]


@pytest.fixture(scope="module")
def samples(stock):
    return samples_of(stock)


@pytest.fixture(scope="module")
def table(tmp_path_factory, samples):
    """Random routes of all samples but the first, in a file."""
    routes = random_routes(len(samples))
    path = tmp_path_factory.mktemp("routes") / "random.safetensors"
    return save(path, routes[1:], samples[1:]), samples[1:], routes[1:]


@has_spec
def test_a_job_that_replays_its_own_routes_has_the_stock_losses(stock, samples, tmp_path):
    assert len({s.tobytes() for s in samples}) == len(samples) == 4 * STEPS
    path = save(tmp_path / "own.safetensors", own_routes(stock), samples)
    run = Run(tmp_path / "run", 1, SPEC, path)
    witness = run.witnesses()[0]
    assert witness["losses"] == stock["losses"]
    assert all(map(torch.equal, witness["weights"], stock["weights"]))
    rows = 4 * LENGTH * LAYERS
    assert f"the first pass replayed {rows} rows" in run.output
    assert f"mode R3, routes of {path}, {LAYERS} routed layers" in run.output


def test_the_launcher_replays_the_routed_samples_on_two_pipeline_stages(stock, table, tmp_path):
    path, samples, routes = table
    flags = ["--pipeline-model-parallel-size", "2"]
    run = Run(tmp_path / "run", 2, flags, path, launcher=True)
    first, last = run.witnesses()
    assert sorted(first["maps"]) == [0, 1] and sorted(last["maps"]) == [2, 3]
    # The mock data of 0.17 repeat a sample: the one without routes has those of its equal.
    known = {sample.tobytes() for sample in samples}
    is_routed = [sample.tobytes() in known for sample in samples_of(first)]
    assert len(is_routed) == 4 * STEPS and (CORE < (0, 18) or sum(is_routed) == 4 * STEPS - 1)
    for witness in (first, last):
        rows = check_dispatch(witness, samples, routes, first["tokens"])
        assert rows == sum(is_routed) * LENGTH * 2
    num_first = sum(is_routed[:4]) * LENGTH * LAYERS
    assert f"the first pass replayed {num_first} rows" in run.output
    assert last["losses"] != stock["losses"]


def test_the_launcher_names_what_is_missing():
    run = [sys.executable, "-m", "routing_replay.adapters.run", "nothing.py"]
    done = subprocess.run(
        [*run, "--routing-replay-routes", "x"], text=True, capture_output=True, cwd=TESTS.parent
    )
    assert done.returncode != 0
    assert "no training script is named" in done.stderr
    done = subprocess.run(run, text=True, capture_output=True, cwd=TESTS.parent)
    assert "no routes are named" in done.stderr


def test_a_script_that_never_trains_by_the_loop_is_an_error(tmp_path):
    (tmp_path / "script.py").write_text("print('done')\n")
    run = [sys.executable, "-m", "routing_replay.adapters.run", str(tmp_path / "script.py")]
    done = subprocess.run(
        [*run, "--routing-replay-routes", "x"], text=True, capture_output=True, cwd=TESTS.parent
    )
    assert done.returncode != 0 and "the script ended without replay" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [True, pytest.param(False, marks=has_spec)])
def test_a_job_that_trains_no_step_ends_with_an_error(launcher, tmp_path):
    flags = ["--skip-train", *([] if launcher else SPEC)]
    run = Run(tmp_path / "run", 1, flags, "routes.safetensors", launcher=launcher)
    assert run.status != 0
    assert "error: the job ended without a single replayed row" in run.output
    assert "no update that routing replay saw" in run.output
