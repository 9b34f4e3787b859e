"""Rows of a real server are those of an independent forward, in every way a request can go."""

import base64
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
from sglang_checks import assert_ids_follow, assert_true, softmax, tokens_of
from sglang_servers import MODEL, random_prompt, request

from routing_replay.rollout import Conversation, completion_of, probe
from routing_replay.routes.origin import Origin
from routing_replay.routes.payload import from_base64
from routing_replay.routes.spans import Span
from routing_replay.sglang import versions


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


def test_weights_are_the_softmax_over_the_selected_experts(server, references):
    asked = request(random_prompt(6), capture="weights")
    (completion,) = server.client.generate([asked])
    routes = completion.routes
    logits_TLE, _, _ = references[0](tokens_of(asked, completion), routes=routes)
    selected_TLK = np.take_along_axis(logits_TLE, routes.expert_ids_TLK.astype(np.int64), -1)
    np.testing.assert_allclose(routes.combine_weights_TLK, softmax(selected_TLK), atol=1e-3)
    np.testing.assert_allclose(routes.combine_weights_TLK.sum(-1), 1, atol=1e-6)
    assert routes.gate_probs_TLK is None and routes.router_logits is None


def test_requests_of_all_levels_share_a_batch_and_each_gets_its_own_rows(server, references):
    levels = ["gates", "off", "stock", "ids", "logits", "off", "weights", "stock"]
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
        has_weights = completion.routes.combine_weights_TLK is not None
        assert has_weights == (one.capture in ("weights", "logits"))


def test_samples_of_one_prompt_each_keep_their_own_rows(server, references):
    asked = [request(random_prompt(30)) for _ in range(6)]
    completions = server.client.generate(asked)
    assert len({tuple(c.output_ids) for c in completions}) == 6
    for one, completion in zip(asked, completions, strict=True):
        assert_true(one, completion, references[0])


def test_an_agent_with_tools_and_branches_gets_the_row_of_every_token(server, references):
    """Three turns, then a branch from the first; each request asks for new rows only."""
    conversation, sampling = Conversation(), request([0]).sampling

    def turn(spans):
        prompt = [token for span in spans for token in span.tokens()]
        asked = conversation.request(prompt, sampling, capture="gates")
        (completion,) = server.client.generate([asked])
        # The payload is as long as the turn, not as the conversation.
        assert completion.routes.num_rows == len(prompt) + 12 - 1 - asked.start
        return [*spans, Span(sample=conversation.add(asked, completion))]

    first = turn([Span(token_ids=random_prompt(4))])
    second = turn([*first, Span(token_ids=random_prompt(5, length=6))])
    third = turn([*second, Span(token_ids=random_prompt(6, length=6))])
    branch = turn([*first, Span(token_ids=random_prompt(7, length=9))])
    # The second turn was given the last token of the first answer, token 31.
    assert [sample.start for sample in conversation.samples] == [0, 31, 49, 32]
    for spans in (third, branch):
        trajectory = conversation.trajectory(spans)
        assert trajectory.num_uncovered() == {}
        logits_TLE, logprobs_TV, _ = references[0](
            trajectory.tokens_T[:-1], routes=trajectory.routes
        )
        assert_ids_follow(trajectory.routes, logits_TLE)
        sampled = np.flatnonzero(trajectory.is_sampled_T)
        mu = logprobs_TV[sampled - 1, trajectory.tokens_T[sampled]]
        np.testing.assert_allclose(trajectory.mu_logprobs_T[sampled], mu, atol=2e-3)


def test_the_code_of_the_page_on_agents_runs(server):
    page = (Path(__file__).parents[1] / "docs" / "agents.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names = {
        "client": server.client,
        "prompt": random_prompt(9),
        "sampling": request([0]).sampling,
        "call_tool": lambda output_ids: output_ids[:3],
    }
    exec(code, names)
    # 20 tokens of the prompt, 12 and 12 sampled ones, 3 of the tool; the last one has no row.
    assert names["table"].num_rows == names["trajectory"].routes.covered_T.sum() == 46


def test_an_answer_after_a_re_rendered_prompt_is_not_covered_by_its_own_rows(server, references):
    """The second prompt drops a token of the first answer, as templates drop thinking."""
    first, conversation = request(random_prompt(8)), Conversation()
    (answer,) = server.client.generate([first])
    whole = [
        Span(sample=conversation.add(first, answer), part=part) for part in ("prompt", "output")
    ]
    output = answer.output_ids
    dropped = next(n for n in range(3, 11) if output[n] != output[n + 1])
    rendered = [*first.input_ids, *output[:dropped], *output[dropped + 1 :], 7]
    second = conversation.request(rendered, first.sampling)
    (continued,) = server.client.generate([second])
    # Rows are known up to the token before the dropped one.
    assert second.start == 20 + dropped
    spans = [*whole, Span(token_ids=[7]), Span(sample=conversation.add(second, continued))]
    trajectory = conversation.trajectory(spans)
    covered_T = trajectory.routes.covered_T
    # Tokens 0 to 30 were fed in the first request. After them nothing is known.
    assert covered_T.tolist() == [True] * 31 + [False] * 13
    logits_TLE, _, _ = references[0](trajectory.tokens_T[:31], routes=trajectory.routes[:31])
    assert_ids_follow(trajectory.routes[:31], logits_TLE)


def test_stock_clients_get_what_stock_servers_send(server):
    asked = request(random_prompt(62), capture="stock", num_new=4)
    body = asked.to_json()
    answer = httpx.post(f"{server.server.url}/generate", json=body, timeout=120).json()
    data = base64.b64decode(answer["meta_info"]["routed_experts"])
    ids_TLK = np.frombuffer(data, np.int32).reshape(20 + 4 - 1, 3, 4)
    assert (np.sort(ids_TLK)[..., 1:] > np.sort(ids_TLK)[..., :-1]).all()
    ours = completion_of(answer, asked, "", MODEL).routes
    np.testing.assert_array_equal(ours.expert_ids_TLK, ids_TLK)


def test_a_compact_payload_is_a_quarter_of_stocks_and_a_header(server):
    prompt, sizes = random_prompt(63, length=60), {}
    for level in ("stock", "ids"):
        body = request(prompt, capture=level, num_new=60).to_json()
        answer = httpx.post(f"{server.server.url}/generate", json=body, timeout=120).json()
        sizes[level] = len(from_base64(answer["meta_info"]["routed_experts"]))
    # 119 rows x 3 layers x 4 slots x 4 bytes; ours takes 1. The header has 32 bytes, the bitmap 1,
    # the runs of prefill and decode 13 each, the checksum 4.
    assert sizes["stock"] == 119 * 3 * 4 * 4
    assert sizes["ids"] == sizes["stock"] / 4 + 32 + 1 + 2 * 13 + 4


@pytest.mark.skipif(
    versions.installed() < (0, 5, 20), reason="SGLang returns sampling masks since 0.5.20"
)
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
