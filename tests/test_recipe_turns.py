"""Responses with tools, branches and aborts on a real server: every row is a reference's."""

import threading

import numpy as np
import pytest
from recipe_rollouts import rollout_of, samples_of
from sglang_checks import assert_ids_follow
from sglang_servers import wait_for_decoding

from recipes.minirl.rollout.turns import TOOLS, Tool

__all__ = ["rollout_of"]  # a fixture
RETURNED = [9, 10, 11]


@pytest.fixture
def tool(monkeypatch):
    """The tests' vocabulary has no digits: every token t7, t70 .. t79 is a call."""
    tool = Tool(stop="t7", run=lambda text: " ".join(f"t{token}" for token in RETURNED))
    monkeypatch.setitem(TOOLS, "calculator", tool)


def assert_exact(sample, reference):
    """Rows, log-probs and mask are those of one forward of the whole sequence."""
    tokens = [*sample.prompt_ids, *sample.response_ids]
    logits_TLE, logprobs_TV, _ = reference(tokens[:-1], routes=sample.routes)
    assert sample.routes.covered_T.all()
    assert_ids_follow(sample.routes, logits_TLE)
    sampled_T = sample.predicts_sampled_T[len(sample.prompt_ids) - 1 :]
    positions = len(sample.prompt_ids) + np.flatnonzero(sampled_T)
    mu = logprobs_TV[positions - 1, np.array(tokens)[positions]]
    np.testing.assert_allclose(sample.logp_mu, mu, atol=2e-3)
    returned = np.array(sample.response_ids)[~sampled_T].tolist()
    assert returned == RETURNED * (len(returned) // 3)
    return len(returned) // 3


def test_rows_of_responses_with_several_calls_in_branches_of_one_prompt(
    rollout_of, references, tool
):
    rollout = rollout_of("--tool", "calculator", "--tool-calls", "3", "--max-new-tokens", "48")
    samples = samples_of(rollout, ["", ""], 4)
    num_calls = [assert_exact(sample, references[0]) for sample in samples]
    # A token is a call with a probability of about 11 / 128: four calls or more in 8 x 48 tokens.
    assert sum(num_calls) >= 4
    assert max(num_calls) <= 3


def test_responses_that_are_aborted_go_on(rollout_of, references, sglang_server):
    rollout = rollout_of("--max-new-tokens", "300")
    samples = []
    thread = threading.Thread(target=lambda: samples.extend(samples_of(rollout, [""], 4)))
    thread.start()
    wait_for_decoding(sglang_server.server.log_path, 4)
    sglang_server.client.abort()
    thread.join(timeout=300)
    assert [len(sample.response_ids) for sample in samples] == [300] * 4
    for sample in samples:
        assert_exact(sample, references[0])
