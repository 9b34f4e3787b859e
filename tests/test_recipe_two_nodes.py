"""The recipe's trainer on two nodes: the commands that --prepare-only prints, on one machine."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time

import pytest
from test_recipe_end_to_end import ROOT, TIMEOUT_S, records, start, write_prompts

from recipes.serving.server import ServerOptions, free_port, launch

NODES = [
    *("--nnodes", "2", "--nproc", "2", "--expert-parallel", "2", "--microbatch-tokens", "64"),
    *("--warmup-target", "0", "--heldout-limit", "16", "--tiny-layers", "2", "--steps", "2"),
    *("--prompts-per-step", "8", "--samples-per-prompt", "4", "--minibatch-size", "8"),
]
# A node whose start is slow, as that of a container.
LATE_S = 5.0


def prepared_commands(run_dir, *flags):
    """The folder of the tiny model, and the command of each node, from what is printed."""
    process = start(run_dir, "--prepare-only", *flags)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    model = re.search(r"--model-path (\S+)", output).group(1)
    return model, re.findall(r"Node \d:\n  (.+)", output)


def start_node(command, url, port, folder):
    """One node's torchrun, as a user would start it with the names filled in."""
    for name, value in (("NODE0", "127.0.0.1"), ("29500", str(port)), ("http://SERVER:30000", url)):
        command = command.replace(name, value)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "node.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, *shlex.split(command)[1:]],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


@pytest.mark.slow
@pytest.mark.timeout(3 * TIMEOUT_S)
def test_two_nodes_of_two_ranks_train_with_the_printed_commands(tmp_path):
    run_dir = tmp_path / "run"
    flags = [*NODES, *write_prompts(tmp_path), "--cache-dir", str(tmp_path / "cache")]
    model, commands = prepared_commands(run_dir, *flags)
    assert len(commands) == 2
    options = ServerOptions(capture="gates", arguments=("--dtype", "bfloat16"))
    port = free_port()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(launch(model, options))
        nodes = []
        for command in commands:
            nodes.append(start_node(command, server.url, port, tmp_path))
            stack.callback(nodes[-1].kill)
            time.sleep(LATE_S)
        for node in nodes:
            assert node.wait(TIMEOUT_S) == 0, (tmp_path / "node.log").read_text()[-4000:]
    steps = records(run_dir)
    assert [record["step"] for record in steps] == [0, 1, 2]
    for step in steps[1:]:
        assert step["routing_replay/coverage"] == 1
        assert step["train_infer/kl_k3"] < step["train_infer/kl_k3_live"]
