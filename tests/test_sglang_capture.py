"""Rows of a real server are those of an independent forward, in every way a request can go."""

import base64
import json
import threading
import time

import httpx
import numpy as np
import pytest
from sglang_servers import (
    MODEL,
    Reference,
    assert_ids_follow,
    random_prompt,
    request,
    softmax,
)

from routing_replay.payload import decode, from_base64
from routing_replay.routes import Origin
from routing_replay.sglang.client import probe
from routing_replay.sglang.requests import completion_of, request_fields

# float16 keeps eleven bits; SGLang and transformers sum in different orders in float32.
GATE_ERROR = 2.0**-11 + 1e-4


@pytest.fixture
def server(sglang_server):
    sglang_server.restore()
    return sglang_server


@pytest.fixture(scope="module")
def references(sglang_server):
    return [Reference(path) for path in sglang_server.checkpoints]


def tokens_of(asked, completion):
    """What was fed to the model: all tokens but the last sampled one."""
    return [*asked.input_ids, *completion.output_ids][:-1]


def assert_true(asked, completion, reference):
    """Ids, gates and log-probs are those of the reference's forward of the same tokens."""
    logits_TLE, logprobs_TV, _ = reference(tokens_of(asked, completion))
    routes = completion.routes
    rows = slice(asked.start, None)
    assert routes.covered_T.all()
    assert_ids_follow(routes, logits_TLE[rows])
    if routes.gate_probs_TLK is not None:
        ids_TLK = routes.expert_ids_TLK.astype(np.int64)
        expected_TLK = np.take_along_axis(softmax(logits_TLE[rows]), ids_TLK, -1)
        np.testing.assert_allclose(routes.gate_probs_TLK, expected_TLK, atol=GATE_ERROR)
    response = logprobs_TV[len(asked.input_ids) - 1 :]
    mu = response[np.arange(len(completion.output_ids)), completion.output_ids]
    np.testing.assert_allclose(completion.mu_logprobs, mu, atol=2e-3)


def test_rows_gates_logits_and_log_probs_equal_transformers(server, references):
    asked = request(random_prompt(1), capture="logits")
    (completion,) = server.client.generate([asked])
    assert_true(asked, completion, references[0])
    routes = completion.routes
    # 20 prompt tokens, then 11 of the 12 sampled ones: the last was never fed to the model.
    assert routes.origin_T.tolist() == [Origin.PREFILL] * 20 + [Origin.DECODE] * 11
    assert routes.weight_version_T.tolist() == [0] * 31
    logits_TLE, _, _ = references[0](tokens_of(asked, completion))
    sampled = routes.router_logits
    # Half of 31 rows are sampled; 2 or fewer happen once in ten million runs.
    assert 3 <= len(sampled.rows_N) <= 31
    np.testing.assert_allclose(sampled.values_NLE, logits_TLE[sampled.rows_N], atol=1e-3)


def test_a_long_prompt_is_true_over_all_its_chunks(server, references):
    asked = request(random_prompt(2, length=100))  # chunks of 32
    (completion,) = server.client.generate([asked])
    assert_true(asked, completion, references[0])
    assert completion.routes.num_rows == 111


def test_a_prefix_hit_returns_the_rows_that_computed_the_prefix(server, references):
    asked = request(random_prompt(3))
    (first,) = server.client.generate([asked])
    (again,) = server.client.generate([asked])
    assert first.cached_tokens == 0
    assert again.cached_tokens >= 16
    assert_true(asked, again, references[0])
    rows = slice(0, again.cached_tokens)
    np.testing.assert_array_equal(
        again.routes.gate_probs_TLK[rows], first.routes.gate_probs_TLK[rows]
    )


def test_requests_of_all_levels_share_a_batch_and_each_gets_its_own_rows(server, references):
    levels = ["gates", "off", "stock", "ids", "logits", "off", "gates", "stock"]
    asked = [
        request(random_prompt(10 + n, length=15 + 3 * n), capture=level, num_new=8 + n)
        for n, level in enumerate(levels)
    ]
    for one, completion in zip(asked, server.client.generate(asked), strict=True):
        if one.capture == "off":
            assert completion.routes is None
            continue
        assert_true(one, completion, references[0])
        has_gates = completion.routes.gate_probs_TLK is not None
        assert has_gates == (one.capture in ("gates", "logits"))
        assert (completion.routes.router_logits is not None) == (one.capture == "logits")


def test_samples_of_one_prompt_each_keep_their_own_rows(server, references):
    asked = [request(random_prompt(30)) for _ in range(6)]
    completions = server.client.generate(asked)
    assert len({tuple(c.output_ids) for c in completions}) == 6
    for one, completion in zip(asked, completions, strict=True):
        assert_true(one, completion, references[0])


def test_a_delta_from_start_continues_an_earlier_turn(server, references):
    first = request(random_prompt(4))
    (turn,) = server.client.generate([first])
    known = turn.routes.num_rows
    prompt = [*first.input_ids, *turn.output_ids, *random_prompt(5, length=6)]
    second = request(prompt, start=known)
    (continued,) = server.client.generate([second])
    assert continued.routes.num_rows == len(prompt) + 12 - 1 - known
    assert_true(second, continued, references[0])
    whole = turn.routes.with_turn(continued.routes, known)
    assert whole.num_rows == len(prompt) + 12 - 1


def test_several_samples_and_a_stream_from_the_raw_endpoint(server, references):
    asked = request(random_prompt(6))
    body = asked.to_json()
    body["sampling_params"]["n"] = 2
    url = server.server.url
    for answer in httpx.post(f"{url}/generate", json=body, timeout=120).json():
        assert_true(asked, completion_of(answer, asked, url, MODEL), references[0])
    body = asked.to_json() | {"stream": True}
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=120) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    assert len(lines) > 1
    assert_true(asked, completion_of(json.loads(lines[-1]), asked, url, MODEL), references[0])


def test_openai_completions_carry_the_payload(server, references):
    prompt = random_prompt(7)
    body = {
        "model": "default",
        "prompt": prompt,
        "max_tokens": 8,
        "temperature": 0.0,
        "ignore_eos": True,
        **request_fields("gates"),
    }
    answer = httpx.post(f"{server.server.url}/v1/completions", json=body, timeout=120).json()
    text = answer["sglext"]["routed_experts"]
    routes = decode({"routed_experts": text}, num_tokens=len(prompt) + 8, model=MODEL)
    assert_ids_follow(routes[: len(prompt)], references[0](prompt)[0])
    assert routes.gate_probs_TLK is not None


def test_an_aborted_request_returns_the_rows_of_the_tokens_it_returns(server, references):
    asked = request(random_prompt(8), num_new=400)
    completion = _while_running(server, [asked], lambda: server.client.abort())[0]
    assert completion.finish_reason == "abort"
    assert 0 < len(completion.output_ids) < 400
    assert_true(asked, completion, references[0])


def test_rows_survive_retraction_under_the_weights_that_computed_them(server, references):
    """Stock prefills again and returns the second pass's rows: here those of other weights."""
    asked = [request(random_prompt(40 + n), num_new=200) for n in range(3)]

    def retract_and_update():
        server.client.pause("retract")
        server.client.update_weights(str(server.checkpoints[1]), 1)
        server.client.resume()

    for one, completion in zip(
        asked, _while_running(server, asked, retract_and_update), strict=True
    ):
        routes = completion.routes
        assert completion.num_retractions == 1
        assert routes.covered_T.all()
        versions = routes.weight_version_T
        num_old = int((versions == 0).sum())
        # Old rows first, then new ones; both kinds exist, and the cut is within the response.
        assert versions.tolist() == [0] * num_old + [1] * (len(versions) - num_old)
        assert 20 < num_old < len(versions)
        tokens = tokens_of(one, completion)
        assert_ids_follow(routes[:num_old], references[0](tokens)[0][:num_old])
        assert_ids_follow(routes[num_old:], references[1](tokens)[0][num_old:])
        # The row at the cut is the second prefill's: its token is the first of the new weights.
        assert routes.origin_T[num_old] == Origin.PREFILL
        assert routes.origin_T[num_old - 1] == Origin.DECODE


def test_an_update_in_place_changes_the_version_in_the_middle_of_a_response(server, references):
    asked = request(random_prompt(50), num_new=400)

    def update():
        server.client.pause("in_place")
        server.client.update_weights(str(server.checkpoints[1]), 1, flush_cache=False)
        server.client.resume()

    (completion,) = _while_running(server, [asked], update)
    routes = completion.routes
    assert completion.num_retractions == 0
    num_old = int((routes.weight_version_T == 0).sum())
    assert 20 < num_old < routes.num_rows
    tokens = tokens_of(asked, completion)
    old_TLE, _, cache = references[0](tokens[:num_old])
    new_TLE, _, _ = references[1](tokens[num_old:], past=cache)
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


def test_stock_clients_get_what_stock_servers_send(server):
    asked = request(random_prompt(62), capture="stock", num_new=4)
    body = asked.to_json()
    answer = httpx.post(f"{server.server.url}/generate", json=body, timeout=120).json()
    data = base64.b64decode(answer["meta_info"]["routed_experts"])
    ids_TLK = np.frombuffer(data, np.int32).reshape(20 + 4 - 1, 3, 4)
    assert (np.sort(ids_TLK)[..., 1:] > np.sort(ids_TLK)[..., :-1]).all()
    ours = completion_of(answer, asked, "", MODEL).routes
    np.testing.assert_array_equal(ours.expert_ids_TLK, ids_TLK)


def test_a_compact_payload_is_at_most_a_quarter_of_stocks(server):
    prompt, sizes = random_prompt(63, length=60), {}
    for level in ("stock", "ids"):
        body = request(prompt, capture=level, num_new=60).to_json()
        answer = httpx.post(f"{server.server.url}/generate", json=body, timeout=120).json()
        sizes[level] = len(from_base64(answer["meta_info"]["routed_experts"]))
    # 119 rows x 3 layers x 4 slots x 4 bytes; ours has 1 byte less what deflate saves, a header.
    assert sizes["stock"] == 119 * 3 * 4 * 4
    assert sizes["ids"] <= 0.25 * sizes["stock"]


def test_the_sampling_mask_and_the_log_prob_within_it(server):
    asked = request(random_prompt(64), num_new=6, wants_sampling_mask=True)
    asked.sampling["top_k"] = 5
    (completion,) = server.client.generate([asked])
    assert [len(mask) for mask in completion.sampling_mask] == [5] * 6
    for token, mask in zip(completion.output_ids, completion.sampling_mask, strict=True):
        assert token in mask
    # Over five tokens a token is more probable than over the whole vocabulary.
    assert (completion.mask_logprobs > completion.mu_logprobs).all()


def test_temperature_is_in_the_log_probs(server, references):
    asked = request(random_prompt(65), num_new=6)
    asked.sampling["temperature"] = 0.5
    (completion,) = server.client.generate([asked])
    logprobs_TV = references[0](tokens_of(asked, completion))[1][19:] / 0.5
    expected_TV = logprobs_TV - np.log(np.exp(logprobs_TV).sum(-1, keepdims=True))
    expected = expected_TV[np.arange(6), completion.output_ids]
    np.testing.assert_allclose(completion.mu_logprobs, expected, atol=4e-3)


def test_probe_proves_a_good_server(server):
    report = probe(server.server.url, MODEL, capture="logits")
    assert "3 layers, 16 experts, top-4" in str(report)
    assert "start honoured" in str(report)
    assert "gates equal to theirs" in str(report)


def _while_running(server, asked, act):
    """Completions of requests during which `act` happened, after some tokens were sampled."""
    results = []
    thread = threading.Thread(target=lambda: results.extend(server.client.generate(asked)))
    thread.start()
    _wait_for_decoding(server, len(asked))
    act()
    thread.join(timeout=300)
    assert len(results) == len(asked)
    return results


def _wait_for_decoding(server, num_requests, timeout_s=60):
    """Until the server's log shows that many running requests in a decode batch."""
    log, deadline = server.server.log_path, time.monotonic() + timeout_s
    start = log.stat().st_size
    while time.monotonic() < deadline:
        with open(log, "rb") as file:
            file.seek(start)
            if f"Decode batch, #running-req: {num_requests}".encode() in file.read():
                return
        time.sleep(0.05)
    raise AssertionError("the requests never decoded")
