"""The recipe's trainer on two nodes with disks of their own, by the commands of --prepare-only.

Weights and checkpoints are in a folder that both see; the second sees it late (slow_folder.py).
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from megatron_worlds import run_world
from test_recipe_end_to_end import ROOT, TIMEOUT_S, records, start, write_prompts

from recipes.serving.ports import HeldPort
from recipes.serving.server import ServerOptions, launch
from routing_replay.errors import CheckpointError, ServerError

NODES = [
    *("--nnodes", "2", "--nproc", "2", "--expert-parallel", "2", "--microbatch-tokens", "64"),
    *("--warmup-target", "0", "--heldout-limit", "16", "--tiny-layers", "2"),
    *("--prompts-per-step", "8", "--samples-per-prompt", "4", "--minibatch-size", "8"),
]
# A node whose start is slow, as that of a container.
LATE_S = 5.0
# How late the second node sees what the first has written to the shared folder.
SLOW_S = 3.0


def prepared_commands(run_dir, *flags):
    """The folder of the tiny model, and the command of each node, from what is printed."""
    process = start(run_dir, "--prepare-only", *flags)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    model = re.search(r"--model-path (\S+)", output).group(1)
    return model, re.findall(r"Node \d:\n  (.+)", output)


def start_node(command, folder, changes, environment):
    """One node's command, as a user would start it with the names filled in."""
    for name, value in changes.items():
        command = command.replace(name, value)
    with open(folder / "node.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, *shlex.split(command)[1:]],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )


def two_held_ports():
    """Two ports in sequence: the nodes meet at the one after torchrun's."""
    while True:
        first = HeldPort()
        try:
            return first, HeldPort(first.number + 1)
        except ServerError:
            first.release()


def train(commands, url, folder):
    """Both nodes to their end; node 1 has a disk of its own, and sees the shared folder late."""
    held = two_held_ports()
    names = {"NODE0": "127.0.0.1", "29500": str(held[0].number), "http://SERVER:30000": url}
    own = names | {str(folder / "disk_0"): str(folder / "disk_1")}
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text("import slow_folder\n")
    path = os.pathsep.join(map(str, [folder / "site", ROOT, ROOT / "tests"]))
    slow = {"PYTHONPATH": path, "SLOW_FOLDER": str(folder / "shared"), "SLOW_S": str(SLOW_S)}
    with held[0], held[1], contextlib.ExitStack() as stack:
        nodes = []
        for command, changes, environment in zip(commands, (names, own), ({}, slow), strict=True):
            nodes.append(start_node(command, folder, changes, environment))
            stack.callback(nodes[-1].kill)
            time.sleep(LATE_S)
        for node in nodes:
            assert node.wait(TIMEOUT_S) == 0, (folder / "node.log").read_text()[-4000:]


@pytest.mark.timeout(4 * TIMEOUT_S)
def test_two_nodes_of_two_ranks_train_and_resume_with_one_rank_each_on_disks_of_their_own(tmp_path):
    runs = [tmp_path / f"disk_{node}" / "run" for node in range(2)]
    flags = [*NODES, *write_prompts(tmp_path), "--cache-dir", str(tmp_path / "cache")]
    flags += ["--shared-dir", str(tmp_path / "shared")]
    model, commands = prepared_commands(runs[0], "--steps", "1", *flags)
    assert len(commands) == 2
    options = ServerOptions(capture="gates", arguments=("--dtype", "bfloat16"))
    with launch(model, options) as server:
        for steps in ("1", "2"):
            if steps == "2":
                resume = ["--resume", "--steps", steps, "--nproc", "1"]
                process = start(runs[0], "--prepare-only", *resume)
                assert process.wait(TIMEOUT_S) == 0
            runs[1].mkdir(parents=True, exist_ok=True)
            shutil.copy(runs[0] / "config.json", runs[1])
            train(commands, server.url, tmp_path)
    steps = records(runs[0])
    assert [record["step"] for record in steps] == [0, 1, 2]
    for step in steps[1:]:
        assert step["routing_replay/coverage"] == 1
        assert step["train_infer/kl_k3"] < step["train_infer/kl_k3_live"]
    # The second node wrote nothing but its scratch files, and these are gone.
    assert [path.name for path in runs[1].iterdir()] == ["config.json"]
    assert [path.name for path in (tmp_path / "shared" / "weights").iterdir()] == ["version_000002"]


def agreed(rank, folder):
    """The checkpoint of a resume, or its error; rank 1 has a folder of its own, `late` or empty."""
    from recipes.minirl.job import checkpoints

    checkpoints.VISIBLE_AFTER_S = 2.0
    found = {}
    for name in ("late", "never"):
        own = folder / f"{name}_{rank}"
        if name == "late" and rank == 1:
            write_checkpoint(own, 4)
            appearing = subprocess.Popen(["sh", "-c", 'sleep 1; mv "$0" "$1"', *moved(own)])
        try:
            found[name] = checkpoints.agreed(own).name
        except CheckpointError as error:
            found[name] = str(error)
    if rank == 1:
        appearing.wait()
    return found


def moved(folder):
    """The checkpoint's hidden name and its own."""
    checkpoint = folder / "checkpoints" / "step_000004"
    hidden = checkpoint.with_name("hidden")
    checkpoint.rename(hidden)
    return [str(hidden), str(checkpoint)]


def write_checkpoint(folder, step):
    trainer = folder / "checkpoints" / f"step_{step:06d}" / "trainer"
    trainer.mkdir(parents=True)
    (trainer / "state.json").write_text("{}")


def test_a_resume_waits_until_all_ranks_see_the_checkpoint_of_rank_0(tmp_path):
    write_checkpoint(tmp_path / "late_0", 4)
    write_checkpoint(tmp_path / "never_0", 4)
    # An older one on the other node must not be resumed from there.
    write_checkpoint(tmp_path / "never_1", 2)
    for found in run_world(agreed, 2, tmp_path):
        assert found["late"] == "step_000004"
        assert "a rank does not see the checkpoint that rank 0 resumes from" in found["never"]
        assert "rank 1" in found["never"] and "--shared-dir" in found["never"]
