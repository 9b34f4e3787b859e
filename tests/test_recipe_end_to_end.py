"""recipes.minirl as a user runs it: real SGLang server, real Megatron trainer, kill and resume.

Two launches start a server of their own, as SGLang's start costs more than the training here; the
others share one by `--rollout-url`.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from recipes.serving.server import ServerOptions, launch

ROOT = Path(__file__).parent.parent
NUM_STEPS = 3
# Of one launch, on a machine that others use as well; about 40 s on two free cores.
TIMEOUT_S = 600
pytestmark = pytest.mark.timeout(4 * TIMEOUT_S)
SMALL = [
    *("--warmup-target", "0", "--heldout-limit", "16", "--checkpoint-every", "1"),
    *("--prompts-per-step", "8", "--samples-per-prompt", "4", "--minibatch-size", "8"),
    *("--steps", str(NUM_STEPS)),
]


def write_prompts(folder):
    """Prompts whose right answer is to stop at once: random weights do so now and then."""
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    for path, numbers in zip(paths, (range(10, 60), range(60, 99)), strict=True):
        lines = [{"prompt": f"{a}+{a}=", "answer": "", "verifier": "exact"} for a in numbers]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--prompts", str(paths[0]), "--heldout-prompts", str(paths[1])]


def start(run_dir, *flags):
    command = [sys.executable, "-m", "recipes.minirl", "--run-dir", str(run_dir), *flags]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    """Its output and exit code; ended if it takes too long."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    return output, process.returncode


def records(run_dir):
    path = run_dir / "metrics.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def num_stored(run_dir, step):
    """Responses of a step that are on the disk."""
    paths = (run_dir / "answers" / f"step_{step:06d}").glob("*.jsonl")
    return sum(path.read_bytes().count(b"\n") for path in paths)


def wait_until(process, is_time):
    """Return when it is time; fail with what the launcher says if that never comes."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_time():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it was never time:\n{process.communicate()[0]}", pytrace=False)
        time.sleep(0.02)


def kill_when(process, is_time, is_victim):
    """Kill one process of the run when it is time; what the launcher then says."""
    wait_until(process, is_time)
    children = psutil.Process(process.pid).children(recursive=True)
    (victim,) = [child for child in children if is_victim(child)]
    victim.kill()
    return finish(process)


def is_trainer(child):
    return "recipes.minirl.train" in child.cmdline() and "RANK" in child.environ()


def is_server(child):
    return child.cmdline()[1:3] == ["-m", "forked_server"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for runs, and in it the tiny model once it is made."""
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture(scope="module")
def run(folder):
    """A run whose server is killed after step 1, and which goes on to its end."""
    run_dir = folder / "run"
    flags = [*SMALL, *write_prompts(folder), "--cache-dir", str(folder / "cache")]
    with contextlib.ExitStack() as stack:
        process = start(run_dir, *flags)
        stack.callback(process.kill)
        return run_dir, kill_when(process, lambda: len(records(run_dir)) > 1, is_server)


@pytest.fixture(scope="module")
def server_url(run, folder):
    """A server of the tiny model, which the runs of these tests have in common."""
    (model,) = (folder / "cache").glob("tiny-*")
    options = ServerOptions(
        capture="gates",
        arguments=("--dtype", "bfloat16", "--skip-tokenizer-init"),
        environment={"OMP_NUM_THREADS": "1"},
    )
    with launch(model, options) as server:
        yield server.url


def test_a_killed_server_is_started_again_and_gets_the_weights_of_the_step(run):
    run_dir, (output, status) = run
    assert status == 0, output
    assert output.count("SGLang is started again at http://127.0.0.1:") == 1
    left, loads, returned = (
        output.index(text) for text in ("is left out", "healthy again and loads", "in use again")
    )
    assert left < loads < returned
    steps = records(run_dir)[1:]
    # The answers of a step are of the weights before it, whichever process gave them.
    assert all(step["rollout/servers"] == 1 for step in steps)
    assert "Traceback" not in output


def test_the_run_ends_well_with_every_step_once(run):
    run_dir, (output, status) = run
    assert status == 0, output
    assert [record["step"] for record in records(run_dir)] == list(range(NUM_STEPS + 1))
    assert f"Result: {NUM_STEPS} steps" in output
    assert (run_dir / "report.html").stat().st_size > 10_000
    kept = {path.name for path in (run_dir / "last_batch").iterdir()}
    assert {"batch.safetensors", "routes.safetensors"} <= kept
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == [
        f"step_{NUM_STEPS - 1:06}",
        f"step_{NUM_STEPS:06}",
    ]


def test_every_step_was_replayed_and_measured_with_and_without_replay(run):
    steps = records(run[0])[1:]
    for step in steps:
        # Coverage is over the positions whose label was sampled: each was consumed and has a row.
        assert step["routing_replay/coverage"] == 1
        assert step["train_infer/kl_k3"] < step["train_infer/kl_k3_live"]
        assert 0 < step["routing_replay/overlap"]["mean"] <= 1
        assert step["routing_replay/router_kl_bound"]["mean"] >= 0
        assert step["routing_replay/overlap"]["layers"].keys() == {str(i) for i in range(6)}
        for name in ("reward", "entropy", "staleness/kl_k3", "off_policy/ess", "grad_norm"):
            assert name in step
    # Some response was right, so there was a gradient, and the policy moved.
    assert sum(step["grad_norm"] for step in steps) > 0
    assert max(step["staleness/logp_abs_diff_max"] for step in steps) > 0
    replayed, live = (
        sum(step[f"train_infer/kl_k3{suffix}"] for step in steps) for suffix in ("", "_live")
    )
    # On random weights a different expert means a different function.
    assert live / replayed > 5


def test_no_process_outlives_the_run(run):
    # Whatever the launcher started has the folder of the run in its command line or environment.
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            assert process.pid == os.getpid() or str(run[0]) not in " ".join(process.cmdline())


def test_a_folder_that_holds_a_run_is_not_overwritten(run):
    output, status = finish(start(run[0]))
    assert status == 1
    assert "the folder holds a run already" in output


def test_a_dead_rollout_server_is_one_clear_message(run, folder):
    flags = ["--cache-dir", str(folder / "cache"), "--rollout-url", "http://127.0.0.1:9"]
    output, status = finish(start(folder / "dead", *SMALL, *flags))
    assert status == 1
    assert "http://127.0.0.1:9" in output
    assert "Traceback" not in output


def flags_of_two_steps(folder, server_url):
    cache = ["--cache-dir", str(folder / "cache"), "--rollout-url", server_url]
    return [*SMALL, "--steps", "2", *cache, *write_prompts(folder)]


def assert_sound(steps):
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert math.isfinite(step["objective/loss"])
        assert step["objective/nonfinite_tokens"] == 0


MASKED = [
    *("--objective", "dapo", "--top-p", "0.95", "--top-k", "12"),
    *("--objective-parameters", "kl_coefficient=0.01", "entropy_coefficient=0.001"),
    *("--dynamic-sampling", "1", "--overlong-cache", "2", "--reward-kl-coefficient", "0.01"),
    *("--publish", "buckets"),
]


@pytest.fixture(scope="module")
def masked(folder, server_url):
    """A run with masks, penalties and replaced groups, whose trainer is killed in rollout 2."""
    run_dir = folder / "masked"
    with contextlib.ExitStack() as stack:
        process = start(run_dir, *flags_of_two_steps(folder, server_url), *MASKED)
        stack.callback(process.kill)
        without_trainer = kill_when(process, lambda: num_stored(run_dir, 2) > 4, is_trainer)
    stored = num_stored(run_dir, 2)
    return run_dir, (*without_trainer, stored), finish(start(run_dir, "--resume"))


def test_a_killed_trainer_ends_the_run_with_one_message_that_says_how_to_go_on(masked):
    run_dir, (output, status, _), _ = masked
    assert status == 1
    assert "error: the trainer ended with status" in output
    assert f"--run-dir {run_dir} --resume" in output


def test_a_resumed_run_does_not_sample_again_what_it_had_stored(masked):
    run_dir, (_, _, stored), (output, status) = masked
    assert status == 0, output
    assert [step["rollout/stored_responses"] for step in records(run_dir)[1:]] == [0, stored]
    # A checkpoint covers every step.
    assert not list((run_dir / "answers").iterdir())


def test_weights_reach_the_server_in_buckets_before_and_after_the_trainer_was_killed(masked):
    run_dir, *_ = masked
    assert [step["rollout/weights_by_files"] for step in records(run_dir)[1:]] == [0, 0]


def test_masks_penalties_and_replaced_groups_survive_the_resume(masked):
    run_dir, _, (output, status) = masked
    assert status == 0, output
    steps = records(run_dir)[1:]
    assert_sound(steps)
    for step in steps:
        assert step["train_infer/kl_k3"] < step["train_infer/kl_k3_live"]
        assert 0.9 < step["rollout/sampling_mask_mass"] < 1
        assert 1 <= step["rollout/sampling_rounds"] <= 2
        assert step["rollout/replaced_groups"] >= 0
        assert -1 <= step["reward/overlong_penalty"] <= 0
    # Before the first step the policy is the reference; afterwards it has moved away.
    assert abs(steps[0]["reward/kl_penalty"]) < 0.01
    assert steps[1]["objective/kl_ref"] > 0
    state = run_dir / "checkpoints" / "step_000002" / "trainer" / "state.json"
    consumed = 16 + sum(step["rollout/replaced_groups"] for step in steps)
    assert json.loads(state.read_text())["prompts_consumed"] == consumed


@pytest.mark.slow
def test_an_inner_layer_is_trained_first_and_then_the_whole_policy(folder, server_url):
    run_dir = folder / "bupo"
    flags = [*flags_of_two_steps(folder, server_url), "--internal-steps", "1"]
    output, status = finish(start(run_dir, "--preset", "tiny_bupo", *flags))
    assert status == 0, output
    steps = records(run_dir)[1:]
    assert_sound(steps)
    # The inner layer's policy has no mu to be compared with.
    assert ["off_policy/kl_k3" in step for step in steps] == [False, True]
