"""The recipe trained on Ray: each actor on a raylet of its own, a node lost in mid-step, a resume.

A run of the launcher without Ray is beside it. Servers sample without a seed, so that responses
differ; what does not depend on them is the same.
"""

import contextlib
import json
import time

import psutil
import pytest
from ray_clusters import LocalCluster
from safetensors.torch import load_file
from test_recipe_end_to_end import TIMEOUT_S, finish, num_stored, records, start, write_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * TIMEOUT_S)]
NUM_RESPONSES = 32
SMALL = [
    *("--warmup-target", "0", "--heldout-limit", "16", "--checkpoint-every", "1", "--steps", "2"),
    *("--prompts-per-step", "8", "--samples-per-prompt", "4", "--minibatch-size", "16"),
    *("--microbatch-size", "8", "--nproc", "2", "--tiny-layers", "2", "--max-new-tokens", "16"),
]
RANKS = "Ranks, by node: "


def lose_node_of_rank_1(process, cluster, run_dir):
    """Lose it in the rollout of step 2; return its address."""
    line = next(line for line in process.stdout if line.startswith(RANKS))
    address = line.removeprefix(RANKS).split(", ")[1].strip()
    deadline = time.monotonic() + TIMEOUT_S
    while num_stored(run_dir, 2) < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.02)
    cluster.lose(address)
    return address


def processes_of(folder):
    """Servers, and whatever else has the folder in its command line."""
    lines = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(process.cmdline()))
    return [line for line in lines if str(folder) in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of the run without Ray, of the one that lost a node, and of its resumed end: the outcome."""
    folder = tmp_path_factory.mktemp("ray")
    flags = [*SMALL, *write_prompts(folder), "--cache-dir", str(folder / "cache")]
    runs = {"folder": folder, "local": finish(start(folder / "local", *flags))}
    with LocalCluster([1, 1, 1]) as cluster, contextlib.ExitStack() as stack:
        process = start(folder / "on_ray", *flags, "--ray", cluster.address)
        stack.callback(process.kill)
        runs["lost"] = lose_node_of_rank_1(process, cluster, folder / "on_ray")
        runs["broken"] = finish(process)
        runs["left"] = processes_of(folder)
        runs["stored"] = num_stored(folder / "on_ray", 2)
        cluster.add(1)
        runs["resumed"] = finish(start(folder / "on_ray", "--resume"))
        runs["left"] += processes_of(folder)
    return runs


def test_a_lost_node_ends_the_run_with_one_message_and_leaves_nothing_behind(runs):
    output, status = runs["broken"]
    assert status == 1, output
    error = output[output.rindex("\nerror: ") :]
    assert error.startswith("\nerror: rank 1 died with its actor")
    assert f"node {runs['lost']}" in error
    assert f"--run-dir {runs['folder'] / 'on_ray'} --resume" in error
    assert runs["left"] == []


def test_a_resume_samples_none_of_the_stored_responses_again(runs):
    output, status = runs["resumed"]
    assert status == 0, output
    steps = records(runs["folder"] / "on_ray")
    assert [step["rollout/stored_responses"] for step in steps[1:]] == [0, runs["stored"]]
    assert 0 < runs["stored"] <= NUM_RESPONSES


def test_the_runs_with_and_without_ray_are_alike_but_for_what_was_sampled(runs):
    output, status = runs["local"]
    assert status == 0, output
    local, on_ray = (runs["folder"] / name for name in ("local", "on_ray"))
    assert [step.keys() for step in records(on_ray)] == [step.keys() for step in records(local)]
    for step in records(on_ray)[1:]:
        assert step["routing_replay/coverage"] == 1
        assert step["train_infer/kl_k3"] < step["train_infer/kl_k3_live"]
        assert step["rollout/servers"] == 1
    consumed = "checkpoints/step_000002/trainer/state.json"
    assert json.loads((on_ray / consumed).read_text()) == json.loads((local / consumed).read_text())
    prompts = [prompt_tokens(run_dir / "last_batch") for run_dir in (local, on_ray)]
    assert len(prompts[0]) == NUM_RESPONSES and prompts[0] == prompts[1]
    assert (on_ray / "report.html").is_file()


def prompt_tokens(folder):
    """The tokens before the first sampled one, of each sequence."""
    batch = load_file(folder / "batch.safetensors")
    num_positions = (batch["lengths_S"] - 1).tolist()
    columns = (batch[name].split(num_positions) for name in ("input_ids_N", "mask_N"))
    rows = zip(*columns, strict=True)
    return [ids_T[: int(mask_T.int().argmax()) + 1].tolist() for ids_T, mask_T in rows]
