"""Sessions: requests that are not known together, from several threads."""

import threading
import time
from dataclasses import replace

import pytest
from rollout_servers import MODEL, QUICK, FakeServer, asked

from routing_replay.errors import ServerError
from routing_replay.rollout import RolloutClient, SharedSession


def shared(server, options=QUICK):
    return SharedSession(RolloutClient([server.url], MODEL, options).session)


def tokens_of(request):
    async def work(session):
        return (await session.complete(request)).output_ids

    return work


def routes_of(server):
    return [route for route, _ in server.calls]


def test_work_of_several_threads_shares_a_session_that_ends_with_the_last(monkeypatch):
    opened = []
    gate = threading.Event()

    def slow(route, body, answer):
        if route == "/generate":
            gate.wait(10)
        return 200, answer

    with FakeServer(slow) as server:
        client = RolloutClient([server.url], MODEL, QUICK)
        session = client.session
        several = SharedSession(lambda: opened.append(1) or session())
        futures = []
        threads = [
            threading.Thread(target=lambda: futures.append(several.submit(tokens_of(asked()))))
            for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gate.set()
        assert [future.result(10) for future in futures] == [[7, 8, 9]] * 5
        assert len(opened) == 1
        # It has ended, so the next work opens another.
        deadline = time.monotonic() + 10
        while several._opening is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert several.submit(tokens_of(asked())).result(10) == [7, 8, 9]
        assert len(opened) == 2


def test_too_few_servers_end_all_work_and_the_next_begins_anew():
    is_dead = threading.Event()

    def die(route, body, answer):
        if is_dead.is_set():
            return 503, {}
        time.sleep(30 if route == "/generate" and len(body["input_ids"]) > 5 else 0)
        return 200, answer

    with FakeServer(die) as server:
        patient = replace(QUICK, request_timeout_s=30)
        options = replace(patient, health_every_s=0.1, recovery_timeout_s=0.3)
        several = shared(server, options)
        futures = [several.submit(tokens_of(asked(9))) for _ in range(3)]
        # One that comes later would fail three times before two checks have been missed.
        while routes_of(server).count("/generate") < 3:
            time.sleep(0.01)
        is_dead.set()
        for future in futures:
            with pytest.raises(ServerError, match="too few servers are left"):
                future.result(20)
        is_dead.clear()
        assert several.submit(tokens_of(asked(3))).result(20) == [7, 8, 9]


def test_work_that_is_cancelled_or_fails_leaves_the_rest_alone():
    def slow(route, body, answer):
        time.sleep(0.5 if route == "/generate" else 0)
        return 200, answer

    async def fails(session):
        raise OSError("the disk is full")

    with FakeServer(slow) as server:
        several = shared(server)
        first, second, third = (several.submit(tokens_of(asked())) for _ in range(3))
        fourth = several.submit(fails)
        first.cancel()
        with pytest.raises(OSError, match="the disk is full"):
            fourth.result(10)
        assert second.result(10) == third.result(10) == [7, 8, 9]
