"""`health` and `probe` say what stands between a client and its routes."""

import time

import numpy as np
import pytest
from rollout_servers import MODEL, QUICK, FakeServer
from test_payload import meta, random_ids

from routing_replay.errors import ServerError
from routing_replay.rollout import (
    RolloutClient,
    probe,
)
from routing_replay.routes.origin import Origin
from routing_replay.routes.payload import encode
from routing_replay.routes.routes import Routes

pytest.importorskip("aiohttp")


def test_health_names_the_sick_and_raises_for_none():
    with FakeServer() as good, FakeServer(lambda *_: (503, {})) as bad:
        health = RolloutClient([good.url, bad.url], MODEL, QUICK).health()
    assert health[good.url] == "ok"
    assert "503" in health[bad.url]


def test_probe_passes_a_good_server():
    with FakeServer() as fake:
        report = probe(fake.url, MODEL)
    assert "routes of 14 of 14 tokens: 3 layers, 16 experts, top-4" in str(report)
    assert "start honoured" in str(report)


def losing(rows, cause):
    """These rows of every whole answer are not covered for a cause."""

    def misbehave(route, body, answer):
        start, num_rows = body.get("routed_experts_start_len"), len(body.get("input_ids", ())) + 2
        if route == "/generate" and start is not None:
            routes = Routes(
                expert_ids_TLK=random_ids(num_rows), layers=MODEL.layers, num_experts=16
            ).uncover(np.isin(np.arange(num_rows), rows), cause)
            answer["meta_info"] |= meta(encode(routes[start:], start=start))
        return 200, answer

    return misbehave


def test_probe_accepts_a_prompt_that_another_server_has_prefilled():
    with FakeServer(losing(range(12), Origin.TRANSFERRED)) as fake:
        report = probe(fake.url, MODEL)
    assert "12 rows of the prompt are another server's: they are not covered" in str(report)


def test_probe_names_why_rows_are_not_covered():
    for rows, cause in ((range(14), Origin.TRANSFERRED), ((3,), Origin.EVICTED)):
        got = f"got {14 - len(rows)}; not covered: {cause.name.lower()} {len(rows)}"
        with (
            FakeServer(losing(rows, cause)) as fake,
            pytest.raises(ServerError, match=f"cannot vouch for; expected 14 covered rows; {got}"),
        ):
            probe(fake.url, MODEL)


def without(name):
    def misbehave(route, body, answer):
        if route == "/server_info" and name == "flag":
            return 200, {"enable_return_routed_experts": False}
        if route == "/generate":
            meta_info = dict(answer["meta_info"])
            meta_info.pop("routed_experts", None)
            return 200, {"meta_info": meta_info}
        return 200, answer

    return misbehave


def ignore_start(route, body, answer):
    body.pop("routed_experts_start_len", None)
    return 200, {"meta_info": FakeServer.generated(None, body)}


def ignore_level(route, body, answer):
    if route == "/generate":
        body["sampling_params"].pop("custom_params")
        return 200, {"meta_info": FakeServer.generated(None, body)}
    return 200, answer


@pytest.mark.parametrize(
    ("misbehave", "capture", "message"),
    [
        (without("flag"), "ids", "Start the server with --enable-return-routed-experts"),
        (without("field"), "ids", "a gateway in between drops the field"),
        (ignore_start, "ids", "covers other tokens.*4 rows from row 10; got 14 rows from row 0"),
        (ignore_level, "ids", "The plugin is missing"),
        (lambda r, b, a: (200, a), "gates", "no gates come back.*capture level gates"),
        (lambda r, b, a: (200, a), "weights", "no combine weights.*capture level weights"),
        (lambda *_: (404, {}), "ids", "refuses a request for routes; got status 404"),
        (lambda *_: (200, {"text": "hello"}), "ids", "the answer has no log-probs"),
    ],
)
def test_probe_names_what_stands_between(misbehave, capture, message):
    with FakeServer(misbehave) as fake, pytest.raises(ServerError, match=message) as caught:
        probe(fake.url, MODEL, capture)
    assert fake.url in str(caught.value)


def test_probe_does_not_wait_for_a_server_that_hangs_or_is_not_there():
    def hang(route, body, answer):
        time.sleep(1)
        return 200, answer

    with FakeServer(hang) as fake, pytest.raises(ServerError, match="does not answer.*Timeout"):
        probe(fake.url, MODEL, timeout_s=0.2)
    with pytest.raises(ServerError, match="does not answer"):
        probe("http://127.0.0.1:9", MODEL)
