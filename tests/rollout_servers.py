"""Stand-ins of servers that misbehave as told: made of the standard library, no SGLang."""

import asyncio
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from test_payload import meta, random_ids, stock

from routing_replay.rollout import (
    ClientOptions,
    GenerateRequest,
)
from routing_replay.routes.payload import encode
from routing_replay.routes.routes import Routes
from routing_replay.routes.shape import MoEShape

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

    def __init__(
        self, misbehave=lambda route, body, answer: (200, answer), port=0, host="127.0.0.1"
    ):
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

        self.http = ThreadingHTTPServer((host, port), Handler)
        self.url = f"http://{host}:{self.http.server_address[1]}"
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


def generate_until(client, is_done, timeout_s=60):
    """Sample one request after the other over one session: checks that take longer go on."""

    async def generate():
        deadline = time.monotonic() + timeout_s
        async with client.session() as session:
            while not is_done():
                assert time.monotonic() < deadline
                await session.run(session.complete(asked()))

    asyncio.run(generate())
