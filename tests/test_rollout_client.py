"""The client against servers that misbehave: made of the standard library, no SGLang."""

import asyncio
import contextlib
import functools
import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from test_payload import meta, random_ids, stock

from routing_replay import rollout
from routing_replay.errors import ConfigError, PayloadError, RoutesError, ServerError
from routing_replay.rollout import (
    ClientOptions,
    GenerateRequest,
    RolloutClient,
    probe,
    request_fields,
)
from routing_replay.rollout.garbage import OBJECTS_BETWEEN, RARE_COLLECTIONS
from routing_replay.rollout.servers import LostWeightsError
from routing_replay.rollout.streaming import WeightStream
from routing_replay.routes.origin import Origin, is_covered
from routing_replay.routes.payload import encode
from routing_replay.routes.routes import Routes
from routing_replay.routes.shape import MoEShape

pytest.importorskip("aiohttp")
MODEL = MoEShape(layers=(1, 2, 5), num_experts=16, top_k=4)
QUICK = ClientOptions(
    request_timeout_s=2,
    control_timeout_s=2,
    num_retries=2,
    retry_wait_s=0.01,
    health_every_s=0.3,
    health_timeout_s=1,
    recovery_timeout_s=0.5,
)


class FakeServer:
    """Answers `/generate` as SGLang does; `misbehave` may change status, answer, or both.

    Args:
        misbehave: Called with the route, the body and the good answer; returns status and answer.
    """

    def __init__(self, misbehave=lambda route, body, answer: (200, answer), port=0):
        self.calls, self.weight_version = [], "0"
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
                fake.calls.append((self.path, body))
                self.reply(*fake.answer(self.path, body, misbehave))

            def do_GET(self):
                self.reply(*fake.answer(self.path, {}, misbehave))

            def reply(self, status, answer):
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(OSError):  # the client may have given up
                    self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        # How long `shutdown` waits: half a second by default.
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, route, body, misbehave):
        good = {
            "/model_info": {"weight_version": self.weight_version},
            "/server_info": {"enable_return_routed_experts": True},
        }.get(route, {"success": True})
        if route == "/generate":
            good = {"meta_info": self.generated(body)}
        if route == "/update_weights_from_disk":
            self.weight_version = body["weight_version"]
        if route == "/update_weight_version":
            self.weight_version = body["new_version"]
        return misbehave(route, body, good)

    def generated(self, body):
        num_tokens = len(body["input_ids"]) + 3
        ids_TLK = random_ids(num_tokens - 1)
        start = body.get("routed_experts_start_len", 0)
        routes = Routes(expert_ids_TLK=ids_TLK, layers=MODEL.layers, num_experts=16)[start:]
        level = body["sampling_params"].get("custom_params")
        data = encode(routes, start=start) if level else stock(routes.expert_ids_TLK)
        meta_info = meta(data) if body.get("return_routed_experts") else {}
        meta_info["weight_version"] = getattr(self, "weight_version", "0")
        logprobs = [[-0.5, 7, None], [-0.25, 8, None], [-1.0, 9, None]]
        return {"output_token_logprobs": logprobs, "finish_reason": {"type": "length"}, **meta_info}


def asked(num_tokens=5, **options):
    return GenerateRequest(input_ids=range(num_tokens), **options)


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
    with FakeServer(slow_for_short) as fake:
        completions = RolloutClient([fake.url], MODEL).generate(
            [asked(3), asked(9)], lambda number, completion: finished.append(number)
        )
    assert [c.routes.num_rows for c in completions] == [5, 11]
    assert finished == [1, 0]


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


@pytest.mark.parametrize("trouble", ["500", "hang", "dead"])
def test_another_server_takes_over_from_one_that_fails(trouble):
    def fail(route, body, answer):
        time.sleep(3 if trouble == "hang" else 0)
        return 500, {"error": "out of memory"}

    with FakeServer() as good, FakeServer(fail) as bad:
        if trouble == "dead":
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


def generate_until(client, is_done, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not is_done():
        assert time.monotonic() < deadline
        client.generate([asked()])


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


def test_one_dead_server_does_not_end_a_weight_update():
    with FakeServer() as good, FakeServer() as dead:
        client = RolloutClient([dead.url, good.url], MODEL, QUICK)
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


def test_too_few_servers_end_a_batch_with_what_happened():
    options = replace(QUICK, min_servers=2)
    with FakeServer() as good, FakeServer() as dead:
        client = RolloutClient([dead.url, good.url], MODEL, options)
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


STOP = 99


class AbortingServer(FakeServer):
    """Aborts answers of 12 tokens twice; weights are newer after the first part.

    Each part that it aborts ends with a stop token, which SGLang does not look at in that step.

    Args:
        num_new: Tokens that it samples after so many.
    """

    ALL = 12

    def __init__(self, *arguments, num_new=((5, 5), (9, 4), (12, 5)), num_drafts=None):
        self.num_new, self.num_drafts = dict(num_new), num_drafts
        super().__init__(*arguments)

    def answer(self, route, body, misbehave):
        if route == "/server_info":
            return 200, {"speculative_num_draft_tokens": self.num_drafts}
        return super().answer(route, body, misbehave)

    def generated(self, body):
        start, num_given = body["routed_experts_start_len"], len(body["input_ids"])
        assert STOP not in body["input_ids"]
        num_new = self.num_new[num_given]
        assert body["sampling_params"]["max_new_tokens"] == self.ALL + 5 - num_given
        num_tokens = num_given + num_new
        version = int(num_given > 5)
        routes = Routes(
            expert_ids_TLK=random_ids(self.ALL + 4)[: num_tokens - 1],
            layers=MODEL.layers,
            num_experts=16,
            weight_version_T=np.full(num_tokens - 1, version),
        )[start:]
        new = range(num_given, num_tokens)
        is_whole = num_tokens == self.ALL + 5
        ids = [t if is_whole or t < num_tokens - 1 else STOP for t in new]
        return {
            "output_token_logprobs": [[-0.125 * t, i, None] for t, i in zip(new, ids, strict=True)],
            "output_top_logprobs": [[[-0.125 * t, t, None], [-9.0, 0, None]] for t in new],
            "output_token_sampling_mask": [[0, t] for t in new],
            "output_token_sampling_logprobs": [-0.0625 * t for t in new],
            "finish_reason": {"type": "length" if is_whole else "abort"},
            **meta(encode(routes, start=start)),
            "weight_version": str(version),
        }


def test_an_aborted_answer_is_continued_elsewhere_and_joined():
    request = asked(sampling={"max_new_tokens": 12}, wants_sampling_mask=True, num_top_logprobs=2)
    with AbortingServer() as one, AbortingServer() as other:
        client = RolloutClient([one.url, other.url], MODEL, QUICK)
        (completion,) = client.generate([request])
    assert client.counts == {"continued": 2}
    assert completion.finish_reason == "length"
    assert completion.output_ids == list(range(5, 17))
    np.testing.assert_array_equal(completion.mu_logprobs, -0.125 * np.arange(5, 17))
    np.testing.assert_array_equal(completion.mask_logprobs, -0.0625 * np.arange(5, 17))
    assert completion.sampling_mask == [[0, t] for t in range(5, 17)]
    np.testing.assert_array_equal(completion.top_ids[:, 0], np.arange(5, 17))
    assert completion.top_logprobs.shape == (12, 2)
    np.testing.assert_array_equal(completion.routes.expert_ids_TLK, random_ids(16))
    # Row 8 is the last token of the first part: it was sampled then, and fed in the second.
    assert completion.routes.weight_version_T.tolist() == [0] * 8 + [1] * 8


def test_a_speculative_servers_last_drafts_are_sampled_again():
    """Any token of a step's three may be a stop token."""
    with AbortingServer(num_new=((5, 6), (8, 9)), num_drafts=3) as fake:
        client = RolloutClient([fake.url], MODEL, QUICK)
        (completion,) = client.generate([asked(sampling={"max_new_tokens": 12})])
    assert completion.output_ids == list(range(5, 17))
    np.testing.assert_array_equal(completion.routes.expert_ids_TLK, random_ids(16))
    assert completion.routes.weight_version_T.tolist() == [0] * 7 + [1] * 9


def aborting(num_aborts, cut):
    """Abort the first generations; `cut` changes what is known of them."""
    aborts = iter(range(num_aborts))

    def misbehave(route, body, answer):
        if route == "/generate" and next(aborts, None) is not None:
            answer["meta_info"]["finish_reason"] = {"type": "abort"}
            cut(answer["meta_info"])
        return 200, answer

    return misbehave


def drop_tokens(meta_info):
    meta_info["output_token_logprobs"] = []
    del meta_info["routed_experts"]


def drop_rows(meta_info):
    del meta_info["routed_experts"]


@pytest.mark.parametrize("cut", [drop_tokens, drop_rows])
def test_a_request_that_was_aborted_while_it_waited_is_sent_again_as_often_as_it_takes(cut):
    """SGLang has no rows of one that was retracted, and a part of its tokens."""
    with FakeServer(aborting(QUICK.num_retries + 2, cut)) as fake:
        client = RolloutClient([fake.url], MODEL, QUICK)
        (completion,) = client.generate([asked(sampling={"max_new_tokens": 3})])
        assert [body["input_ids"] for route, body in fake.calls if route == "/generate"] == [
            list(range(5))
        ] * (QUICK.num_retries + 3)
    assert completion.output_ids == [7, 8, 9]
    assert completion.routes.num_rows == 7
    assert client.counts == {"retried": QUICK.num_retries + 2}


def test_what_this_client_aborted_without_rows_has_no_tokens():
    clients = []

    def abort_first(route, body, answer):
        if route == "/generate":
            clients[0].abort()
        return aborting(1, drop_rows)(route, body, answer)

    with FakeServer(abort_first) as fake:
        clients.append(RolloutClient([fake.url], MODEL, QUICK))
        (completion,) = clients[0].generate([asked(sampling={"max_new_tokens": 3})])
    assert (completion.finish_reason, completion.output_ids) == ("abort", [])
    assert completion.routes is None


def test_a_request_that_is_aborted_for_longer_than_its_timeout_is_given_up():
    options = replace(QUICK, request_timeout_s=0.3)
    with FakeServer(aborting(1000, drop_tokens)) as fake:
        client = RolloutClient([fake.url], MODEL, options)
        with pytest.raises(ServerError, match="aborted again and again.*the last one 0 tokens"):
            client.generate([asked(sampling={"max_new_tokens": 3})])
        assert client.faults == {fake.url: 0}


def test_what_this_client_aborted_is_returned_as_it_is():
    clients = []

    def abort_first(route, body, answer):
        if route == "/generate":
            clients[0].abort()
        return 200, answer

    with AbortingServer(abort_first) as fake:
        clients.append(RolloutClient([fake.url], MODEL, QUICK))
        (completion,) = clients[0].generate([asked(sampling={"max_new_tokens": 12})])
    assert (completion.finish_reason, len(completion.output_ids)) == ("abort", 5)


@pytest.mark.parametrize(
    "sampling",
    [
        {"max_new_tokens": 12, "frequency_penalty": 0.5},
        {"max_new_tokens": 12, "stop": ["\n"]},
        {"max_new_tokens": 12, "repetition_penalty": 1.1},
    ],
)
def test_an_aborted_answer_that_cannot_be_continued_exactly_is_sampled_again(sampling):
    with FakeServer(aborting(2, lambda meta_info: None)) as fake:
        client = RolloutClient([fake.url], MODEL, QUICK)
        (completion,) = client.generate([asked(sampling=sampling)])
        assert completion.output_ids == [7, 8, 9]
        bodies = [body for route, body in fake.calls if route == "/generate"]
        assert [len(body["input_ids"]) for body in bodies] == [5, 5, 5]
        # The server was well: someone else aborted.
        assert client.faults == {fake.url: 0}


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


def test_the_processor_time_of_a_batch_grows_with_its_requests_alone():
    """Every request waits at once; a pool that is searched for each would be quadratic."""
    code = "; ".join(
        [
            "import asyncio, time, test_rollout_client as t",
            "print(*(asyncio.run(t.seconds_of_waiting_requests(n)) for n in (100, 200, 800)))",
        ]
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    _, few, many = map(float, done.stdout.split())  # the first has what is done once
    # 4 times as many requests; with httpx's pool they cost 10 times as much.
    assert many < 7 * few, done.stdout


def test_garbage_is_collected_rarely_in_a_batch_and_as_before_after_it():
    before, seen = gc.get_threshold(), []

    def look(route, body, answer):
        seen.append(gc.get_threshold()[0])
        return 200, answer

    with FakeServer(look) as fake:
        client = RolloutClient([fake.url], MODEL)
        client.generate([asked()])
    assert max(seen) == OBJECTS_BETWEEN
    assert gc.get_threshold() == before


def test_overlapping_batches_restore_the_threshold_once_and_leave_an_own_choice():
    first, second, before = RARE_COLLECTIONS, RARE_COLLECTIONS, gc.get_threshold()
    with first:
        with second:
            pass
        assert gc.get_threshold()[0] == OBJECTS_BETWEEN
    assert gc.get_threshold() == before
    gc.set_threshold(0)  # a process that never collects
    try:
        with first:
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)


async def seconds_of_waiting_requests(count):
    """Processor seconds of a batch whose requests are all in flight together."""
    arrived, everyone = [], asyncio.Event()

    async def answer(reader, writer):
        while line := await reader.readline():
            head = line + await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            await reader.readexactly(int(length.group(1)) if length else 0)
            if b"/generate" in line:
                arrived.append(1)
                if len(arrived) == count:
                    everyone.set()
                await everyone.wait()
            content = json.dumps({"meta_info": EMPTY}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content))
            writer.write(content)

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=count)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    client = RolloutClient([url], options=ClientOptions(max_in_flight=count, health_every_s=3600))
    start = time.process_time()
    await client.agenerate([asked(capture="off") for _ in range(count)])
    seconds = time.process_time() - start
    server.close()
    return seconds


EMPTY = {"output_token_logprobs": [], "finish_reason": {"type": "length"}, "weight_version": "0"}


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
