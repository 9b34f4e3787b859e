"""What stock SGLang gets wrong, provoked on a stock server: the tests of ours would catch it.

If one of these fails because stock became right, what it describes in docs/capture.md is history.
"""

import threading

import httpx
import numpy as np
import pytest
from sglang_checks import assert_ids_follow, tokens_of
from sglang_servers import MODEL, random_prompt, request, running, wait_for_decoding

from routing_replay.rollout import completion_of
from routing_replay.routes.payload import FIELD, decode
from routing_replay.sglang import versions

pytestmark = [
    pytest.mark.skipif(
        versions.installed() < (0, 5, 21), reason="older ones cannot flush while requests wait"
    ),
    pytest.mark.slow,  # a server of its own, and no promise of ours
]


@pytest.fixture(scope="module")
def sglang_server():
    with running("stock") as server:
        yield server


def post(server, asked):
    url = f"{server.server.url}/generate"
    return httpx.post(url, json=asked.to_json(), timeout=300).json()


def test_stock_returns_rows_of_another_pass_after_a_retraction(server, references):
    asked = request(random_prompt(40), num_new=200, capture="stock")
    answers = []
    thread = threading.Thread(target=lambda: answers.append(post(server, asked)))
    thread.start()
    wait_for_decoding(server.server.log_path, 1)
    server.client.pause("retract")
    server.client.update_weights(str(server.checkpoints[1]), 1)
    server.client.resume()
    thread.join(timeout=300)
    completion = completion_of(answers[0], asked, server.server.url, MODEL)
    assert completion.num_retractions == 1
    tokens = tokens_of(asked, completion)
    old_TLE, logprobs_TV, _ = references[0](tokens)
    # The first log-prob is the old weights', so row 19 should be theirs too ...
    expected = logprobs_TV[19, completion.output_ids[0]]
    np.testing.assert_allclose(completion.mu_logprobs[0], expected, atol=2e-3)
    text = answers[0]["meta_info"][FIELD]
    claimed = decode({FIELD: text}, num_tokens=len(tokens) + 1, shape=MODEL)
    with pytest.raises(AssertionError):
        assert_ids_follow(claimed[:20], old_TLE[:20])
    # ... and is the new ones'. So are all rows, and nothing in them says so.
    assert_ids_follow(claimed, references[1](tokens)[0])
    assert claimed.covered_T.all()
    # What we make of it: the count of retractions is all we know, and no row is vouched for.
    assert not completion.routes.covered_T.any()


def test_stock_cannot_say_that_a_prefix_is_of_older_weights(server, references):
    asked = request(random_prompt(60), capture="stock")
    server.client.generate([asked])
    server.client.update_weights(str(server.checkpoints[1]), 5, flush_cache=False)
    (completion,) = server.client.generate([asked])
    num_stale, routes = completion.cached_tokens, completion.routes
    assert num_stale >= 16
    tokens = tokens_of(asked, completion)
    assert_ids_follow(routes[:num_stale], references[0](tokens)[0][:num_stale])
    with pytest.raises(AssertionError):
        assert_ids_follow(routes[:num_stale], references[1](tokens)[0][:num_stale])
    # Nothing tells the stale rows from the fresh ones: all have an unknown version, and a trainer
    # that insists on version 5 gets none of them.
    assert set(routes.weight_version_T) == {-1}
    assert not routes.without_versions_before(5).covered_T.any()
