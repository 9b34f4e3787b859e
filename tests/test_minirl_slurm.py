"""The SLURM job of a prepared run, executed by bash with stand-ins for the cluster's commands."""

import os
import shutil
import subprocess
import time

import pytest

from recipes.minirl.launch.slurm import job_text
from recipes.minirl.settings.command_line import parse, preset_names

# What the job calls, each as a script that notes its arguments in $NOTES.
STAND_INS = {
    "scontrol": "printf 'n0\\nn1\\nn2\\n' | head -n \"$NUM_NODES\"",
    # A server is asked after it has been started, however slow the machine is.
    "curl": 'until [[ -s "$NOTES" ]]; do sleep 0.02; done; [[ -e "$NOTES.ready" ]]',
    "srun": """
        if [[ "$*" == *sglang.launch_server* ]]; then
          trap 'echo stopped >> "$NOTES"; exit 143' TERM
          echo "srun $*" >> "$NOTES"
          eval "$SERVER"
          touch "$NOTES.ready"
          for _ in {1..200}; do sleep 0.05; done
        else
          echo "srun $*" >> "$NOTES"
          eval "$TRAINER"
        fi
    """,
}


@pytest.fixture
def execute(tmp_path):
    """Run the job of a preset; return the process and the noted lines."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)

    def run(*flags, server=":", trainer="exit 0", num_nodes=3):
        job, notes = tmp_path / "job.sbatch", tmp_path / "notes"
        job.write_text(job_text(parse([*flags]), tmp_path / "a run", poll_s=0.05))
        environment = os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "NOTES": str(notes),
            "SERVER": server,
            "TRAINER": trainer,
            "NUM_NODES": str(num_nodes),
            "SLURM_JOB_NODELIST": "n[0-2]",
            "SLURM_JOB_ID": "7",
        }
        result = subprocess.run(
            ["bash", job], env=environment, capture_output=True, text=True, timeout=60
        )
        return result, notes.read_text().splitlines() if notes.exists() else []

    return run


MODE = ("--routing-replay-mode", "R3")
PRESET = ("--preset", "qwen3_30b_a3b_24xh100", *MODE)


def test_a_job_starts_the_server_then_the_trainer_and_stops_the_server(execute):
    result, notes = execute(*PRESET)
    assert result.returncode == 0, result.stderr
    server, trainer, end = notes
    assert "--nodelist=n2" in server
    assert "env ROUTING_REPLAY_CAPTURE=gates" in server
    assert "sglang.launch_server" in server and "--tp 4 --dp 2" in server
    assert "--nodelist=n0,n1" in trainer
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-id 7 --rdzv-endpoint n0:29500" in trainer
    assert trainer.endswith("a run --rollout-url http://n2:30000")
    assert end == "stopped"


def test_a_failed_trainer_is_the_status_of_the_job_and_the_server_stops(execute):
    result, notes = execute(*PRESET, trainer="exit 9")
    assert result.returncode == 9
    assert notes[-1] == "stopped"


def test_a_server_that_dies_at_its_start_ends_the_job(execute):
    result, notes = execute(*PRESET, server="exit 3")
    assert result.returncode == 1
    assert "the server of n2 died; see its log in" in result.stderr
    assert len(notes) == 1


def test_a_server_that_dies_later_is_started_again(execute):
    dies_once = 'touch "$NOTES.ready"; [[ -e "$NOTES.died" ]] || { touch "$NOTES.died"; exit 3; }'
    result, notes = execute(*PRESET, server=dies_once, trainer="exec sleep 3")
    assert result.returncode == 0, result.stderr
    assert "the server of n2 ended with status 3; it is started again" in result.stderr
    starts = [line for line in notes if "sglang.launch_server" in line]
    assert len(starts) == 2 and starts[0] == starts[1]


def test_a_server_that_dies_too_often_ends_the_trainer(execute):
    start = time.monotonic()
    result, notes = execute(
        *(*PRESET, "--server-restarts", "1"),
        server='touch "$NOTES.ready"; sleep 0.5; exit 3',
        trainer="exec sleep 30",
    )
    assert result.returncode == 1
    assert "error: the server of n2 ended with status 3 before the trainer" in result.stderr
    assert sum("sglang.launch_server" in line for line in notes) == 2
    assert time.monotonic() - start < 25


def test_a_server_that_is_never_ready_ends_the_job(execute):
    result, notes = execute(*PRESET, "--ready-timeout-s", "0", server="sleep 2")
    assert result.returncode == 1
    assert "http://n2:30000 is not ready after 0 s (--ready-timeout-s)" in result.stderr
    assert notes[-1] == "stopped"


def test_a_job_with_a_missing_node_does_not_start(execute):
    result, notes = execute(*PRESET, num_nodes=2)
    assert result.returncode == 1
    assert "the job has 2 nodes, expected 3" in result.stderr
    assert not notes


def test_on_one_node_server_and_trainer_have_gpus_of_their_own(execute):
    result, notes = execute("--preset", "qwen3_30b_a3b_8xb200", *MODE, num_nodes=1)
    assert result.returncode == 0, result.stderr
    assert "--nodelist=n0" in notes[0] and "env CUDA_VISIBLE_DEVICES=0,1,2,3 env" in notes[0]
    assert "--nodelist=n0" in notes[1] and "env CUDA_VISIBLE_DEVICES=4,5,6,7 python" in notes[1]


@pytest.mark.parametrize("name", preset_names())
def test_the_job_of_every_preset_is_valid_bash(name, tmp_path):
    job = tmp_path / "job.sbatch"
    job.write_text(job_text(parse(["--preset", name, *MODE]), tmp_path / "it's a run"))
    checkers = [["bash", "-n"], *([["shellcheck"]] if shutil.which("shellcheck") else [])]
    for checker in checkers:
        result = subprocess.run([*checker, job], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
