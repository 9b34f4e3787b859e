"""The agent's preset as a user runs it, to its end; its stored batch beside transformers."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sglang_checks import Reference, assert_ids_follow

from recipes.minirl.data.tiny_task import VOCABULARY
from recipes.minirl.rollout.batch import BATCH_FILE, Batch
from recipes.minirl.rollout.groups import INDEX_FILE
from recipes.minirl.rollout.turns import calculate
from routing_replay.routes.parts import open_table

pytestmark = pytest.mark.slow  # starts both engines, and makes a model
ROOT = Path(__file__).parent.parent
FLAGS = (
    *("--preset", "tiny_agent", "--steps", "1", "--heldout-limit", "16"),
    *("--prompts-per-step", "8", "--samples-per-prompt", "4", "--minibatch-size", "16"),
    # The reference computes in it.
    *("--microbatch-size", "16", "--rollout-dtype", "float32"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the finished run and its tiny model."""
    folder = tmp_path_factory.mktemp("agent")
    places = ["--run-dir", str(folder / "run"), "--cache-dir", str(folder / "cache")]
    done = subprocess.run(
        [sys.executable, "-m", "recipes.minirl", *FLAGS, *places],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout
    assert "Result: 1 steps" in done.stdout
    return folder


def test_every_row_of_the_stored_batch_is_that_of_a_reference(folder):
    (checkpoint,) = (folder / "cache").glob("tiny-*")
    reference = Reference(checkpoint)
    batch = Batch.open(folder / "run" / "last_batch" / BATCH_FILE)
    table = open_table(folder / "run" / "last_batch" / INDEX_FILE)
    assert len(batch.lengths_S) == 32
    num_calls = 0
    for s, length in enumerate(batch.lengths_S.tolist()):
        of_s = batch.positions(s, s + 1)
        tokens, mask_T = batch.input_ids_N[of_s], batch.mask_N[of_s]
        labels_T, mu_T = batch.labels_N[of_s], batch.logp_mu_N[of_s]
        routes = table.sequence(s)
        logits_TLE, logprobs_TV, _ = reference(tokens.tolist(), routes=routes)
        assert routes.covered_T.all()
        assert_ids_follow(routes, logits_TLE)
        expected_T = logprobs_TV[np.arange(length - 1), labels_T.numpy()]
        np.testing.assert_allclose(mu_T[mask_T], expected_T[mask_T], atol=2e-3)
        num_calls += num_true_calls(labels_T.tolist(), mask_T.numpy())
    # A warmed-up model calls the calculator in nearly every response.
    assert num_calls >= 32


def num_true_calls(labels_T, sampled_T):
    """Check that what was not sampled, after the prompt, is what the tool returns; count calls."""
    first, call, count = int(np.flatnonzero(sampled_T)[0]), "", 0
    words = [(VOCABULARY[label], bool(sampled_T[t])) for t, label in enumerate(labels_T)]
    for is_sampled, piece in itertools.groupby(words[first:], key=lambda word: word[1]):
        # Special tokens are no text.
        text = "".join(word for word, _ in piece if not word.startswith("<"))
        if is_sampled:
            call = text
        else:
            assert text == calculate(call)
            count += 1
    return count
