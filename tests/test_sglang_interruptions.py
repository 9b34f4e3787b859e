"""Rows stay those of the right pass through aborts, pauses, retractions and weight updates."""

from dataclasses import replace

import httpx
import numpy as np
import pytest
from sglang_checks import assert_ids_follow, assert_true, tokens_of
from sglang_servers import random_prompt, request, while_running

from routing_replay.rollout import RolloutClient, sample_of
from routing_replay.routes.origin import Origin
from routing_replay.routes.spans import Span, Trajectory
from routing_replay.sglang import versions


def test_an_aborted_request_returns_the_rows_of_the_tokens_it_returns(server, references):
    asked = request(random_prompt(8), num_new=400)
    completion = while_running(server, [asked], lambda: server.client.abort())[0]
    assert completion.finish_reason == "abort"
    assert 0 < len(completion.output_ids) < 400
    assert_true(asked, completion, references[0])


def test_what_someone_else_aborts_is_continued_to_the_same_rows_and_log_probs(server, references):
    """Greedy, so that the parts together must be the answer that nobody aborted."""
    sampling = {"temperature": 0.0, "max_new_tokens": 300, "ignore_eos": True}
    asked = [
        replace(request(random_prompt(60 + n)), sampling=sampling, num_top_logprobs=3)
        for n in range(3)
    ]
    whole = server.client.generate(asked)
    server.client.flush_cache()
    before = server.client.counts.get("continued", 0)
    other = RolloutClient([server.server.url])
    joined = while_running(server, asked, other.abort)
    assert server.client.counts["continued"] > before
    for one, uninterrupted, completion in zip(asked, whole, joined, strict=True):
        assert (completion.finish_reason, len(completion.output_ids)) == ("length", 300)
        assert_true(one, completion, references[0])
        assert completion.output_ids == uninterrupted.output_ids
        np.testing.assert_allclose(
            completion.mu_logprobs, uninterrupted.mu_logprobs, rtol=0, atol=1e-4
        )
        assert completion.top_logprobs.shape == (300, 3)


def test_an_aborted_rollout_goes_on_under_newer_weights(server, references):
    """The rows of both parts are those of the passes that returned their log-probs."""
    asked = request(random_prompt(46), num_new=400)
    (first,) = while_running(server, [asked], server.client.abort)
    known = first.routes.num_rows
    server.client.update_weights(str(server.checkpoints[1]), 1)
    resumed = request([*asked.input_ids, *first.output_ids], num_new=10, start=known)
    (second,) = server.client.generate([resumed])
    parts = [sample_of(asked, first), sample_of(resumed, second)]
    prompt = Span(sample=parts[0], part="prompt")
    whole = Trajectory.from_spans([prompt, *(Span(sample=part) for part in parts)]).routes
    assert whole.weight_version_T.tolist() == [0] * known + [1] * 10
    assert_true(asked, first, references[0])
    assert_true(resumed, second, references[1])
    # Asked for from the start, the second pass covers its whole prompt: all rows of one version.
    again = request([*asked.input_ids, *first.output_ids], num_new=10)
    (third,) = server.client.generate([again])
    assert third.routes.weight_version_T.tolist() == [1] * (known + 10)
    assert_true(again, third, references[1])


@pytest.mark.parametrize("flush_cache", [True, False])
def test_rows_survive_retraction_under_the_weights_that_computed_them(
    server, references, flush_cache
):
    """Stock prefills again and returns the second pass's rows: here those of other weights."""
    if flush_cache and versions.installed() < (0, 5, 21):
        pytest.skip("SGLang before 0.5.21 cannot flush its cache while requests wait")
    asked = [request(random_prompt(40 + n), num_new=200) for n in range(3)]

    def retract_and_update():
        server.client.pause("retract")
        server.client.update_weights(str(server.checkpoints[1]), 1, flush_cache)
        server.client.resume()

    for one, completion in zip(
        asked, while_running(server, asked, retract_and_update), strict=True
    ):
        routes = completion.routes
        assert completion.num_retractions == 1
        assert routes.covered_T.all()
        versions_T = routes.weight_version_T
        num_old = int((versions_T == 0).sum())
        # Old rows first, then new ones; both kinds exist, and the cut is within the response.
        assert versions_T.tolist() == [0] * num_old + [1] * (len(versions_T) - num_old)
        assert 20 < num_old < len(versions_T)
        tokens = tokens_of(one, completion)
        old_TLE = references[0](tokens[:num_old], routes=routes[:num_old])[0]
        assert_ids_follow(routes[:num_old], old_TLE)
        # Without a flush the second prefill attends to the prompt as the old weights saw it.
        num_cached = 0 if flush_cache else len(one.input_ids)
        cache = references[0](tokens[:num_cached])[2] if num_cached else None
        new_TLE, _, _ = references[1](tokens[num_cached:], cache, routes[num_old:])
        assert_ids_follow(routes[num_old:], new_TLE[num_old - num_cached :])
        # The row at the cut is the second prefill's: its token is the first of the new weights.
        assert routes.origin_T[num_old] == Origin.PREFILL
        assert routes.origin_T[num_old - 1] == Origin.DECODE


def test_a_retraction_for_lack_of_slots_leaves_every_row_its_first_pass(server, references):
    # 8 x (20 + 350) tokens do not fit into 2048 slots. SGLang bets that most requests end early,
    # unless they cannot; these could and do not (the model has no end-of-sequence token).
    asked = [request(random_prompt(70 + n), num_new=350) for n in range(8)]
    for one in asked:
        one.sampling["ignore_eos"] = False
    completions = server.client.generate(asked)
    assert sum(completion.num_retractions for completion in completions) > 0
    for one, completion in zip(asked, completions, strict=True):
        assert_true(one, completion, references[0])
        # The prompt, and for each retraction the one row that no pass had computed before.
        num_prefilled = int((completion.routes.origin_T == Origin.PREFILL).sum())
        assert num_prefilled == 20 + completion.num_retractions


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_rows_are_true_whichever_way_generation_is_paused(server, references, mode):
    asked = request(random_prompt(45), num_new=300)

    def pause():
        server.client.pause(mode)
        server.client.resume()

    (completion,) = while_running(server, [asked], pause)
    assert_true(asked, completion, references[0])
    assert completion.num_retractions == (mode == "retract")
    assert completion.finish_reason == ("abort" if mode == "abort" else "length")
    num_prefilled = int((completion.routes.origin_T == Origin.PREFILL).sum())
    assert num_prefilled == 20 + (mode == "retract")


def test_an_update_in_place_changes_the_version_in_the_middle_of_a_response(server, references):
    asked = request(random_prompt(50), num_new=400)

    def update():
        server.client.pause("in_place")
        server.client.update_weights(str(server.checkpoints[1]), 1, flush_cache=False)
        server.client.resume()

    (completion,) = while_running(server, [asked], update)
    routes = completion.routes
    assert completion.num_retractions == 0
    num_old = int((routes.weight_version_T == 0).sum())
    assert 20 < num_old < routes.num_rows
    tokens = tokens_of(asked, completion)
    old_TLE, _, cache = references[0](tokens[:num_old], routes=routes[:num_old])
    new_TLE, _, _ = references[1](tokens[num_old:], cache, routes[num_old:])
    assert_ids_follow(routes[:num_old], old_TLE)
    assert_ids_follow(routes[num_old:], new_TLE)


def test_a_prefix_that_outlives_an_update_keeps_its_old_version(server):
    asked = request(random_prompt(60))
    server.client.generate([asked])
    server.client.update_weights(str(server.checkpoints[1]), 5, flush_cache=False)
    (completion,) = server.client.generate([asked])
    stale = completion.cached_tokens
    assert stale >= 16
    assert completion.routes.weight_version_T[:stale].tolist() == [0] * stale
    assert set(completion.routes.weight_version_T[stale:]) == {5}
    fresh = completion.routes.without_versions_before(5)
    assert int(fresh.covered_T.sum()) == completion.routes.num_rows - stale


def test_an_update_without_a_version_leaves_rows_of_unknown_version(server, references):
    url = server.server.url
    body = {"model_path": str(server.checkpoints[1]), "flush_cache": True}
    httpx.post(f"{url}/update_weights_from_disk", json=body, timeout=120).raise_for_status()
    asked = request(random_prompt(61))
    (completion,) = server.client.generate([asked])
    assert_true(asked, completion, references[1])
    assert set(completion.routes.weight_version_T) == {-1}


def test_after_an_update_the_log_probs_are_those_of_the_new_weights(server, references):
    server.client.update_weights(str(server.checkpoints[1]), 7)
    asked = request(random_prompt(9))
    (completion,) = server.client.generate([asked])
    assert completion.weight_version == "7"
    assert completion.cached_tokens == 0
    assert_true(asked, completion, references[1])
