"""Answers that were aborted are continued or sampled again."""

from dataclasses import replace

import numpy as np
import pytest
from rollout_servers import MODEL, QUICK, AbortingServer, FakeServer, asked
from test_payload import random_ids

from routing_replay.errors import ServerError
from routing_replay.rollout import (
    RolloutClient,
)

pytest.importorskip("aiohttp")


def test_an_aborted_answer_is_continued_elsewhere_and_joined():
    request = asked(sampling={"max_new_tokens": 12}, wants_sampling_mask=True, num_top_logprobs=2)
    with AbortingServer() as one, AbortingServer() as other:
        client = RolloutClient([one.url, other.url], MODEL, QUICK)
        (completion,) = client.generate([request])
    assert client.counts == {"continued": 2}
    assert completion.finish_reason == "length"
    assert completion.output_ids == list(range(5, 17))
    np.testing.assert_array_equal(completion.mu_logprobs, -0.125 * np.arange(5, 17))
    np.testing.assert_array_equal(completion.mask_logprobs, -0.0625 * np.arange(5, 17))
    assert completion.sampling_mask == [[0, t] for t in range(5, 17)]
    np.testing.assert_array_equal(completion.top_ids[:, 0], np.arange(5, 17))
    assert completion.top_logprobs.shape == (12, 2)
    np.testing.assert_array_equal(completion.routes.expert_ids_TLK, random_ids(16))
    # Row 8 is the last token of the first part: it was sampled then, and fed in the second.
    assert completion.routes.weight_version_T.tolist() == [0] * 8 + [1] * 8


def test_a_speculative_servers_last_drafts_are_sampled_again():
    """Any token of a step's three may be a stop token."""
    with AbortingServer(num_new=((5, 6), (8, 9)), num_drafts=3) as fake:
        client = RolloutClient([fake.url], MODEL, QUICK)
        (completion,) = client.generate([asked(sampling={"max_new_tokens": 12})])
    assert completion.output_ids == list(range(5, 17))
    np.testing.assert_array_equal(completion.routes.expert_ids_TLK, random_ids(16))
    assert completion.routes.weight_version_T.tolist() == [0] * 7 + [1] * 9


def aborting(num_aborts, cut):
    """Abort the first generations; `cut` changes what is known of them."""
    aborts = iter(range(num_aborts))

    def misbehave(route, body, answer):
        if route == "/generate" and next(aborts, None) is not None:
            answer["meta_info"]["finish_reason"] = {"type": "abort"}
            cut(answer["meta_info"])
        return 200, answer

    return misbehave


def drop_tokens(meta_info):
    meta_info["output_token_logprobs"] = []
    del meta_info["routed_experts"]


def drop_rows(meta_info):
    del meta_info["routed_experts"]


@pytest.mark.parametrize("cut", [drop_tokens, drop_rows])
def test_a_request_that_was_aborted_while_it_waited_is_sent_again_as_often_as_it_takes(cut):
    """SGLang has no rows of one that was retracted, and a part of its tokens."""
    with FakeServer(aborting(QUICK.num_retries + 2, cut)) as fake:
        client = RolloutClient([fake.url], MODEL, QUICK)
        (completion,) = client.generate([asked(sampling={"max_new_tokens": 3})])
        assert [body["input_ids"] for route, body in fake.calls if route == "/generate"] == [
            list(range(5))
        ] * (QUICK.num_retries + 3)
    assert completion.output_ids == [7, 8, 9]
    assert completion.routes.num_rows == 7
    assert client.counts == {"retried": QUICK.num_retries + 2}


def test_what_this_client_aborted_without_rows_has_no_tokens():
    clients = []

    def abort_first(route, body, answer):
        if route == "/generate":
            clients[0].abort()
        return aborting(1, drop_rows)(route, body, answer)

    with FakeServer(abort_first) as fake:
        clients.append(RolloutClient([fake.url], MODEL, QUICK))
        (completion,) = clients[0].generate([asked(sampling={"max_new_tokens": 3})])
    assert (completion.finish_reason, completion.output_ids) == ("abort", [])
    assert completion.routes is None


def test_a_request_that_is_aborted_for_longer_than_its_timeout_is_given_up():
    options = replace(QUICK, request_timeout_s=0.3)
    with FakeServer(aborting(1000, drop_tokens)) as fake:
        client = RolloutClient([fake.url], MODEL, options)
        with pytest.raises(ServerError, match="aborted again and again.*the last one 0 tokens"):
            client.generate([asked(sampling={"max_new_tokens": 3})])
        assert client.faults == {fake.url: 0}


def test_what_this_client_aborted_is_returned_as_it_is():
    clients = []

    def abort_first(route, body, answer):
        if route == "/generate":
            clients[0].abort()
        return 200, answer

    with AbortingServer(abort_first) as fake:
        clients.append(RolloutClient([fake.url], MODEL, QUICK))
        (completion,) = clients[0].generate([asked(sampling={"max_new_tokens": 12})])
    assert (completion.finish_reason, len(completion.output_ids)) == ("abort", 5)


@pytest.mark.parametrize(
    "sampling",
    [
        {"max_new_tokens": 12, "frequency_penalty": 0.5},
        {"max_new_tokens": 12, "stop": ["\n"]},
        {"max_new_tokens": 12, "repetition_penalty": 1.1},
    ],
)
def test_an_aborted_answer_that_cannot_be_continued_exactly_is_sampled_again(sampling):
    with FakeServer(aborting(2, lambda meta_info: None)) as fake:
        client = RolloutClient([fake.url], MODEL, QUICK)
        (completion,) = client.generate([asked(sampling=sampling)])
        assert completion.output_ids == [7, 8, 9]
        bodies = [body for route, body in fake.calls if route == "/generate"]
        assert [len(body["input_ids"]) for body in bodies] == [5, 5, 5]
        # The server was well: someone else aborted.
        assert client.faults == {fake.url: 0}
