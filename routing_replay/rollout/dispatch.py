"""The requests of one batch: each waits for a slot of a server, and goes elsewhere if one fails."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from ..errors import RoutingReplayError, ServerError
from ..routes.shape import MoEShape
from .continuation import joined, rest_of, standing
from .options import ClientOptions
from .requests import ABORT, Completion, GenerateRequest, completion_of
from .servers import INCOMPLETE, Servers, ServerState, is_current
from .transport import Reply, TransientError, Transport, read_reply


class AbortedError(TransientError):
    """An aborted answer that cannot be continued; its server may be well."""


class Dispatch:
    """Sends the requests of one batch; lives in one event loop.

    Args:
        servers: Who may get requests.
        http: How to reach them.
        model: As for `RolloutClient`.
        options: Of the client.
    """

    def __init__(
        self,
        servers: Servers,
        http: Transport,
        model: MoEShape | None,
        options: ClientOptions,
    ):
        self._servers = servers
        self._http = http
        self._model = model
        self._options = options
        self._num_aborts = servers.num_aborts
        self._taken: Counter[str] = Counter()
        # Heap: who waits for a slot, the highest priority first, then who came first.
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._sending: dict[str, set[asyncio.Task[Reply]]] = {s.url: set() for s in servers}

    async def complete(self, request: GenerateRequest) -> Completion:
        """Return a whole answer: what was aborted is continued, here or elsewhere.

        Raises:
            ServerError: The request failed on every try, or was aborted for too long.
            PayloadError, RoutesError: On every try the answer carried no or wrong routes.
        """
        whole = completion = await self._with_retries(request)
        while self._is_cut_short(completion):
            self._servers.counts["continued"] += 1
            whole = self._standing(whole)
            rest = rest_of(request, whole)
            assert rest is not None  # `_attempt` lets no other pass
            completion = await self._with_retries(rest)
            whole = joined(whole, completion)
        return whole

    def drop(self, server: ServerState) -> None:
        """Take the requests of a server that was left out; let others have the one that is back."""
        if server.is_out:
            for task in self._sending[server.url]:
                task.cancel()
        while self._waiting:
            self._wake_one()

    def _is_cut_short(self, completion: Completion) -> bool:
        """Tell whether someone else has aborted it: who aborts here wants what there is."""
        return completion.finish_reason == ABORT and self._num_aborts == self._servers.num_aborts

    def _standing(self, completion: Completion) -> Completion:
        return standing(completion, self._servers[completion.url].tokens_per_step)

    async def _with_retries(self, request: GenerateRequest) -> Completion:
        failures: list[ServerError] = []
        tried: list[str] = []
        deadline = time.monotonic() + self._options.request_timeout_s
        while len(failures) <= self._options.num_retries:
            if tried:
                self._servers.counts["retried"] += 1
                num_doublings = min(len(tried) - 1, self._options.num_retries)
                await asyncio.sleep(self._options.retry_wait_s * 2**num_doublings)
            server = await self._slot(tried, request.priority or 0)
            tried.append(server.url)
            try:
                with self._holding(server, len(request.input_ids)):
                    completion = await self._attempt(server, request)
            except AbortedError as error:
                # Someone wanted it, which is no failure; weights may change at every try.
                if time.monotonic() > deadline:
                    raise _aborted_for_too_long(error, tried) from error
            except TransientError as error:
                failures.append(error)
                self._servers.failed(server, error)
                if server.is_out:
                    self.drop(server)
            else:
                self._servers.answered(server)
                return completion
        raise _last_of(failures)

    async def _attempt(self, server: ServerState, request: GenerateRequest) -> Completion:
        weights = self._servers.published
        reply = await self._reply(server, request)
        # JSON, base64, checksum and validation of a long rollout block for milliseconds.
        completion = await asyncio.to_thread(_completion, reply, request, server.url, self._model)
        version = completion.weight_version
        if not is_current(version, weights, self._servers.weights):
            expected = "known weights" if weights is None else f"weight version {weights.version}"
            # It looks healthy. An answer that ended with the pause may name the update.
            if not (version.startswith(INCOMPLETE) and self._servers.is_updating):
                self._servers.leave_out(server, f"it runs weight version {version}, not {expected}")
            raise TransientError(
                "the server runs other weights than were published, or parts of new ones",
                expected=expected,
                got=f"weight version {version}: it was restarted, or its update broke off, or "
                "another job updates it",
                where=server.url,
            )
        if self._is_cut_short(completion) and not rest_of(request, self._standing(completion)):
            raise AbortedError(
                "the server aborted a request that cannot be continued",
                got=f"{len(completion.output_ids)} tokens",
                where=server.url,
            )
        return completion if weights is None else replace(completion, sent_version=weights.version)

    async def _reply(self, server: ServerState, request: GenerateRequest) -> Reply:
        sending = asyncio.ensure_future(
            self._http.send(
                "POST",
                server.url,
                "/generate",
                request.to_json(),
                timeout_s=self._options.request_timeout_s,
            )
        )
        self._sending[server.url].add(sending)
        try:
            # Unlike `await sending`, this tells a dropped request from a batch that ends.
            await asyncio.wait([sending])
        finally:
            self._sending[server.url].discard(sending)
            sending.cancel()
        if sending.cancelled():
            raise TransientError(
                "the server was left out", got=server.reason or "no answer", where=server.url
            )
        return sending.result()

    async def _slot(self, tried: list[str], priority: int) -> ServerState:
        """Wait for room at a server in use that was tried least, and take it."""
        while True:
            servers = self._servers.in_use
            fewest = min((tried.count(s.url) for s in servers), default=0)
            free = [s for s in servers if tried.count(s.url) == fewest and self._has_room(s)]
            if free:
                server = min(free, key=lambda s: s.load)
                self._taken[server.url] += 1
                return server
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (-priority, next(self._numbers), turn))
            await turn

    def _has_room(self, server: ServerState) -> bool:
        return self._taken[server.url] < self._options.max_in_flight * (server.num_replicas or 1)

    @contextlib.contextmanager
    def _holding(self, server: ServerState, num_tokens: int) -> Iterator[None]:
        """Count a request at its server; give its slot to the next one at the end."""
        server.load += num_tokens
        try:
            yield
        finally:
            server.load -= num_tokens
            self._taken[server.url] -= 1
            self._wake_one()

    def _wake_one(self) -> None:
        while self._waiting:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return


def _completion(
    reply: Reply, request: GenerateRequest, url: str, model: MoEShape | None
) -> Completion:
    """Return a checked answer. A damaged one may come back whole from another try."""
    answer = read_reply(reply, url, "/generate")
    try:
        return completion_of(answer, request, url, model)
    except (RoutingReplayError, TypeError, ValueError, LookupError) as error:
        # What a gateway has mixed up can have any form.
        raise TransientError("the answer is damaged", got=error, where=url) from error


def _aborted_for_too_long(last: AbortedError, tried: list[str]) -> ServerError:
    return ServerError(
        "a request was aborted again and again",
        expected="an answer within request_timeout_s",
        got=f"{len(tried)} tries; at the last one {last.got}",
        where=", ".join(dict.fromkeys(tried)),
        fix="Abort less often, or raise request_timeout_s; penalties, grammars and stop strings "
        "keep an answer from being continued",
    )


def _last_of(failures: list[ServerError]) -> RoutingReplayError:
    """Return the error of a request that has failed on every try."""
    last = failures[-1]
    if isinstance(last.__cause__, RoutingReplayError):  # a damaged answer
        return last.__cause__
    return ServerError(
        f"a request failed {len(failures)} times",
        got=last.got,
        where=", ".join(dict.fromkeys(str(failure.where) for failure in failures)),
        fix="See the servers' logs; a server that hangs answers neither health() nor us",
    )
