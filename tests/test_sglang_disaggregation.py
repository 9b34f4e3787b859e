"""A server that decodes what another has prefilled: SGLang's own, without a transfer.

SGLang's transfer backend `fake` brings no keys and values. Slots are zero where nothing was written
yet, so that transformers can say what the server computes after a prompt of which every key and
value is zero. SGLang starts no prefilling server on it.
"""

import httpx
import pytest
import torch
from sglang_checks import Reference, assert_ids_follow
from sglang_servers import MODEL, random_prompt, request, running

from routing_replay.rollout import completion_of
from routing_replay.routes.origin import Origin
from routing_replay.sglang import versions

pytestmark = [
    pytest.mark.skipif(
        versions.installed() < versions.COVERS_FEATURES, reason="older SGLangs are refused with it"
    ),
    pytest.mark.slow,  # a server of its own
]
ARGUMENTS = (
    *("--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "fake"),
    # So few slots that they are used again.
    *("--max-total-tokens", "160", "--num-reserved-decode-tokens", "8"),
)


@pytest.fixture(scope="module")
def decoding():
    with running("gates", *ARGUMENTS) as server:
        yield server


def post(server, asked):
    """The answer to a request whose other half is no server, and its tokens.

    SGLang makes up the token that the other half would have sampled, and has no log-prob of it.
    """
    url = server.server.url
    body = asked.to_json() | {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
    answer = httpx.post(f"{url}/generate", json=body, timeout=60).json()
    return completion_of(answer, asked, url, MODEL), answer["output_ids"]


def decoded_after_zeros(reference, num_prompt, tokens):
    """Router logits [T, L, E] of tokens after a prompt whose keys and values are zero."""
    from transformers import DynamicCache

    config, past = reference.model.config, DynamicCache()
    shape = (1, config.num_key_value_heads, num_prompt, config.head_dim)
    for layer in range(config.num_hidden_layers):
        past.update(torch.zeros(shape), torch.zeros(shape), layer)
    logits_TLE, _, _ = reference(tokens, past)
    return logits_TLE


def test_a_decoding_server_returns_the_answers_rows_and_no_row_of_the_prompt(decoding):
    asked = request(random_prompt(111, length=30), num_new=40)
    completion, output_ids = post(decoding, asked)
    routes = completion.routes
    assert routes.origin_T.tolist() == [Origin.TRANSFERRED] * 30 + [Origin.DECODE] * 39
    reference = Reference(decoding.checkpoints[0])
    assert_ids_follow(routes[30:], decoded_after_zeros(reference, 30, output_ids[:-1]))
    # These slots hold rows of the answers before; a prompt that is their twin takes none of them.
    twin = [*asked.input_ids, *output_ids]
    for prompt in (random_prompt(112, length=60), twin):
        completion, _ = post(decoding, request(prompt, num_new=8))
        routes = completion.routes
        assert not routes.covered_T[: len(prompt)].any()
        assert routes.origin_T[len(prompt) :].tolist() == [Origin.DECODE] * 7
        assert not routes.expert_ids_TLK[: len(prompt)].any()


def test_an_answer_of_the_prefilling_servers_token_alone_has_its_rows(decoding):
    """It ends before the decoding server computes anything."""
    completion, _ = post(decoding, request(random_prompt(113), num_new=1))
    assert completion.routes.origin_T.tolist() == [Origin.TRANSFERRED] * 20


def test_a_request_for_the_answers_rows_alone_is_whole(decoding):
    completion, _ = post(decoding, request(random_prompt(114), num_new=9, start=20))
    assert completion.routes.num_rows == 8
    assert completion.routes.covered_T.all()
