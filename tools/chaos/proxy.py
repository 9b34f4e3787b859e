"""A proxy before a real server: it damages, delays and withholds what passes, as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import aiohttp
from aiohttp import web

HOST = "127.0.0.1"
SLOW_S = 0.5
# What may happen to one answer; all but the first two come after the server has worked for it.
FAULTS = ("close", "error", "cut", "garbage", "flip", "slow")
ROUTES = "routed_experts"
T = TypeVar("T")


def no_fault(number: int) -> None:
    """Plan nothing."""


class Proxy:
    """Serves at `url` what a real server says, with faults; a context manager.

    Args:
        target: Base URL of the real server.
        fault_of: Called with the number of each `/generate`; returns one of `FAULTS`, or None.
    """

    def __init__(self, target: str, fault_of: Callable[[int], str | None] = no_fault):
        self.fault_of = fault_of
        self.prompts: list[tuple[int, ...]] = []  # of every request that came
        self._target = target
        self._numbers = iter(range(1 << 62))
        self._is_forgetful = False
        self._loop = asyncio.new_event_loop()
        self._may_answer = asyncio.Event()
        self._may_answer.set()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.port = self._run(self._start(0))
        self.url = f"http://{HOST}:{self.port}"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self.end()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def freeze(self) -> None:
        """Answer nothing more, not even about its health, as a stopped process."""
        self._loop.call_soon_threadsafe(self._may_answer.clear)

    def release(self) -> None:
        """Answer again, what has waited first."""
        self._loop.call_soon_threadsafe(self._may_answer.set)

    def end(self) -> None:
        """Break all connections and listen no more, as a killed process."""
        self._run(self._stop())

    def restart(self) -> None:
        """Listen again, with the weights that a server has at its start."""
        self._is_forgetful = True
        self._run(self._start(self.port))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self, port: int) -> int:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{route:.*}", self._answer)
        self._session = aiohttp.ClientSession()
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, port, reuse_address=True).start()
        return int(self._runner.addresses[0][1])

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        fault = None
        if request.path == "/generate":
            self.prompts.append(tuple(json.loads(body)["input_ids"]))
            fault = self.fault_of(next(self._numbers))
        await self._may_answer.wait()
        if fault == "error":
            return web.Response(status=503, text="a fault was planned")
        if fault == "close":
            return _closed(request)
        status, content = await self._real(request, body)
        await self._may_answer.wait()
        match fault:
            case "slow":
                await asyncio.sleep(SLOW_S)
            case "garbage":
                content = random.randbytes(200)
            case "flip":
                content = flipped(content)
            case "cut":
                return await _cut(request, content)
        return web.Response(status=status, body=content, content_type="application/json")

    async def _real(self, request: web.Request, body: bytes) -> tuple[int, bytes]:
        """Return the real answer, with the versions of a server that has no new weights yet."""
        if request.path == "/update_weights_from_disk":
            self._is_forgetful = False
        try:
            async with self._session.request(
                request.method, self._target + request.path_qs, data=body, headers=JSON
            ) as reply:
                status, content = reply.status, await reply.read()
        except aiohttp.ClientError:
            return 502, b"the real server does not answer"
        return status, forgetful(content) if self._is_forgetful else content


JSON = {"Content-Type": "application/json"}


def flipped(content: bytes) -> bytes:
    """Return an answer with one damaged byte in the middle of its routes, if it has any."""
    answer = json.loads(content)
    payload = answer.get("meta_info", {}).get(ROUTES)
    if payload:
        middle = len(payload) // 2
        other = "A" if payload[middle] != "A" else "B"
        answer["meta_info"][ROUTES] = payload[:middle] + other + payload[middle + 1 :]
    return json.dumps(answer).encode()


def forgetful(content: bytes) -> bytes:
    """Return an answer as of weight version 0, which a server has at its start."""
    try:
        answer = json.loads(content)
    except ValueError:
        return content
    for part in (answer, answer.get("meta_info", {})) if isinstance(answer, dict) else ():
        if "weight_version" in part:
            part["weight_version"] = "0"
    return json.dumps(answer).encode()


def _closed(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.close()
    return web.Response()


async def _cut(request: web.Request, content: bytes) -> web.StreamResponse:
    """Promise the whole answer and send half of it."""
    response = web.StreamResponse()
    response.content_length = len(content)
    with contextlib.suppress(ConnectionError):  # the client has left before
        await response.prepare(request)
        await response.write(content[: len(content) // 2])
    _closed(request)
    return response
