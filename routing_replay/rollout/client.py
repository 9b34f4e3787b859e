"""Rollouts over HTTP from one or many SGLang servers; needs aiohttp, not SGLang."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, TypeVar

from ..errors import ServerError
from ..routes.origin import num_uncovered, require_few_uncovered
from ..routes.shape import MoEShape
from .dispatch import Dispatch
from .garbage import RARE_COLLECTIONS
from .options import ClientOptions
from .requests import Completion, GenerateRequest
from .servers import Servers, ServerState, Weights
from .session import Session, all_or_none, run_to_end
from .transport import TransientError, Transport
from .watch import Watch

# An idle or busy server answers this in milliseconds; a gateway may not know it at all.
INFO_TIMEOUT_S = 5.0
T = TypeVar("T")
R = TypeVar("R")


class RolloutClient:
    """Sends a batch of requests to the least loaded of several servers.

    A server that fails again and again, hangs or dies is left out. While a batch runs, and in a
    weight update that too few servers took, such servers are asked for their health; one that is
    well again gets the weights that were loaded last, and then requests.

    Args:
        urls: Base URLs of the servers, "http://host:port".
        model: Layers, experts and top-k of the model in training; compared with every answer.
            Needed for stock payloads.
        options: See `ClientOptions`.

    Raises:
        ServerError: Fewer URLs than `min_servers`, or none.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: MoEShape | None = None,
        options: ClientOptions | None = None,
    ):
        self.model = model
        self.options = options or ClientOptions()
        self.servers = Servers(
            urls,
            max_faults=self.options.max_faults,
            min_servers=self.options.min_servers,
            health_every_s=self.options.health_every_s,
        )
        self.urls = [server.url for server in self.servers]

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Sample a completion for each request.

        An answer that someone else aborted is continued with the tokens that it has, by the same or
        another server, and joined; its last step is sampled again. Where that would not be exact
        (penalties, grammars, stop strings), or the server returned no rows, the answer is sampled
        again. What `abort` or `pause` of this client ended is returned as it is: its last token may
        be a stop token that the server did not look at.

        Args:
            requests: Any number; a prompt that is sampled n times stands here n times (the
                servers share its prefix).

        Returns:
            The completions in the order of the requests.

        Raises:
            ServerError: A request failed on every try (an answer from older weights than
                `update_weights` last loaded is a failure), or too few servers were left.
            PayloadError, RoutesError: On every try the answer carried no or wrong routes, or more
                than `max_uncovered` of the batch's rows are not covered.
        """
        return run_to_end(self.agenerate(requests))

    async def agenerate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Sample as `generate` does, inside a running event loop."""

        async def keep(_: int, completion: Completion) -> Completion:
            return completion

        return await self._results(requests, keep)

    def generate_each(
        self, requests: Sequence[GenerateRequest], work: Callable[[int, Completion], R]
    ) -> list[R]:
        """Sample as `generate` does, and hand over each completion as soon as it is done.

        Args:
            requests: As for `generate`.
            work: Called with a request's number and its completion, in a thread of its own. The
                client keeps what it returns, not the completion: a batch's routes need not be in
                memory together.

        Returns:
            What `work` returned, in the order of the requests.

        Raises:
            Exception: What `generate` raises, and what `work` raises.
        """
        return run_to_end(self.agenerate_each(requests, work))

    async def agenerate_each(
        self, requests: Sequence[GenerateRequest], work: Callable[[int, Completion], R]
    ) -> list[R]:
        """Sample as `generate_each` does, inside a running event loop."""

        async def use(number: int, completion: Completion) -> R:
            return await asyncio.to_thread(work, number, completion)

        return await self._results(requests, use)

    async def _results(
        self,
        requests: Sequence[GenerateRequest],
        use: Callable[[int, Completion], Awaitable[R]],
    ) -> list[R]:
        uncovered: Counter[str] = Counter()
        num_rows = 0

        async def one(session: Session, number: int, request: GenerateRequest) -> R:
            nonlocal num_rows
            completion = await session.complete(request)
            if completion.routes is not None:
                uncovered.update(num_uncovered([completion.routes]))
                num_rows += completion.routes.num_rows
            return await use(number, completion)

        async with self.session() as session:
            calls = [one(session, *numbered) for numbered in enumerate(requests)]
            results = await session.run(all_or_none(calls))
        most, where = self.options.max_uncovered, ", ".join(self.urls)
        require_few_uncovered(uncovered, num_rows, most, where)
        return results

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """Connect to the servers, and watch them, for requests that are not known together.

        Raises:
            ServerError: Too few servers are well.
        """
        with RARE_COLLECTIONS:
            async with self.transport() as http, self.transport() as control:
                await self.watch(control).run(until_enough=True)
                await self._learn_sizes(control)
                dispatch = Dispatch(self.servers, http, self.model, self.options)
                watch = asyncio.ensure_future(self.watch(control, dispatch.drop).run())
                try:
                    yield Session(dispatch, watch)
                finally:
                    watch.cancel()
                    await asyncio.gather(watch, return_exceptions=True)

    def update_weights(self, path: str, weight_version: int, flush_cache: bool = True) -> None:
        """Load a checkpoint from a disk that all servers see, and check the version afterwards.

        A server that fails in it is left out. It gets the weights when it comes back.

        Args:
            path: A Hugging Face checkpoint; it stays until the next one is loaded.
            weight_version: The version that rows computed by these weights carry.
            flush_cache: Drop all cached prefixes, which the old weights computed. Needs idle
                servers. Without it their rows stay, and keep their old version.

        Raises:
            ServerError: All servers refused, or report another version afterwards, or fewer than
                `min_servers` took the weights.
        """
        weights = Weights(path=str(path), version=int(weight_version), flush_cache=flush_cache)
        run_to_end(self._publish(weights))

    def require_servers(self) -> None:
        """Leave out the servers that are not well; raise if fewer than `min_servers` are.

        Raises:
            ServerError: How many are left, and what is wrong with the others.
        """
        for url, health in self.health().items():
            if health != "ok":
                self.servers.leave_out(self.servers[url], health)
        if not self.servers.is_enough:
            raise self.servers.shortage()

    def wait_for_servers(self, timeout_s: float) -> None:
        """Wait until `min_servers` servers are well and have the current weights.

        Raises:
            ServerError: They are too few for too long; LostWeightsError if publishing the weights
                again would make them enough.
        """

        async def wait() -> None:
            async with self.transport() as http:
                await self.watch(http, recovery_timeout_s=timeout_s).run(until_enough=True)

        run_to_end(wait())

    def weight_versions(self) -> dict[str, str]:
        """Return the weight version that each server in use reports."""
        return run_to_end(self._weight_versions())

    def health(self) -> dict[str, str]:
        """Return "ok", or what is wrong, for each server; never raise."""
        return run_to_end(self._health())

    def pause(self, mode: str = "in_place") -> None:
        """Stop sampling. A server that does not answer is left out, and its requests go elsewhere.

        Args:
            mode: "in_place" keeps running requests where they are; "retract" takes their slots
                away (their rows so far stay true); "abort" ends them with what they have.
        """
        self.servers.pause_mode = mode
        self.servers.num_aborts += mode == "abort"
        run_to_end(self._pause(mode))

    def resume(self) -> None:
        """Continue sampling after `pause`, of this client or of one that did not live to do so.

        A paused server that does not answer is left out. It continues when it is well again.
        """
        run_to_end(self._resume())
        self.servers.pause_mode = ""

    @contextlib.contextmanager
    def paused(self, mode: str = "in_place") -> Iterator[None]:
        """Within: no server samples. They continue however the block ends.

        Args:
            mode: As for `pause`.
        """
        try:
            self.pause(mode)
            yield
        finally:
            self.resume()

    def abort(self) -> None:
        """End all requests; each answers with the tokens and routes that it has."""
        self.servers.num_aborts += 1
        run_to_end(self._at_all("/abort_request", {"abort_all": True}))

    def flush_cache(self) -> None:
        """Drop all cached prefixes."""
        run_to_end(self._at_all("/flush_cache", {}))

    @property
    def faults(self) -> dict[str, int]:
        """Failures of each server since it last answered well."""
        return {server.url: server.faults for server in self.servers}

    @property
    def counts(self) -> dict[str, int]:
        """Events since the client began.

        Their names: faults, retried, left_out, returned, loads, failed_loads, outdated, continued.
        """
        return dict(self.servers.counts)

    async def _publish(self, weights: Weights) -> None:
        self.servers.expect(weights)
        async with self.transport() as http:
            watch = self.watch(http)

            async def one(server: ServerState) -> ServerError | None:
                try:
                    # A dead or stopped server costs less here than in the update.
                    await watch.weight_version(server)
                    await watch.load(server, weights)
                except ServerError as error:
                    self.servers.leave_out(server, error)
                    return error
                return None

            errors = await _all(one(server) for server in self.servers.in_use)
            refusals = [e for e in errors if e and not isinstance(e, TransientError)]
            if refusals and not self.servers.in_use:
                raise refusals[0]
            await watch.run(until_enough=True)

    async def _pause(self, mode: str) -> None:
        async with self.transport() as http:
            watch = self.watch(http)

            async def one(server: ServerState) -> None:
                try:
                    await watch.pause(server, mode)
                except ServerError as error:
                    self.servers.leave_out(server, error)

            await _all(one(server) for server in self.servers.in_use)

    async def _resume(self) -> None:
        async with self.transport() as http:
            watch = self.watch(http)

            async def one(server: ServerState) -> None:
                try:
                    await watch.resume(server)
                except ServerError as error:
                    if server.is_paused:
                        self.servers.leave_out(server, error)

            paused = [s for s in self.servers if s.is_paused or not s.is_out]
            await _all(one(server) for server in paused)

    async def _learn_sizes(self, http: Transport) -> None:
        """Ask for data-parallel replicas and drafts; a server that does not tell has one each."""

        async def ask(server: ServerState) -> None:
            try:
                info = await http.call("GET", server.url, "/server_info", timeout_s=INFO_TIMEOUT_S)
            except ServerError:
                return
            server.num_replicas = _size_in(info, "dp_size")
            server.tokens_per_step = _size_in(info, "speculative_num_draft_tokens")

        await _all(ask(s) for s in self.servers.in_use if s.num_replicas is None)

    async def _health(self) -> dict[str, str]:
        async with self.transport() as http:
            watch = self.watch(http)

            async def one(server: ServerState) -> tuple[str, str]:
                try:
                    await watch.require_health(server)
                except ServerError as error:
                    return server.url, str(error)
                return server.url, "ok"

            return dict(await _all(one(server) for server in self.servers))

    async def _weight_versions(self) -> dict[str, str]:
        async with self.transport() as http:
            watch, servers = self.watch(http), self.servers.in_use
            versions = await _all(watch.weight_version(server) for server in servers)
            return {s.url: version for s, version in zip(servers, versions, strict=True)}

    async def _at_all(self, route: str, body: Mapping[str, Any]) -> None:
        timeout_s = self.options.control_timeout_s
        async with self.transport() as http:
            await _all(
                http.call("POST", server.url, route, body, timeout_s=timeout_s)
                for server in self.servers.in_use
            )

    def transport(self) -> Transport:
        """Return connections to the servers, an asynchronous context manager."""
        return Transport(self.options.connect_timeout_s)

    def watch(
        self,
        http: Transport,
        on_change: Callable[[ServerState], None] = lambda server: None,
        recovery_timeout_s: float | None = None,
    ) -> Watch:
        """Return what looks after the servers, over these connections; None: as in the options."""
        if recovery_timeout_s is None:
            recovery_timeout_s = self.options.recovery_timeout_s
        return Watch(
            self.servers,
            http,
            health_timeout_s=self.options.health_timeout_s,
            control_timeout_s=self.options.control_timeout_s,
            recovery_timeout_s=recovery_timeout_s,
            on_change=on_change,
        )


def _size_in(info: Mapping[str, Any], name: str) -> int:
    size = info.get(name)
    return size if isinstance(size, int) and size > 0 else 1


async def _all(calls: Iterable[Awaitable[T]]) -> list[T]:
    return list(await asyncio.gather(*calls))
