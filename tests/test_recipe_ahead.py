"""The recipe ahead, with real engines: killed in a rollout that ran ahead, and resumed.

One step ahead between two publications, and two steps with responses that run through them. The
resumed run must be the one that nobody killed. That one is made from the same responses: what a
server samples is not repeated.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_recipe_end_to_end import (
    ROOT,
    SMALL,
    TIMEOUT_S,
    finish,
    is_trainer,
    kill_when,
    num_stored,
    records,
    start,
    wait_until,
    write_prompts,
)

from recipes.minirl.rollout.answers import FOLDER
from recipes.minirl.rollout.batch import BATCH_FILE, Batch
from recipes.minirl.rollout.groups import INDEX_FILE
from recipes.serving.server import ServerOptions, launch
from routing_replay.metrics.version_lag import lag_suffix
from routing_replay.routes.parts import open_table
from tools.chaos.kept import kept_answers

NUM_RESPONSES = 32
# Metrics that two runs from the same responses need not share.
OWN = ("time", "eval/", "rollout/server", "rollout/stored")
# Few requests at a time and longer responses: servers sample for as long as the trainer computes.
BUSY = ["--max-running-requests", "2"]
BUSY += ["--enable-priority-scheduling", "--disable-priority-preemption"]
IN_PLACE = ["--publish-pause", "in_place", "--publish", "tensors", "--steps", "3"]
# A stand-in for a server, in a process that can be killed.
LATE = """
from tools.bench.ahead import LateServer
with LateServer(0.5, 0.5) as server:
    print(server.server_address[1], flush=True)
    server.serve_forever()
"""
MODES = {
    "one step": (["--ahead", "1"], []),
    "two steps": (
        ["--ahead", "2", "--publish-pause", "retract", "--steps", "5", "--max-new-tokens", "24"],
        BUSY,
    ),
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * TIMEOUT_S)]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """A run that was killed and resumed, and one from the same responses that was not.

    Args:
        killed, plain: Their folders.
        in_place: Folder of a run whose weights go in place, through shared memory; None: not run.
        stored: Responses of each step that were stored when it was killed.
        steps: Of which it had records then.
    """

    killed: Path
    plain: Path
    stored: dict[int, int]
    steps: list[int]
    in_place: Path | None


def prepared_model(folder, flags):
    """The folder of the tiny model, for a server of the tests."""
    output, status = finish(start(folder / "prepared", *flags, "--prepare-only"))
    assert status == 0, output
    (model,) = (folder / "cache").glob("tiny-*")
    return model


def runs_of(folder, mode):
    """Train with a server of the tests, kill the trainer in its third rollout or later, resume."""
    ahead, arguments = MODES[mode]
    flags = [*SMALL, "--tiny-layers", "2", "--cache-dir", str(folder / "cache")]
    flags += [*write_prompts(folder), *ahead, "--evaluate-every", "2"]
    model = prepared_model(folder, flags)
    killed, plain, kept = folder / "killed", folder / "plain", folder / "kept"
    in_place = folder / "in_place" if mode == "two steps" else None
    options = ServerOptions(
        capture="gates",
        arguments=("--dtype", "bfloat16", "--skip-tokenizer-init", *arguments),
        environment={"OMP_NUM_THREADS": "1"},
    )
    with launch(model, options) as server, kept_answers(killed, kept):
        flags += ["--rollout-url", server.url]
        process = start(killed, *flags)
        # One step ahead, step 3 is sampled while step 2 is trained; two, while step 1 is.
        last = 3 if mode == "one step" else 4
        kill_when(process, lambda: num_stored(killed, last) > 4, is_trainer)
        stored = {step: num_stored(killed, step) for step in range(1, 6)}
        steps = [record["step"] for record in records(killed)]
        resumed = finish(start(killed, "--resume"))
        shutil.copytree(kept, plain / FOLDER)
        ended = [resumed, finish(start(plain, *flags))]
        if in_place:
            ended.append(finish(start(in_place, *flags, *IN_PLACE)))
    for output, status in ended:
        assert status == 0, output
    return Runs(killed=killed, plain=plain, stored=stored, steps=steps, in_place=in_place)


@pytest.fixture(scope="module")
def one_ahead(tmp_path_factory):
    return runs_of(tmp_path_factory.mktemp("one"), "one step")


@pytest.fixture(scope="module")
def two_ahead(tmp_path_factory):
    return runs_of(tmp_path_factory.mktemp("two"), "two steps")


def assert_same(runs):
    """The resumed run and the one that nobody killed agree bitwise."""
    for one, other in zip(records(runs.killed), records(runs.plain), strict=True):
        for name in one.keys() | other.keys():
            if not name.startswith(OWN):
                assert one.get(name) == other.get(name), name
    assert any(record.get("grad_norm") for record in records(runs.killed))
    last = f"checkpoints/step_{records(runs.killed)[-1]['step']:06d}"
    for path in (runs.plain / last).glob("*.safetensors"):
        others = load_file(runs.killed / last / path.name)
        for name, weight in load_file(path).items():
            assert torch.equal(weight, others[name]), name


def test_the_rollout_of_step_3_ran_while_step_2_was_trained(one_ahead):
    assert one_ahead.steps == [0, 1]
    # A checkpoint covers step 1, whose responses are gone; step 2 had been sampled before it.
    assert [one_ahead.stored[step] for step in (1, 2)] == [0, NUM_RESPONSES]
    assert one_ahead.stored[3] > 4


def test_a_resumed_run_samples_no_response_twice(one_ahead):
    steps = records(one_ahead.killed)
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    stored = [step["rollout/stored_responses"] for step in steps[2:]]
    assert stored == [NUM_RESPONSES, one_ahead.stored[3]]


def test_a_resumed_run_is_the_run_that_nobody_killed(one_ahead):
    assert_same(one_ahead)


def test_responses_are_one_version_old_from_step_2_on_and_reported_as_such(one_ahead):
    killed = one_ahead.killed
    steps = records(killed)[1:]
    assert [step["rollout/version_lag"] for step in steps] == [0, 1, 1]
    for step, suffix in zip(steps, ("", "_lag_1", "_lag_1"), strict=True):
        assert step["rollout/mixed_version_fraction"] == 0
        assert step["routing_replay/coverage"] == 1
        replayed, live = (step[f"train_infer/kl_k3{s}{suffix}"] for s in ("", "_live"))
        assert replayed < live
        assert step[f"routing_replay/overlap{suffix}"]["mean"] > 0
        assert len([name for name in step if name.startswith("train_infer/kl_k3")]) == 2
    batch = Batch.open(killed / "last_batch" / BATCH_FILE)
    assert set(batch.version_N[batch.mask_N].tolist()) == {1}
    table = open_table(killed / "last_batch" / INDEX_FILE, verify=True)
    assert set(table.weight_version_T.tolist()) == {1}
    assert "eval/reward" in steps[1]


def test_two_steps_ahead_weights_come_in_the_middle_of_responses(two_ahead):
    steps = records(two_ahead.killed)
    assert [step["step"] for step in steps] == list(range(6))
    for step in steps[1:]:
        number = step["step"]
        assert step["rollout/version_lag_max"] <= min(number - 1, 2)
        assert step["routing_replay/coverage"] == 1
        # Each lag of a token has a KL of its own.
        lags = {lag for lag in range(3) if f"train_infer/kl_k3{lag_suffix(lag)}" in step}
        assert max(lags) == step["rollout/version_lag_max"]
        assert f"routing_replay/overlap{lag_suffix(max(lags))}" in step
    assert max(step["rollout/version_lag_max"] for step in steps[1:]) >= 1
    assert max(step["rollout/mixed_version_fraction"] for step in steps[1:]) > 0


def test_of_several_rollouts_that_were_killed_no_response_is_sampled_twice(two_ahead):
    assert two_ahead.stored[4] > 4
    for step in records(two_ahead.killed)[1:]:
        assert step["rollout/stored_responses"] == two_ahead.stored[step["step"]]


def test_a_resumed_pool_gives_the_run_that_nobody_killed(two_ahead):
    assert_same(two_ahead)


def test_tokens_that_attend_to_keys_of_older_weights_are_counted(two_ahead):
    steps = records(two_ahead.in_place)[1:]
    assert max(step["rollout/old_context_fraction"] for step in steps) > 0
    assert max(step["rollout/mixed_version_fraction"] for step in steps) > 0
    assert {step["rollout/weights_by_files"] for step in steps} == {0.0}
    # Rows of prompts that an earlier step's weights left in the cache may be older than the lag.
    assert all(step["rollout/version_lag_max"] <= 2 for step in steps)


@pytest.mark.parametrize("mode", MODES)
def test_the_step_that_is_trained_when_all_servers_die_is_recorded(tmp_path, mode):
    command = [sys.executable, "-c", LATE]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        flags = [*SMALL, *write_prompts(tmp_path), *MODES[mode][0], "--server-recovery-s", "3"]
        flags += ["--rollout-url", f"http://127.0.0.1:{server.stdout.readline().strip()}"]
        flags += ["--routing-replay-capture", "ids", "--cache-dir", str(tmp_path / "cache")]
        process = start(tmp_path / "run", *flags)
        # Its rollout has ended; those ahead of it have begun or are about to.
        wait_until(process, lambda: num_stored(tmp_path / "run", 1) == NUM_RESPONSES)
        server.kill()
        output, status = finish(process)
    assert status != 0 and "too few servers are left" in output
    assert [record["step"] for record in records(tmp_path / "run")] == [0, 1]
    assert records(tmp_path / "run")[1]["grad_norm"] >= 0
