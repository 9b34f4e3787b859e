"""Rollouts over HTTP from one or many SGLang servers; needs aiohttp, not SGLang."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

from ..errors import RoutingReplayError, ServerError
from ..routes.origin import require_covered
from ..routes.shape import MoEShape
from .requests import Completion, GenerateRequest, completion_of

# Statuses that another try, or another server, may cure; the rest is the request's own fault.
RETRIED = (408, 425, 429, 500, 502, 503, 504)
# An idle or busy server answers this in milliseconds; a gateway may not know it at all.
INFO_TIMEOUT_S = 5.0
# Less than SGLang's 5 s, so that no request takes a connection that the server is closing.
KEEP_ALIVE_S = 3.0
# File descriptors that are left to the rest of the process.
RESERVED_DESCRIPTORS = 256
T = TypeVar("T")
# One limit on the requests in flight for each server.
Limits = Mapping[str, asyncio.Semaphore]


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """Timeouts, retries and limits of a client.

    Args:
        request_timeout_s: For one generation, from its dispatch to its answer.
        control_timeout_s: For one control call: health, abort, weight update.
        connect_timeout_s: For the connection alone: a dead machine should not cost a generation.
        num_retries: Further tries of a request that met a dead, full or hanging server, or whose
            answer was damaged.
        retry_wait_s: Before the first retry; doubled for each further one.
        max_in_flight: Requests at a time at each data-parallel replica of a server (`--dp-size`,
            which the server reports). The server queues what it cannot run.
        max_faults: Failures in a row after which a server gets no requests while another one can
            take them. The next batch asks it whether it is healthy again.
        max_uncovered: Largest fraction of the rows of a batch that may come back uncovered against
            the caller's intention; above it `generate` raises with the causes. 1: any.
    """

    request_timeout_s: float = 1800.0
    control_timeout_s: float = 600.0
    connect_timeout_s: float = 10.0
    num_retries: int = 3
    retry_wait_s: float = 0.5
    max_in_flight: int = 512
    max_faults: int = 3
    max_uncovered: float = 1.0


class RolloutClient:
    """Sends a batch of requests to the least loaded of several servers.

    Args:
        urls: Base URLs of the servers, "http://host:port".
        model: Layers, experts and top-k of the model in training; compared with every answer.
            Needed for stock payloads.
        options: See `ClientOptions`.

    Raises:
        ServerError: No URL.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: MoEShape | None = None,
        options: ClientOptions | None = None,
    ):
        if not urls:
            raise ServerError("a client needs a server", expected="one URL or more", got="none")
        self.urls = [url.rstrip("/") for url in urls]
        self.model = model
        self.options = options or ClientOptions()
        self._load = dict.fromkeys(self.urls, 0)
        self._num_replicas: dict[str, int] = {}
        self._faults = dict.fromkeys(self.urls, 0)  # in a row
        self._weight_version: int | None = None  # that `update_weights` loaded last

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Sample a completion for each request.

        Args:
            requests: Any number; a prompt that is sampled n times stands here n times (the
                servers share its prefix).
            on_completion: Called with a request's number as soon as it is done.

        Returns:
            The completions in the order of the requests.

        Raises:
            ServerError: A request failed on every try; an answer from older weights than
                `update_weights` last loaded counts as a failure.
            PayloadError, RoutesError: On every try the answer carried no or wrong routes, or more
                than `max_uncovered` of the batch's rows are not covered.
        """
        return _run(self.agenerate(requests, on_completion))

    def update_weights(self, path: str, weight_version: int, flush_cache: bool = True) -> None:
        """Load a checkpoint from a disk that all servers see, and check the version afterwards.

        Args:
            path: A Hugging Face checkpoint.
            weight_version: The version that rows computed by these weights carry.
            flush_cache: Drop all cached prefixes, which the old weights computed. Needs idle
                servers. Without it their rows stay, and keep their old version.

        Raises:
            ServerError: A server refused, or reports another version afterwards.
        """
        body = {
            "model_path": str(path),
            "weight_version": str(weight_version),
            "flush_cache": flush_cache,
        }
        _run(self._at_all("POST", "/update_weights_from_disk", body))
        for url, version in self.weight_versions().items():
            if version != str(weight_version):
                raise ServerError(
                    "the server does not run the new weights",
                    expected=f"weight version {weight_version}",
                    got=version,
                    where=url,
                    fix="Look for the failed update in the server's log",
                )
        self._weight_version = int(weight_version)

    def weight_versions(self) -> dict[str, str]:
        """Return the weight version that each server reports."""
        answers = _run(self._at_all("GET", "/model_info"))
        return {url: str(answer.get("weight_version")) for url, answer in answers.items()}

    def health(self) -> dict[str, str]:
        """Return "ok", or what is wrong, for each server; never raise."""
        return _run(self._health())

    def pause(self, mode: str = "in_place") -> None:
        """Stop sampling.

        Args:
            mode: "in_place" keeps running requests where they are; "retract" takes their slots
                away (their rows so far stay true); "abort" ends them with what they have.
        """
        _run(self._at_all("POST", "/pause_generation", {"mode": mode}))

    def resume(self) -> None:
        """Continue sampling after `pause`."""
        _run(self._at_all("POST", "/continue_generation", {}))

    def abort(self) -> None:
        """End all requests; each answers with the tokens and routes that it has."""
        _run(self._at_all("POST", "/abort_request", {"abort_all": True}))

    def flush_cache(self) -> None:
        """Drop all cached prefixes."""
        _run(self._at_all("POST", "/flush_cache", {}))

    @property
    def faults(self) -> dict[str, int]:
        """Failures of each server since it last answered well."""
        return dict(self._faults)

    async def agenerate(
        self,
        requests: Sequence[GenerateRequest],
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Sample as `generate` does, inside a running event loop."""

        async def one(
            http: aiohttp.ClientSession, number: int, request: GenerateRequest
        ) -> Completion:
            completion = await self._with_retries(http, limits, request)
            if on_completion is not None:
                on_completion(number, completion)
            return completion

        async with self._http(self.options.request_timeout_s) as http:
            await self._look_after_faulty(http)
            limits = await self._limits(http)
            tasks = [asyncio.ensure_future(one(http, n, r)) for n, r in enumerate(requests)]
            try:
                completions = list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        routes = [c.routes for c in completions if c.routes is not None]
        require_covered(routes, self.options.max_uncovered, ", ".join(self.urls))
        return completions

    async def _limits(self, http: aiohttp.ClientSession) -> Limits:
        """Return each server's limit; a server that does not tell its replicas counts as one."""

        async def ask(url: str) -> None:
            try:
                call = _call(http, "GET", url, "/server_info")
                info = await asyncio.wait_for(call, INFO_TIMEOUT_S)
                self._num_replicas[url] = max(1, int(info.get("dp_size") or 1))
            except (TimeoutError, ServerError):
                return

        await _all(ask(url) for url in self.urls if url not in self._num_replicas)
        per_replica = self.options.max_in_flight
        return {
            url: asyncio.Semaphore(per_replica * self._num_replicas.get(url, 1))
            for url in self.urls
        }

    async def _with_retries(
        self, http: aiohttp.ClientSession, limits: Limits, request: GenerateRequest
    ) -> Completion:
        failures: list[ServerError] = []
        weight_version = self._weight_version
        for attempt in range(self.options.num_retries + 1):
            if attempt:
                await asyncio.sleep(self.options.retry_wait_s * 2 ** (attempt - 1))
            url = self._choose([failure.where for failure in failures])
            self._load[url] += len(request.input_ids)
            try:
                async with limits[url]:
                    reply = await _send(http, "POST", url, "/generate", request.to_json())
                # JSON, base64, checksum and validation of a long rollout block for milliseconds.
                completion = await asyncio.to_thread(_completion, reply, request, url, self.model)
                _check_weights(completion, weight_version)
                self._faults[url] = 0
                return completion
            except _TransientError as error:
                self._faults[url] += 1
                failures.append(error)
            finally:
                self._load[url] -= len(request.input_ids)
        if isinstance(failures[-1].__cause__, RoutingReplayError):  # a damaged answer
            raise failures[-1].__cause__
        raise ServerError(
            f"a request failed {len(failures)} times",
            got=failures[-1].got,
            where=", ".join(dict.fromkeys(str(failure.where) for failure in failures)),
            fix="See the servers' logs; a server that hangs answers neither health() nor us",
        )

    def _choose(self, tried: Sequence[object]) -> str:
        """Return a server that was not tried yet, works, and has little to do."""
        most = self.options.max_faults
        return min(
            self.urls, key=lambda u: (tried.count(u), self._faults[u] >= most, self._load[u])
        )

    async def _look_after_faulty(self, http: aiohttp.ClientSession) -> None:
        """Take servers back that answer again, with the weights that were loaded last."""

        async def ask(url: str) -> None:
            try:
                await asyncio.wait_for(_call(http, "GET", url, "/health"), INFO_TIMEOUT_S)
                answer = await asyncio.wait_for(
                    _call(http, "GET", url, "/model_info"), INFO_TIMEOUT_S
                )
            except (TimeoutError, ServerError):
                return
            if self._weight_version in (None, _number(answer.get("weight_version"))):
                self._faults[url] = 0

        most = self.options.max_faults
        await _all(ask(url) for url in self.urls if self._faults[url] >= most)

    async def _health(self) -> dict[str, str]:
        async def one(http: aiohttp.ClientSession, url: str) -> str:
            try:
                await _call(http, "GET", url, "/health_generate")
            except ServerError as error:
                return str(error)
            return "ok"

        async with self._http(self.options.connect_timeout_s) as http:
            return dict(zip(self.urls, await _all(one(http, u) for u in self.urls), strict=True))

    async def _at_all(
        self, method: str, route: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, dict[str, Any]]:
        async with self._http(self.options.control_timeout_s) as http:
            calls = (_call(http, method, url, route, body) for url in self.urls)
            return dict(zip(self.urls, await _all(calls), strict=True))

    def _http(self, timeout_s: float) -> aiohttp.ClientSession:
        # A server sends nothing before the answer is complete, so the time to the first byte is
        # that of the request. Waiting for a free connection does not count.
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=self.options.connect_timeout_s, sock_read=timeout_s
        )
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = 0 if most == resource.RLIM_INFINITY else max(1, most - RESERVED_DESCRIPTORS)
        connector = aiohttp.TCPConnector(
            limit=limit, limit_per_host=0, keepalive_timeout=KEEP_ALIVE_S
        )
        # Servers are named by address: a proxy of the environment is for other traffic, and the
        # session reads none.
        return aiohttp.ClientSession(timeout=timeout, connector=connector)


class _TransientError(ServerError):
    """A failure that another try may cure."""


def _check_weights(completion: Completion, weight_version: int | None) -> None:
    """Raise for older weights: a restarted server looks healthy, and serves its first ones."""
    got = completion.weight_version
    if weight_version is not None and got.isdigit() and int(got) < weight_version:
        raise _TransientError(
            "the server runs older weights than `update_weights` loaded",
            got=f"weight version {got} instead of {weight_version}: it was restarted, "
            "call update_weights again",
            where=completion.url,
        )


def _number(version: object) -> int | None:
    return int(str(version)) if str(version).isdigit() else None


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, in a thread of its own where this one has an event loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


async def _all(calls: Iterable[Awaitable[T]]) -> list[T]:
    return list(await asyncio.gather(*calls))


async def _call(
    http: aiohttp.ClientSession,
    method: str,
    url: str,
    route: str,
    body: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    return _answer(await _send(http, method, url, route, body), url, route)


async def _send(
    http: aiohttp.ClientSession,
    method: str,
    url: str,
    route: str,
    body: Mapping[str, Any] | None = None,
) -> tuple[int, bytes]:
    """Return status and content of the answer."""
    try:
        async with http.request(method, url + route, json=body) as response:
            return response.status, await response.read()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        got = f"{type(error).__name__} {error}".strip()
        raise _TransientError("the server cannot be reached", got=got, where=url) from error


def _answer(reply: tuple[int, bytes], url: str, route: str) -> dict[str, Any]:
    status, content = reply
    text = content[:500].decode(errors="replace")
    if status in RETRIED:
        got = f"status {status}: {text[:300]}"
        raise _TransientError(f"the server failed in {route}", got=got, where=url)
    try:
        answer = json.loads(content) if content else {}
    except ValueError:
        answer = {"message": text}
    has_failed = isinstance(answer, dict) and answer.get("success") is False
    if status != 200 or has_failed:
        message = answer.get("message") or answer.get("error") or answer
        raise ServerError(
            f"the server refused {route}",
            got=f"status {status}: {str(message)[:500]}",
            where=url,
            fix="See the server's log",
        )
    return answer


def _completion(
    reply: tuple[int, bytes], request: GenerateRequest, url: str, model: MoEShape | None
) -> Completion:
    """Return a checked answer. A damaged one may come back whole from another try."""
    answer = _answer(reply, url, "/generate")
    try:
        return completion_of(answer, request, url, model)
    except RoutingReplayError as error:
        raise _TransientError("the answer is damaged", got=error, where=url) from error
