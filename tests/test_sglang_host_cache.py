"""Prefixes return from a cache on the host in other slots, with their rows; without chunks.

What holds without such a cache holds with it: some of the other files' tests run again.
"""

import httpx
import pytest
from sglang_checks import assert_ids_follow, assert_true
from sglang_servers import MODEL, random_prompt, request, running
from test_sglang_capture import (
    test_a_long_prompt_is_true_over_all_its_chunks,
    test_a_prefix_hit_returns_the_rows_that_computed_the_prefix,
    test_an_agent_with_tools_and_branches_gets_the_row_of_every_token,
)
from test_sglang_interruptions import (
    test_a_retraction_for_lack_of_slots_leaves_every_row_its_first_pass,
)

from routing_replay.rollout import completion_of
from routing_replay.sglang import versions

__all__ = [
    "test_a_long_prompt_is_true_over_all_its_chunks",
    "test_a_prefix_hit_returns_the_rows_that_computed_the_prefix",
    "test_a_retraction_for_lack_of_slots_leaves_every_row_its_first_pass",
    "test_an_agent_with_tools_and_branches_gets_the_row_of_every_token",
]
pytestmark = [
    pytest.mark.skipif(
        versions.installed() < versions.COVERS_FEATURES, reason="older SGLangs are refused with it"
    ),
    pytest.mark.slow,  # a server of its own
]
ARGUMENTS = (
    *("--enable-hierarchical-cache", "--hicache-ratio", "4"),
    *("--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"),
    *("--hicache-write-policy", "write_through"),
    # Prompts are far longer than the 8 requests for which SGLang's own buffer would have room.
    *("--chunked-prefill-size", "-1", "--mem-fraction-static", "0.5"),
)


@pytest.fixture(scope="module")
def sglang_server():
    with running("logits", *ARGUMENTS) as server:
        yield server


def post(server, asked):
    url = server.server.url
    answer = httpx.post(f"{url}/generate", json=asked.to_json(), timeout=120).json()
    details = answer["meta_info"].get("cached_tokens_details") or {}
    return completion_of(answer, asked, url, MODEL), details


def evict(server, seed):
    """Fill the device's 2,048 slots with other prompts, twice over."""
    server.client.generate([request(random_prompt(seed + n, length=200)) for n in range(20)])


def test_a_prefix_comes_back_from_the_host_with_its_rows(server, references):
    asked = request(random_prompt(80, length=100))
    first, _ = post(server, asked)
    assert_true(asked, first, references[0])
    evict(server, 1000)
    later = request([*asked.input_ids, *first.output_ids, 5, 6, 7])
    second, details = post(server, later)
    # The answer's last token is among them: the step in flight computed its row.
    assert details["host"] >= 110
    assert_true(later, second, references[0])
    assert second.routes.covered_T.all()
    # Once more from the host: rows of rows that had come from there.
    evict(server, 2000)
    third, details = post(server, later)
    assert details["host"] >= 110
    assert_true(later, third, references[0])


def test_a_prefix_from_the_host_keeps_the_version_of_its_weights(server, references):
    asked = request(random_prompt(81, length=60))
    post(server, asked)
    evict(server, 3000)
    server.client.update_weights(str(server.checkpoints[1]), 3, flush_cache=False)
    completion, details = post(server, asked)
    num_cached = completion.cached_tokens
    assert details["host"] >= 50
    versions_T = completion.routes.weight_version_T
    assert versions_T.tolist() == [0] * num_cached + [3] * (len(versions_T) - num_cached)
    logits_TLE, _, _ = references[0](asked.input_ids[:num_cached])
    assert_ids_follow(completion.routes[:num_cached], logits_TLE)
