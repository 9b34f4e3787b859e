"""The client and what servers answer it; the servers are stand-ins without SGLang."""

import asyncio
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from rollout_servers import MODEL, QUICK, FakeServer, asked
from test_payload import meta, random_ids

from routing_replay import rollout
from routing_replay.errors import ConfigError, RoutesError, ServerError
from routing_replay.rollout import (
    ClientOptions,
    RolloutClient,
    request_fields,
)
from routing_replay.routes.origin import Origin, is_covered
from routing_replay.routes.payload import encode
from routing_replay.routes.routes import Routes

pytest.importorskip("aiohttp")


def test_a_completion_holds_what_the_server_said():
    with FakeServer() as fake:
        (completion,) = RolloutClient([fake.url], MODEL).generate([asked()])
    assert completion.output_ids == [7, 8, 9]
    np.testing.assert_array_equal(completion.mu_logprobs, np.float32([-0.5, -0.25, -1.0]))
    np.testing.assert_array_equal(completion.routes.expert_ids_TLK, random_ids(7))
    assert (completion.finish_reason, completion.url) == ("length", fake.url)


def test_a_batch_that_lost_more_rows_than_allowed_is_refused_with_the_causes():
    def lose_the_prompt(route, body, answer):
        if route == "/generate":
            origin_T = np.full(7, Origin.DECODE, np.uint8)
            origin_T[:2] = Origin.EVICTED
            routes = Routes(
                expert_ids_TLK=random_ids(7),
                layers=MODEL.layers,
                num_experts=16,
                covered_T=is_covered(origin_T),
                origin_T=origin_T,
            )
            answer["meta_info"] |= meta(encode(routes))
        return 200, answer

    with FakeServer(lose_the_prompt) as fake:
        client = RolloutClient([fake.url], MODEL, ClientOptions(max_uncovered=0.3))
        (completion,) = client.generate([asked()])
        assert completion.routes.origin_T[:2].tolist() == [Origin.EVICTED] * 2
        strict = RolloutClient([fake.url], MODEL, ClientOptions(max_uncovered=0.2))
        with pytest.raises(
            RoutesError, match=rf"20.00% of 14 rows; got 28.57%: evicted 4 \[{fake.url}"
        ):
            strict.generate([asked(), asked()])


def test_answers_keep_the_order_of_the_requests_and_report_as_they_finish():
    def slow_for_short(route, body, answer):
        time.sleep(0.2 if len(body.get("input_ids", ())) == 3 else 0)
        return 200, answer

    finished = []

    def work(number, completion):
        finished.append(number)
        return completion.routes.num_rows

    with FakeServer(slow_for_short) as fake:
        assert RolloutClient([fake.url], MODEL).generate_each([asked(3), asked(9)], work) == [5, 11]
    assert finished == [1, 0]


def test_what_the_work_on_a_completion_raises_ends_the_batch():
    def work(number, completion):
        raise OSError("the disk is full")

    with FakeServer() as fake, pytest.raises(OSError, match="the disk is full"):
        RolloutClient([fake.url], MODEL).generate_each([asked()], work)


def test_requests_go_to_the_least_loaded_server():
    def slow(route, body, answer):
        time.sleep(0.3)
        return 200, answer

    with FakeServer(slow) as one, FakeServer(slow) as other:
        RolloutClient([one.url, other.url], MODEL).generate([asked(100), asked(5), asked(5)])
    # The long prompt occupies one server; both short ones go to the other.
    assert [len(body["input_ids"]) for _, body in one.calls] == [100]
    assert [len(body["input_ids"]) for _, body in other.calls] == [5, 5]


def test_each_data_parallel_replica_of_a_server_has_a_limit_of_its_own():
    running, most = set(), []

    def note(route, body, answer):
        if route == "/server_info":
            return 200, {"dp_size": 2}
        running.add(threading.get_ident())
        most.append(len(running))
        time.sleep(0.2)
        running.discard(threading.get_ident())
        return 200, answer

    with FakeServer(note) as fake:
        client = RolloutClient([fake.url], MODEL, ClientOptions(max_in_flight=1))
        client.generate([asked() for _ in range(6)])
    assert max(most) == 2


def test_of_the_requests_that_wait_the_highest_priority_goes_first():
    with FakeServer() as fake:
        client = RolloutClient([fake.url], MODEL, ClientOptions(max_in_flight=1))
        client.generate([asked(priority=p) for p in (-3, -3, None, -3, -1)])
        sent = [body.get("priority") for route, body in fake.calls if route == "/generate"]
    # The first finds a free slot.
    assert sent == [-3, None, -1, -3, -3]


def test_servers_are_checked_before_the_first_request():
    with FakeServer() as good, FakeServer(lambda *_: (503, {})) as bad:
        client = RolloutClient([good.url, bad.url], MODEL, QUICK)
        client.require_servers()
        assert [server.url for server in client.servers.in_use] == [good.url]
        with pytest.raises(ServerError, match=r"too few servers.*2 or more.*503"):
            RolloutClient(
                [good.url, bad.url], MODEL, replace(QUICK, min_servers=2)
            ).require_servers()


def test_generate_works_inside_an_event_loop():
    async def inside(client):
        return client.generate([asked()]) + await client.agenerate([asked()])

    with FakeServer() as fake:
        completions = asyncio.run(inside(RolloutClient([fake.url], MODEL)))
    assert [c.output_ids for c in completions] == [[7, 8, 9]] * 2


def test_every_public_name_loads_and_the_package_itself_loads_no_http_library():
    code = "import sys, routing_replay.rollout as r; print('aiohttp' in sys.modules);"
    code += "print([getattr(r, name).__doc__ is not None for name in r.__all__])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False", str([True] * len(rollout.__all__))]
    with pytest.raises(AttributeError, match="no attribute 'Client'"):
        _ = rollout.Client


def test_request_fields_of_each_level():
    assert request_fields("off") == {}
    stock_fields = {"return_routed_experts": True, "routed_experts_start_len": 4}
    assert request_fields("stock", 4) == stock_fields
    ours = {**stock_fields, "custom_params": {"routing_replay": "gates"}}
    assert request_fields("gates", 4) == ours
    with pytest.raises(ConfigError, match="unknown capture level.*'gates'"):
        request_fields("gate")


def test_an_answer_without_the_most_likely_tokens_that_were_asked_for_is_refused():
    with FakeServer() as fake:
        with pytest.raises(ServerError, match="3 positions; got .*output_token_logprobs"):
            RolloutClient([fake.url], MODEL, QUICK).generate([asked(num_top_logprobs=2)])
        assert fake.calls[-1][1]["top_logprobs_num"] == 2
