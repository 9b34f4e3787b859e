"""New weights while requests run: servers are paused, updated, and go on whatever happens."""

import contextlib
import threading
import time
from dataclasses import replace

import pytest
from rollout_servers import MODEL, QUICK, FakeServer, asked, generate_until

from routing_replay.rollout import RolloutClient
from routing_replay.rollout.streaming import WeightStream

pytest.importorskip("aiohttp")
TIMEOUT_S = 30
OPTIONS = replace(QUICK, request_timeout_s=2 * TIMEOUT_S, recovery_timeout_s=TIMEOUT_S)


class PausingServer(FakeServer):
    """Holds requests while it is paused, and answers no health check then, as SGLang.

    Args:
        refusals: Routes, each of which refuses so many calls.
    """

    def __init__(self, refusals=()):
        self.may_end, self.is_running = threading.Event(), threading.Event()
        self.is_running.set()
        self.refusals = dict(refusals)
        super().__init__()

    def answer(self, route, body, misbehave):
        if self.refusals.get(route, 0):
            self.refusals[route] -= 1
            return 503, {"message": "not now"}
        if route == "/pause_generation":
            self.is_running.clear()
        if route == "/continue_generation":
            self.is_running.set()
        if route == "/health" and not self.is_running.is_set():
            return 503, {}
        if route == "/generate":
            for event in (self.may_end, self.is_running):
                assert event.wait(TIMEOUT_S)
        return super().answer(route, body, misbehave)

    def routes(self):
        return [route for route, _ in self.calls]


@contextlib.contextmanager
def sampling(client, servers, num_requests):
    """Within: each server has some of the requests. Yields a list, which then has the answers."""
    completions = []

    def sample():
        completions.extend(client.generate([asked()] * num_requests))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    deadline = time.monotonic() + TIMEOUT_S
    while sum(server.routes().count("/generate") for server in servers) < num_requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield completions
    for server in servers:
        server.may_end.set()
    thread.join(TIMEOUT_S / 2)  # well below what a request may take
    assert not thread.is_alive()


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_request_that_runs_through_an_update_tells_the_version_it_was_sent_under(mode):
    with PausingServer() as server:
        client = RolloutClient([server.url], MODEL, OPTIONS)
        client.update_weights("/first", 3)
        with sampling(client, [server], 2) as completions, client.paused(mode):
            client.update_weights("/second", 4, flush_cache=mode != "in_place")
        assert [(c.sent_version, c.weight_version) for c in completions] == [(3, "4")] * 2
        server.may_end.set()
        assert client.generate([asked()])[0].sent_version == 4
        assert client.servers.counts["left_out"] == 0
    routes = server.routes()
    begin = routes.index("/pause_generation")
    expected = ["/pause_generation", "/update_weights_from_disk", "/continue_generation"]
    assert routes[begin : begin + 3] == expected
    assert server.calls[begin][1] == {"mode": mode}
    assert server.calls[begin + 1][1]["flush_cache"] == (mode == "retract")


def test_servers_go_on_when_an_update_fails():
    with PausingServer() as server:
        client = RolloutClient([server.url], MODEL, OPTIONS)
        with (
            sampling(client, [server], 2) as completions,
            pytest.raises(OSError, match="disk"),
            client.paused("retract"),
        ):
            raise OSError("the disk is full")
        assert len(completions) == 2 and not client.servers.pause_mode


@pytest.mark.parametrize("route", ["/pause_generation", "/update_weights_from_disk"])
def test_requests_of_a_server_that_fails_in_an_update_go_elsewhere_and_it_comes_back(route):
    """It refuses to continue as well, so that nothing but the health checks can make it."""
    bad, good = PausingServer({route: 1, "/continue_generation": 2}), PausingServer()
    with bad, good:
        client = RolloutClient([bad.url, good.url], MODEL, OPTIONS)
        with sampling(client, [bad, good], 4) as completions:
            if route == "/pause_generation":
                bad.is_running.clear()  # it has paused, and its answer was lost
            with client.paused("retract"):
                bad.may_end.set()
                client.update_weights("/checkpoint", 3)
        assert [(c.url, c.weight_version) for c in completions] == [(good.url, "3")] * 4
        generate_until(client, lambda: not client.servers[bad.url].is_out)
        assert bad.is_running.is_set() and bad.weight_version == "3"
        assert not client.servers[bad.url].is_paused


def test_the_only_server_may_fail_in_an_update_and_its_requests_end_all_the_same():
    with PausingServer({"/update_weights_from_disk": 1}) as server:
        client = RolloutClient([server.url], MODEL, OPTIONS)
        with sampling(client, [server], 2) as completions, client.paused("retract"):
            client.update_weights("/checkpoint", 3)
        assert [c.weight_version for c in completions] == ["3", "3"]
        assert server.is_running.is_set()


def test_a_server_that_comes_back_in_a_streamed_update_is_paused_like_the_others():
    with PausingServer() as lost, PausingServer() as good:
        client = RolloutClient([lost.url, good.url], MODEL, OPTIONS)
        client.servers.leave_out(client.servers[lost.url], "it was away")
        stream = WeightStream(client)
        with client.paused("in_place"):
            assert len(stream.open(3)) == 2
            assert not lost.is_running.is_set() and not good.is_running.is_set()
            stream.close(3, flush_cache=False)
        assert lost.is_running.is_set() and good.is_running.is_set()
        assert client.weight_versions() == {lost.url: "3", good.url: "3"}
        assert "/flush_cache" not in lost.routes() + good.routes()


def test_an_answer_that_ends_with_the_pause_is_sampled_again_and_its_server_stays():
    with PausingServer() as server:
        client = RolloutClient([server.url], MODEL, OPTIONS)
        client.update_weights("/checkpoint", 3)
        stream = WeightStream(client)
        with sampling(client, [server], 1) as completions:
            stream.open(4)
            server.may_end.set()  # it names the update
            while server.routes().count("/generate") < 2:
                time.sleep(0.01)
            stream.close(4)
        assert [c.weight_version for c in completions] == ["4"]
        assert client.servers.counts["left_out"] == 0


def test_servers_that_a_killed_client_left_paused_go_on_when_the_next_one_resumes_them():
    with PausingServer() as server:
        RolloutClient([server.url], MODEL, OPTIONS).pause("retract")
        client = RolloutClient([server.url], MODEL, OPTIONS)
        assert client.health()[server.url] != "ok"
        client.resume()
        client.require_servers()
