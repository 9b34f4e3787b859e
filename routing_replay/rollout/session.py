"""Connections to the servers that stay open while requests come and go."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from .dispatch import Dispatch
from .requests import Completion, GenerateRequest

T = TypeVar("T")


class Session:
    """Open connections to a client's servers, which are watched meanwhile; one event loop's.

    `RolloutClient.session` makes it.

    Args:
        dispatch: Sends the requests.
        watch: Ends with an error when there are too few servers.
    """

    def __init__(self, dispatch: Dispatch, watch: asyncio.Future[None]):
        self._dispatch = dispatch
        self._watch = watch

    async def complete(self, request: GenerateRequest) -> Completion:
        """Sample a completion, as `RolloutClient.generate` does; await it inside of `run`."""
        return await self._dispatch.complete(request)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await work that samples.

        Raises:
            ServerError: Too few servers are left. The work is cancelled.
            Exception: What the work raises.
        """
        task = asyncio.ensure_future(work)
        try:
            ends: list[asyncio.Future[Any]] = [task, self._watch]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._watch.result()
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class SharedSession:
    """A session for the work of several threads, in a thread of its own.

    It opens with the first work and closes when none is left: servers that nobody uses are not
    asked for their health.

    Args:
        open_session: `RolloutClient.session`.
    """

    def __init__(self, open_session: Callable[[], contextlib.AbstractAsyncContextManager[Session]]):
        self._open_session = open_session
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._stack = contextlib.AsyncExitStack()
        self._opening: asyncio.Future[Session] | None = None
        self._num_users = 0

    def submit(self, work: Callable[[Session], Coroutine[Any, Any, T]]) -> Future[T]:
        """Begin work; several threads may do so.

        Args:
            work: Called with the session, in the session's thread.

        Returns:
            Its end, with errors as of `Session.run`. To cancel it cancels the work.
        """
        return asyncio.run_coroutine_threadsafe(self._run(work), self._started())

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                # A daemon: a process that is interrupted does not wait for the servers' answers.
                threading.Thread(
                    target=self._loop.run_forever, name="rollout session", daemon=True
                ).start()
            return self._loop

    async def _run(self, work: Callable[[Session], Coroutine[Any, Any, T]]) -> T:
        self._num_users += 1
        try:
            if self._opening is None:
                self._stack = contextlib.AsyncExitStack()
                opened = self._stack.enter_async_context(self._open_session())
                self._opening = asyncio.ensure_future(opened)
            # One user that is cancelled does not take the session from the others.
            session = await asyncio.shield(self._opening)
            return await session.run(work(session))
        finally:
            self._num_users -= 1
            if not self._num_users:
                await self._close()

    async def _close(self) -> None:
        opening, stack, self._opening = self._opening, self._stack, None
        if opening is not None:
            opening.cancel()  # as far as it is still opening
            await asyncio.gather(opening, return_exceptions=True)
        await stack.aclose()


async def all_or_none(calls: Iterable[Awaitable[T]]) -> list[T]:
    """Return the results of all calls in their order; the first error ends the others."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, in a thread of its own where this one has an event loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
