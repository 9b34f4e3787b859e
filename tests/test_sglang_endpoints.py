"""Rows through every endpoint: several samples, streams, OpenAI's completions and chat."""

import json

import httpx
import pytest
from sglang_checks import assert_ids_follow, assert_true
from sglang_servers import MODEL, random_prompt, request

from routing_replay.rollout import completion_of, request_fields
from routing_replay.routes.payload import FIELD, decode


def events_of(url, body):
    """The JSON of a stream's events."""
    with httpx.stream("POST", url, json=body, timeout=120) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def assert_payload(text, prompt, reference, num_new=8):
    """The payload holds all rows, gates, and the rows of the prompt are the reference's."""
    routes = decode({FIELD: text}, num_tokens=len(prompt) + num_new, shape=MODEL)
    assert routes.covered_T.all()
    assert routes.gate_probs_TLK is not None
    assert_ids_follow(routes[: len(prompt)], reference(prompt)[0])


def test_several_samples_and_a_stream_from_the_raw_endpoint(server, references):
    asked = request(random_prompt(6))
    body = asked.to_json()
    body["sampling_params"]["n"] = 2
    url = server.server.url
    for answer in httpx.post(f"{url}/generate", json=body, timeout=120).json():
        assert_true(asked, completion_of(answer, asked, url, MODEL), references[0])
    body = asked.to_json() | {"stream": True}
    events = events_of(f"{url}/generate", body)
    assert len(events) > 1
    assert_true(asked, completion_of(events[-1], asked, url, MODEL), references[0])


def openai_body(prompt, is_chat, **options):
    """A request for eight greedy tokens and their gates, to one endpoint or the other."""
    words = " ".join(f"t{token}" for token in prompt)
    content = {"messages": [{"role": "user", "content": words}]} if is_chat else {"prompt": prompt}
    sampling = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    return {"model": "default", **content, **sampling, **request_fields("gates"), **options}


ENDPOINTS = {"/v1/completions": False, "/v1/chat/completions": True}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_openai_endpoints_carry_the_payload(server, references, endpoint):
    prompt = random_prompt(7)
    body = openai_body(prompt, ENDPOINTS[endpoint])
    answer = httpx.post(f"{server.server.url}{endpoint}", json=body, timeout=120).json()
    assert_payload(answer["sglext"][FIELD], prompt, references[0])


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_openai_streams_carry_the_payload_once_at_their_end(server, references, endpoint):
    prompt = random_prompt(7)
    body = openai_body(prompt, ENDPOINTS[endpoint], stream=True)
    events = events_of(f"{server.server.url}{endpoint}", body)
    texts = [event["sglext"][FIELD] for event in events if event.get("sglext")]
    assert len(events) > 2
    assert len(texts) == 1
    assert_payload(texts[0], prompt, references[0])
