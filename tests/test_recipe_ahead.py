"""The recipe one step ahead, with real engines: killed in a rollout that ran ahead, and resumed.

The resumed run must be the one that nobody killed. That one is made from the same responses: what
a server samples is not repeated.
"""

import contextlib
import os
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file
from test_recipe_end_to_end import (
    SMALL,
    TIMEOUT_S,
    finish,
    is_trainer,
    kill_when,
    num_stored,
    records,
    start,
    write_prompts,
)

from recipes.minirl.rollout.answers import FOLDER
from recipes.minirl.rollout.batch import BATCH_FILE, Batch
from recipes.minirl.rollout.groups import INDEX_FILE
from recipes.serving.server import ServerOptions, launch
from routing_replay.routes.parts import open_table

NUM_RESPONSES = 32
# Metrics that two runs from the same responses need not share.
OWN = ("time", "eval/", "rollout/server", "rollout/stored")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * TIMEOUT_S)]


@contextlib.contextmanager
def kept_answers(run_dir, kept):
    """Give the stored responses a second name, which no checkpoint removes."""
    ended = threading.Event()

    def keep():
        while not ended.wait(0.02):
            for path in (run_dir / FOLDER).glob("step_*/group_*.jsonl"):
                second = kept / path.relative_to(run_dir / FOLDER)
                if not second.exists():
                    second.parent.mkdir(exist_ok=True)
                    with contextlib.suppress(FileNotFoundError):
                        os.link(path, second)

    kept.mkdir(exist_ok=True)
    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def prepared_model(folder, flags):
    """The folder of the tiny model, for a server of the tests."""
    output, status = finish(start(folder / "prepared", *flags, "--prepare-only"))
    assert status == 0, output
    (model,) = (folder / "cache").glob("tiny-*")
    return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of the killed and resumed run and of the other; responses stored when it was killed;
    the server's log."""
    folder = tmp_path_factory.mktemp("ahead")
    flags = [*SMALL, "--tiny-layers", "2", "--cache-dir", str(folder / "cache")]
    flags += [*write_prompts(folder), "--ahead", "1", "--evaluate-every", "2"]
    model = prepared_model(folder, flags)
    killed, plain, kept = folder / "killed", folder / "plain", folder / "kept"
    options = ServerOptions(
        capture="gates",
        arguments=("--dtype", "bfloat16", "--skip-tokenizer-init"),
        environment={"OMP_NUM_THREADS": "1"},
    )
    with launch(model, options) as server, kept_answers(killed, kept):
        flags += ["--rollout-url", server.url]
        process = start(killed, *flags)
        kill_when(process, lambda: num_stored(killed, 3) > 4, is_trainer)
        stored = [num_stored(killed, step) for step in (1, 2, 3)]
        steps = [record["step"] for record in records(killed)]
        resumed = finish(start(killed, "--resume"))
        shutil.copytree(kept, plain / FOLDER)
        undisturbed = finish(start(plain, *flags))
    for output, status in (resumed, undisturbed):
        assert status == 0, output
    return killed, plain, stored, steps


def test_the_rollout_of_step_3_ran_while_step_2_was_trained(runs):
    _, _, stored, steps = runs
    assert steps == [0, 1]
    # A checkpoint covers step 1, whose responses are gone; step 2 had been sampled before it.
    assert stored[:2] == [0, NUM_RESPONSES]
    assert stored[2] > 4


def test_a_resumed_run_samples_no_response_twice(runs):
    killed, _, stored, _ = runs
    steps = records(killed)
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert [step["rollout/stored_responses"] for step in steps[2:]] == [NUM_RESPONSES, stored[2]]


def test_a_resumed_run_is_the_run_that_nobody_killed(runs):
    killed, plain, _, _ = runs
    for one, other in zip(records(killed), records(plain), strict=True):
        for name in one.keys() | other.keys():
            if not name.startswith(OWN):
                assert one.get(name) == other.get(name), name
    assert any(record.get("grad_norm") for record in records(killed))
    last = "checkpoints/step_000003"
    for path in (plain / last).glob("*.safetensors"):
        others = load_file(killed / last / path.name)
        for name, weight in load_file(path).items():
            assert torch.equal(weight, others[name]), name


def test_responses_are_one_version_old_from_step_2_on_and_reported_as_such(runs):
    killed, *_ = runs
    steps = records(killed)[1:]
    assert [step["rollout/version_lag"] for step in steps] == [0, 1, 1]
    for step, suffix in zip(steps, ("", "_lag_1", "_lag_1"), strict=True):
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
