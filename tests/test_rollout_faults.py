"""The client beside servers that fail, hang, answer garbage, or come back."""

import re
import threading
import time
from dataclasses import replace

import pytest
from rollout_servers import MODEL, QUICK, FakeServer, asked, generate_until

from routing_replay.errors import PayloadError, ServerError
from routing_replay.rollout import (
    ClientOptions,
    RolloutClient,
)
from routing_replay.routes.shape import MoEShape

pytest.importorskip("aiohttp")


@pytest.mark.parametrize("trouble", ["500", "hang", "dead"])
def test_another_server_takes_over_from_one_that_fails(trouble):
    def fail(route, body, answer):
        time.sleep(3 if trouble == "hang" else 0)
        return 500, {"error": "out of memory"}

    with FakeServer() as good, FakeServer(fail) as bad:
        if trouble == "dead":
            bad.http.shutdown()
            bad.http.server_close()
        client = RolloutClient([bad.url, good.url], MODEL, QUICK)
        (completion,) = client.generate([asked()])
    assert completion.url == good.url


def test_a_request_waits_for_a_server_that_restarts():
    with FakeServer() as first:
        port = first.http.server_address[1]
    completions = []
    options = ClientOptions(num_retries=4, retry_wait_s=0.2)
    client = RolloutClient([f"http://127.0.0.1:{port}"], MODEL, options)
    thread = threading.Thread(target=lambda: completions.extend(client.generate([asked()])))
    thread.start()
    time.sleep(0.3)  # the first try, at least, met nobody
    with FakeServer(port=port):
        thread.join(timeout=60)
    assert completions[0].output_ids == [7, 8, 9]


def test_a_request_that_fails_on_every_try_names_the_servers_and_the_last_failure():
    with FakeServer(lambda *_: (503, {"error": "overloaded"})) as fake:
        with pytest.raises(ServerError, match="failed 3 times.*503.*overloaded") as caught:
            RolloutClient([fake.url], MODEL, QUICK).generate([asked()])
        assert fake.url in str(caught.value)
    assert len(fake.calls) == 3


def test_a_request_that_is_itself_wrong_is_not_repeated():
    message = "refused /generate.*400.*too long"
    too_long = {"error": {"message": "too long"}}
    with FakeServer(lambda *_: (400, too_long)) as fake, pytest.raises(ServerError, match=message):
        RolloutClient([fake.url], MODEL, QUICK).generate([asked()])
    assert len(fake.calls) == 1


def test_a_server_of_another_model_is_refused():
    other = MoEShape(layers=(1, 2, 5), num_experts=16, top_k=2)
    with FakeServer() as fake, pytest.raises(PayloadError, match="the server runs another model"):
        RolloutClient([fake.url], other, QUICK).generate([asked()])


@pytest.mark.parametrize("damage", ["json", "routes"])
def test_a_damaged_answer_is_asked_for_again_elsewhere(damage):
    def break_it(route, body, answer):
        if route != "/generate":
            return 200, answer
        if damage == "json":
            return 200, "not what SGLang says"
        routes = answer["meta_info"]["routed_experts"]
        answer["meta_info"]["routed_experts"] = routes[:40] + "AAAA" + routes[44:]
        return 200, answer

    with FakeServer() as good, FakeServer(break_it) as bad:
        client = RolloutClient([bad.url, good.url], MODEL, QUICK)
        completions = client.generate([asked(capture="ids") for _ in range(8)])
        assert {c.url for c in completions} == {good.url}
        assert client.faults[bad.url] >= 1 and client.faults[good.url] == 0


def test_a_server_that_fails_again_and_again_gets_nothing_until_it_is_healthy():
    is_well = []

    def fail(route, body, answer):
        return (200, answer) if is_well else (500, {"error": "out of memory"})

    with FakeServer() as good, FakeServer(fail) as bad:
        client = RolloutClient([bad.url, good.url], MODEL, replace(QUICK, max_faults=2))
        for _ in range(2):
            client.generate([asked() for _ in range(4)])
        before = sum(route == "/generate" for route, _ in bad.calls)
        client.generate([asked() for _ in range(20)])
        assert sum(route == "/generate" for route, _ in bad.calls) == before >= 2
        assert client.servers[bad.url].is_out
        is_well.append(True)
        generate_until(client, lambda: not client.servers[bad.url].is_out)
        completions = client.generate([asked() for _ in range(20)])
        assert {c.url for c in completions} == {good.url, bad.url}
        assert client.faults == {good.url: 0, bad.url: 0}
        assert (client.counts["left_out"], client.counts["returned"]) == (1, 1)


def test_a_server_that_answers_wrongly_is_better_than_none():
    """Left out, it would make the job wait, and then end."""
    answers = iter([(500, {}), (500, {}), (500, {})])

    def fail_at_first(route, body, answer):
        return next(answers, (200, answer)) if route == "/generate" else (200, answer)

    with FakeServer(fail_at_first) as fake:
        options = replace(QUICK, num_retries=3, max_faults=2)
        (completion,) = RolloutClient([fake.url], MODEL, options).generate([asked()])
    assert completion.output_ids == [7, 8, 9]


def test_a_server_that_hangs_costs_its_timeout_once():
    """Two health checks find it; its requests go elsewhere, and later batches do not meet it."""
    is_hanging = threading.Event()

    def hang(route, body, answer):
        if is_hanging.is_set():
            time.sleep(8)
        return 200, answer

    with FakeServer() as good, FakeServer(hang) as bad:
        options = replace(QUICK, request_timeout_s=60, health_timeout_s=0.5)
        client = RolloutClient([bad.url, good.url], MODEL, options)
        client.generate([asked()] * 4)
        is_hanging.set()
        start, met = time.monotonic(), []
        for _ in range(2):
            completions = client.generate([asked()] * 8)
            assert {c.url for c in completions} == {good.url}
            met.append(sum(route == "/generate" for route, _ in bad.calls))
        # Checks of 0.5 s, 0.3 s apart, begin at most 0.3 s after the requests.
        assert time.monotonic() - start < 7
        assert met[0] == met[1]
        calls = len(bad.calls)
        client.update_weights("/checkpoint", 1)
        assert len(bad.calls) == calls


def test_a_server_that_answers_requests_is_well_even_if_it_answers_no_checks():
    def answer_late(route, body, answer):
        time.sleep(3 if route == "/health" else 0.2)
        return 200, answer

    with FakeServer(answer_late) as fake:
        options = replace(QUICK, health_timeout_s=0.3, max_in_flight=1)
        client = RolloutClient([fake.url], MODEL, options)
        client.generate([asked()] * 15)
    assert client.counts == {}


@pytest.mark.parametrize("garbage", [[1], "text", {"meta_info": [], "dp_size": "two"}])
def test_a_server_that_answers_garbage_to_everything_is_left_out(garbage):
    with FakeServer() as good, FakeServer(lambda *_: (200, garbage)) as bad:
        client = RolloutClient([bad.url, good.url], MODEL, QUICK)
        client.update_weights("/checkpoint", 1)
        assert [server.url for server in client.servers.in_use] == [good.url]
        assert {c.url for c in client.generate([asked()] * 6)} == {good.url}
        fresh = RolloutClient([bad.url, good.url], MODEL, QUICK)
        assert {c.url for c in fresh.generate([asked()] * 6)} == {good.url}
        assert fresh.faults[good.url] == 0


def test_too_few_servers_end_a_batch_with_what_happened():
    options = replace(QUICK, min_servers=2)
    with FakeServer() as good, FakeServer() as dead:
        client = RolloutClient([dead.url, good.url], MODEL, options)
        dead.http.shutdown()
        dead.http.server_close()
        message = r"too few servers are left; expected 2 or more; got 1; .*cannot be reached"
        with pytest.raises(ServerError, match=message) as caught:
            for _ in range(4):
                client.generate([asked()] * 4)
        with pytest.raises(ServerError, match=message):
            client.update_weights("/checkpoint", 3)
    assert re.search(rf"\d\d:\d\d:\d\d {dead.url} is left out", str(caught.value))
    with pytest.raises(ServerError, match="more servers than it has; expected 2 URLs"):
        RolloutClient([good.url], MODEL, options)


def test_requests_wait_for_the_only_server_to_come_back():
    with FakeServer() as first:
        port = first.http.server_address[1]
    options = replace(QUICK, num_retries=3, recovery_timeout_s=20)
    client = RolloutClient([f"http://127.0.0.1:{port}"], MODEL, options)
    completions = []
    thread = threading.Thread(target=lambda: completions.extend(client.generate([asked()] * 5)))
    thread.start()
    time.sleep(1)  # far longer than the retries
    with FakeServer(port=port):
        thread.join(timeout=20)
    assert [c.output_ids for c in completions] == [[7, 8, 9]] * 5
    assert (client.counts["left_out"], client.counts["returned"]) == (1, 1)
