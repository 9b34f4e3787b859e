"""HTTP to SGLang servers: one session for many calls, and failures by who could cure them."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from ..errors import ServerError

# Statuses that another try, or another server, may cure; the rest is the request's own fault.
RETRIED = (408, 425, 429, 500, 502, 503, 504)
# Less than SGLang's 5 s, so that no request takes a connection that the server is closing.
KEEP_ALIVE_S = 3.0
# File descriptors that are left to the rest of the process.
RESERVED_DESCRIPTORS = 256


class TransientError(ServerError):
    """A failure that another try may cure."""


class UnreachableError(TransientError):
    """No answer at all: the server is dead, hangs, or its connection broke."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A server's answer as it came.

    Args:
        status: Of HTTP.
        content: The body.
    """

    status: int
    content: bytes


class Transport:
    """Calls servers through one pool of connections; an asynchronous context manager.

    Args:
        connect_timeout_s: For a connection alone.
    """

    def __init__(self, connect_timeout_s: float):
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = 0 if most == resource.RLIM_INFINITY else max(1, most - RESERVED_DESCRIPTORS)
        self._connect_timeout_s = connect_timeout_s
        # Servers are named by address: a proxy of the environment is for other traffic, and the
        # session reads none.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=limit, limit_per_host=0, keepalive_timeout=KEEP_ALIVE_S
            )
        )

    async def __aenter__(self) -> Transport:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._session.close()

    async def send(
        self,
        method: str,
        url: str,
        route: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float,
    ) -> Reply:
        """Return the answer, whatever it says.

        Args:
            method, url, route, body: Of the request; the body is sent as JSON.
            timeout_s: The longest silence of the server. It sends nothing before its answer is
                complete, so this is the time of the request. Waiting for a free connection does
                not count.

        Raises:
            UnreachableError: There is none.
        """
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=self._connect_timeout_s, sock_read=timeout_s
        )
        try:
            async with self._session.request(
                method, url + route, json=body, timeout=timeout
            ) as response:
                return Reply(status=response.status, content=await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            got = f"{type(error).__name__} {error}".strip()
            raise UnreachableError("the server cannot be reached", got=got, where=url) from error

    async def call(
        self,
        method: str,
        url: str,
        route: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float,
    ) -> dict[str, Any]:
        """Return the JSON of a good answer; the arguments are those of `send`.

        Raises:
            ServerError: There is none, or it says no.
        """
        reply = await self.send(method, url, route, body, timeout_s=timeout_s)
        answer = read_reply(reply, url, route)
        if not isinstance(answer, dict):
            raise TransientError(
                "the answer is damaged", expected="a JSON object", got=repr(answer)[:80], where=url
            )
        return answer


def read_reply(reply: Reply, url: str, route: str) -> Any:
    """Return the JSON of an answer, of any type.

    Raises:
        TransientError: Its status is one of `RETRIED`.
        ServerError: The server refused.
    """
    text = reply.content[:500].decode(errors="replace")
    if reply.status in RETRIED:
        got = f"status {reply.status}: {text[:300]}"
        raise TransientError(f"the server failed in {route}", got=got, where=url)
    try:
        answer = json.loads(reply.content) if reply.content else {}
    except ValueError:
        answer = {"message": text}
    has_failed = isinstance(answer, dict) and answer.get("success") is False
    if reply.status != 200 or has_failed:
        is_mapping = isinstance(answer, dict)
        message = (answer.get("message") or answer.get("error")) if is_mapping else None
        raise ServerError(
            f"the server refused {route}",
            got=f"status {reply.status}: {str(message or answer)[:500]}",
            where=url,
            fix="See the server's log",
        )
    return answer
