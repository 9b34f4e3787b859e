"""Health checks while a client works: servers leave, and come back with the current weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ..errors import ServerError
from .servers import LostWeightsError, Servers, ServerState, Weights
from .transport import Transport

# How soon a shortage of servers is noticed.
TICK_S = 0.2


class Watch:
    """Looks after all servers for as long as it runs.

    Args:
        servers: Their state.
        http: How to reach them.
        health_timeout_s: For the answer to a health check.
        control_timeout_s: For loading weights.
        recovery_timeout_s: How long there may be too few servers.
        on_change: Called when a server was left out or taken back.
    """

    def __init__(
        self,
        servers: Servers,
        http: Transport,
        *,
        health_timeout_s: float,
        control_timeout_s: float,
        recovery_timeout_s: float,
        on_change: Callable[[ServerState], None] = lambda server: None,
    ):
        self._servers = servers
        self._http = http
        self._health_timeout_s = health_timeout_s
        self._control_timeout_s = control_timeout_s
        self._recovery_timeout_s = recovery_timeout_s
        self._on_change = on_change

    async def run(self, *, until_enough: bool = False) -> None:
        """Check each server when it is due; return when there are enough of them, if told so.

        Raises:
            LostWeightsError: There are too few, and enough if the weights were published again.
            ServerError: There have been too few for too long.
        """
        looks = [self._look_after(server, until_enough) for server in self._servers]
        checks = [asyncio.ensure_future(look) for look in looks]
        was_out = {server.url: server.is_out for server in self._servers}
        enough_at = time.monotonic()
        try:
            while not (until_enough and self._servers.is_enough):
                # Another batch, or an update beside this one, leaves servers out as well.
                for server in self._servers:
                    if server.is_out != was_out[server.url]:
                        was_out[server.url] = server.is_out
                        self._on_change(server)
                if self._servers.is_enough:
                    enough_at = time.monotonic()
                elif self._servers.is_enough_with_stale:
                    raise self._servers.shortage(LostWeightsError)
                elif time.monotonic() - enough_at > self._recovery_timeout_s:
                    raise self._servers.shortage()
                await asyncio.sleep(TICK_S)
        finally:
            for check in checks:
                check.cancel()
            await asyncio.gather(*checks, return_exceptions=True)

    async def check(self, server: ServerState) -> None:
        """Ask a server whether it is well; one that was left out gets the current weights first."""
        was_out, start = server.is_out, time.monotonic()
        try:
            if server.is_paused:
                await self.resume(server)
            await self.require_health(server)
            if was_out and self._servers.weights is not None:
                await self._bring_up_to_date(server, self._servers.weights)
        except LostWeightsError:
            is_well = False
            self._servers.outdated(server)
        except ServerError as error:
            # Under load a check may come late where answers do not.
            is_well = not was_out and server.answered_at >= start
            if not is_well:
                self._servers.missed(server, error)
        else:
            is_well = True
        # A server that was left out meanwhile has not been given the weights.
        if is_well and server.is_out == was_out:
            self._servers.passed(server)

    async def require_health(self, server: ServerState) -> None:
        """Raise ServerError unless a server samples a token."""
        timeout_s = self._health_timeout_s
        await self._http.call("GET", server.url, "/health", timeout_s=timeout_s)

    async def pause(self, server: ServerState, mode: str) -> None:
        """Make a server stop sampling; see `RolloutClient.pause`."""
        server.is_paused = True  # even if it does not answer
        body, timeout_s = {"mode": mode}, self._control_timeout_s
        await self._http.call("POST", server.url, "/pause_generation", body, timeout_s=timeout_s)

    async def resume(self, server: ServerState) -> None:
        """Make a server go on sampling."""
        timeout_s = self._health_timeout_s
        await self._http.call("POST", server.url, "/continue_generation", {}, timeout_s=timeout_s)
        server.is_paused = False

    async def weight_version(self, server: ServerState) -> str:
        """Return the weight version that a server reports."""
        timeout_s = self._health_timeout_s
        answer = await self._http.call("GET", server.url, "/model_info", timeout_s=timeout_s)
        return str(answer.get("weight_version"))

    async def load(self, server: ServerState, weights: Weights) -> None:
        """Make a server load weights, and ask it for the version that it then has.

        Raises:
            LostWeightsError: The weights are on no disk.
            ServerError: It refuses, or reports another version.
        """
        if weights.path is None:
            raise LostWeightsError(
                "the server cannot load weights that are on no disk",
                expected=f"weight version {weights.version}",
                where=server.url,
            )
        body = {
            "model_path": weights.path,
            "weight_version": str(weights.version),
            "flush_cache": weights.flush_cache,
        }
        route, timeout_s = "/update_weights_from_disk", self._control_timeout_s
        await self._http.call("POST", server.url, route, body, timeout_s=timeout_s)
        got = await self.weight_version(server)
        if got != str(weights.version):
            raise ServerError(
                "the server does not run the new weights",
                expected=f"weight version {weights.version}",
                got=got,
                where=server.url,
                fix="Look for the failed update in the server's log",
            )

    async def _look_after(self, server: ServerState, until_enough: bool) -> None:
        while True:
            # Whoever has paused the servers may need one that is left out.
            may_check = not self._servers.pause_mode or (until_enough and server.is_out)
            if server.check_at <= time.monotonic() and may_check:
                await self.check(server)
            await asyncio.sleep(TICK_S)  # not until `check_at`, which may come nearer meanwhile

    async def _bring_up_to_date(self, server: ServerState, weights: Weights) -> None:
        if await self.weight_version(server) != str(weights.version):
            if weights.path is not None:
                self._servers.loading(server, weights)
            await self.load(server, weights)
