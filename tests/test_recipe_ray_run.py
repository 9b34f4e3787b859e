"""The recipe trained on Ray: each actor on a raylet of its own, a node lost in mid-step, a resume.

The slow tests resume, with a run of the launcher without Ray beside it. Servers sample without a
seed, so that responses differ; what does not depend on them is the same.
"""

import contextlib
import json
import time

import psutil
import pytest
from ray_clusters import LocalCluster
from safetensors.torch import load_file
from test_recipe_end_to_end import TIMEOUT_S, finish, num_stored, records, start, write_prompts

pytestmark = pytest.mark.timeout(4 * TIMEOUT_S)
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
def cluster():
    with LocalCluster([1, 1, 1]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cluster):
    """Of the run that lost a node in step 2: its flags, its outcome, and what it left."""
    folder = tmp_path_factory.mktemp("ray")
    flags = [*SMALL, *write_prompts(folder), "--cache-dir", str(folder / "cache")]
    runs = {"folder": folder, "flags": flags}
    with contextlib.ExitStack() as stack:
        process = start(folder / "on_ray", *flags, "--ray", cluster.address)
        stack.callback(process.kill)
        runs["lost"] = lose_node_of_rank_1(process, cluster, folder / "on_ray")
        runs["broken"] = finish(process)
    runs["left"] = processes_of(folder)
    runs["steps"] = records(folder / "on_ray")
    runs["stored"] = num_stored(folder / "on_ray", 2)
    return runs


@pytest.fixture(scope="module")
def resumed(runs, cluster):
    """The output and status of its end, on a new node."""
    cluster.add(1)
    return finish(start(runs["folder"] / "on_ray", "--resume"))


def assert_trained(steps):
    for step in steps:
        assert step["routing_replay/coverage"] == 1
        assert step["train_infer/kl_k3"] < step["train_infer/kl_k3_live"]
        assert step["rollout/servers"] == 1


def test_a_step_trains_with_its_ranks_and_its_server_on_nodes_of_their_own(runs):
    first = runs["steps"][1:]
    assert [step["step"] for step in first] == [1]
    assert_trained(first)


def test_a_lost_node_ends_the_run_with_one_message_and_leaves_nothing_behind(runs):
    output, status = runs["broken"]
    assert status == 1, output
    error = output[output.rindex("\nerror: ") :]
    assert error.startswith("\nerror: rank 1 died with its actor")
    assert f"node {runs['lost']}" in error
    assert f"--run-dir {runs['folder'] / 'on_ray'} --resume" in error
    assert runs["left"] == []


@pytest.mark.slow
def test_a_resume_samples_none_of_the_stored_responses_again(runs, resumed):
    output, status = resumed
    assert status == 0, output
    steps = records(runs["folder"] / "on_ray")
    assert [step["rollout/stored_responses"] for step in steps[1:]] == [0, runs["stored"]]
    assert 0 < runs["stored"] <= NUM_RESPONSES
    assert processes_of(runs["folder"]) == []


@pytest.mark.slow
@pytest.mark.usefixtures("resumed")
def test_the_runs_with_and_without_ray_are_alike_but_for_what_was_sampled(runs):
    local, on_ray = (runs["folder"] / name for name in ("local", "on_ray"))
    output, status = finish(start(local, *runs["flags"]))
    assert status == 0, output
    assert [step.keys() for step in records(on_ray)] == [step.keys() for step in records(local)]
    assert_trained(records(on_ray)[1:])
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
