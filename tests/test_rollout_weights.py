"""The client brings new weights to all servers, and to those that come back."""

import functools
import threading
import time
from dataclasses import replace

import pytest
from rollout_servers import MODEL, QUICK, FakeServer, asked, generate_until

from routing_replay.errors import ServerError
from routing_replay.rollout import (
    RolloutClient,
)
from routing_replay.rollout.servers import LostWeightsError
from routing_replay.rollout.streaming import WeightStream

pytest.importorskip("aiohttp")


def test_a_restarted_server_gets_the_weights_of_the_others_before_it_gets_requests():
    def slowly(route, body, answer):
        time.sleep(0.5 if route == "/generate" else 0)
        return 200, answer

    with FakeServer(slowly) as restarted, FakeServer(slowly) as good:
        client = RolloutClient([restarted.url, good.url], MODEL, QUICK)
        client.update_weights("/checkpoint", 3)
        restarted.weight_version = "0"
        completions = client.generate([asked(), asked(), asked()])
        assert {c.weight_version for c in completions} == {"3"}
        assert client.counts["left_out"] >= 1
        generate_until(client, lambda: not client.servers[restarted.url].is_out)
        assert restarted.weight_version == "3"
        assert {c.url for c in client.generate([asked()] * 8)} == {restarted.url, good.url}
        loads = [body for route, body in restarted.calls if route == "/update_weights_from_disk"]
        assert {body["model_path"] for body in loads} == {"/checkpoint"} and len(loads) >= 2
        # Going back to older weights on purpose is not a restart.
        client.update_weights("/older", 1)
        assert client.generate([asked()])[0].weight_version == "1"


@pytest.mark.parametrize("version", ["default", "-1", "2", "4"])
def test_the_first_answer_of_weights_that_were_not_published_here_is_refused(version):
    with FakeServer() as fake:
        options = replace(QUICK, recovery_timeout_s=20)
        client = RolloutClient([fake.url], MODEL, options)
        # Until weights are published, a server may name its own as it likes.
        fake.weight_version = version
        assert client.generate([asked()])[0].weight_version == version
        client.update_weights("/checkpoint", 3)
        fake.weight_version = version  # another job's, or those of its start
        loads = len(fake.calls)
        assert client.generate([asked()])[0].weight_version == "3"
        routes = [route for route, _ in fake.calls[loads:]]
        assert routes.count("/generate") == 2 and routes.count("/update_weights_from_disk") == 1
        assert f"weight version {version}, not weight version 3" in client.servers._events[0]


def streamed(client, version):
    """A whole update without a bucket."""
    stream = WeightStream(client)
    members = stream.open(version)
    versions = set(client.weight_versions().values())
    stream.close(version)
    return members, versions


def test_a_streamed_update_has_no_number_until_it_is_complete():
    sizes = {"/server_info": {"tp_size": 2}}
    with FakeServer(lambda route, body, answer: (200, sizes.get(route, answer))) as fake:
        client = RolloutClient([fake.url], MODEL, QUICK)
        members, versions = streamed(client, 7)
        assert [member.num_ranks for member in members] == [2] and versions == {"incomplete-7"}
        assert client.generate([asked()])[0].weight_version == "7"
        routes = [route for route, _ in fake.calls if route != "/generate"]
    # An update that broke off is ended before the next one begins.
    assert routes[:3] == ["/update_weight_version", "/end_weight_update", "/begin_weight_update"]
    assert routes[3:] == ["/end_weight_update", "/flush_cache", "/update_weight_version"]


@pytest.mark.parametrize("weights", [None, 3], ids=["none published", "published"])
def test_an_answer_from_parts_of_new_weights_is_taken_by_no_client(weights):
    with FakeServer() as fake:
        client = RolloutClient([fake.url], MODEL, QUICK)
        if weights is not None:
            client.update_weights("/checkpoint", weights)
        fake.weight_version = "incomplete-4"
        fake.answer = functools.partial(refuse_updates, fake.answer)
        with pytest.raises(ServerError, match="incomplete-4"):
            client.generate([asked()])


def refuse_updates(answer, route, body, misbehave):
    if route == "/update_weights_from_disk":
        return 400, {"success": False, "message": "no such folder"}
    return answer(route, body, misbehave)


def test_servers_that_lost_streamed_weights_are_an_error_of_its_own_and_the_next_ones_heal_it():
    with FakeServer() as fake, FakeServer() as other:
        client = RolloutClient([fake.url, other.url], MODEL, replace(QUICK, min_servers=2))
        streamed(client, 7)
        fake.weight_version = "0"  # it was restarted
        with pytest.raises(LostWeightsError, match="too few servers.*not weight version 7"):
            for _ in range(100):  # the other server may answer a batch before the shortage is seen
                client.generate([asked()] * 4)
        assert client.counts["outdated"] == 1 and "loads" not in client.counts
        streamed(client, 7)
        assert {c.weight_version for c in client.generate([asked()] * 4)} == {"7"}


def test_a_server_with_replicas_cannot_take_weights_in_buckets():
    sizes = {"/server_info": {"dp_size": 2}}
    with FakeServer(lambda route, body, answer: (200, sizes.get(route, answer))) as fake:
        stream = WeightStream(RolloutClient([fake.url], MODEL, QUICK))
        with pytest.raises(ServerError, match="expected dp_size 1; got 2.*update from disk"):
            stream.open(1)
        assert fake.weight_version == "0"


def test_one_dead_server_does_not_end_a_weight_update():
    with FakeServer() as good, FakeServer() as dead:
        client = RolloutClient([dead.url, good.url], MODEL, QUICK)
        dead.http.shutdown()
        dead.http.server_close()
        client.update_weights("/checkpoint", 3)
        assert client.weight_versions() == {good.url: "3"}
        assert "cannot be reached" in client.servers[dead.url].reason
        assert [c.weight_version for c in client.generate([asked()] * 3)] == ["3"] * 3


def test_a_server_that_starts_again_during_a_weight_update_gets_the_weights():
    with FakeServer() as first:
        port = first.http.server_address[1]
    with FakeServer() as good:
        options = replace(QUICK, min_servers=2, recovery_timeout_s=20)
        client = RolloutClient([f"http://127.0.0.1:{port}", good.url], MODEL, options)
        thread = threading.Thread(target=client.update_weights, args=("/checkpoint", 3))
        thread.start()
        time.sleep(0.5)
        assert thread.is_alive()  # it waits for the second server
        with FakeServer(port=port) as second:
            thread.join(timeout=20)
            assert not thread.is_alive() and second.weight_version == "3"
            assert client.servers.is_enough


def test_weights_go_to_all_servers_and_the_version_is_read_back():
    with FakeServer() as one, FakeServer() as other:
        client = RolloutClient([one.url, other.url], MODEL, QUICK)
        client.update_weights("/checkpoint", 3)
        assert client.weight_versions() == {one.url: "3", other.url: "3"}
    body = dict(one.calls[0][1])
    assert body == {"model_path": "/checkpoint", "weight_version": "3", "flush_cache": True}


def test_a_server_that_did_not_take_the_weights_is_named():
    def refuse(route, body, answer):
        failed = {"success": False, "message": "no such folder"}
        return (400, failed) if route == "/update_weights_from_disk" else (200, answer)

    def ignore(route, body, answer):
        return 200, {"weight_version": "2"} if route == "/model_info" else answer

    with FakeServer(refuse) as fake, pytest.raises(ServerError, match="refused.*no such folder"):
        RolloutClient([fake.url], MODEL, QUICK).update_weights("/checkpoint", 3)
    with FakeServer(ignore) as fake, pytest.raises(ServerError, match="weight version 3; got 2"):
        RolloutClient([fake.url], MODEL, QUICK).update_weights("/checkpoint", 3)
