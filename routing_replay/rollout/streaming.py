"""New weights for running servers, bucket by bucket: the servers' side of it, by HTTP.

The bytes come over a process group, in which the trainer is rank 0 and broadcasts, or from memory
that trainer and servers share.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ServerError
from .client import RolloutClient
from .servers import INCOMPLETE, ServerState, Weights
from .session import run_to_end
from .transport import Transport

# To leave a group and to end an update take no time, unless the server hangs.
ABANDON_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Member:
    """A server that takes part.

    Args:
        url: Its base URL.
        num_ranks: Its tensor-parallel ranks, each of which joins the group.
    """

    url: str
    num_ranks: int


@dataclass(frozen=True, kw_only=True)
class BucketHeader:
    """What a broadcast contains, in its order.

    Args:
        names: Hugging Face's.
        dtypes: Of torch, without its name.
        shapes: Of the whole tensors.
    """

    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[Sequence[int]]

    def to_json(self) -> dict[str, Any]:
        """Return what SGLang is told."""
        names, dtypes, shapes = list(self.names), list(self.dtypes), list(map(list, self.shapes))
        return {"names": names, "dtypes": dtypes, "shapes": shapes}


class WeightStream:
    """Updates the servers of a client, bucket by bucket: open, join, send, close.

    On one machine without a group: open, share, close.

    From `open` to `close` a server reports a version that is no number, and so do the rows that it
    computes: a server whose update broke off is never taken for one with known weights. `close`
    gives the version. After a failure `abandon`, then update from disk or open anew: both replace
    all weights.

    Servers should be idle. While requests run, stay within `RolloutClient.paused`: "retract" gives
    their slots back, so later tokens see new weights alone; under "in_place" they attend to keys
    and values of the old weights, and the cache must not be flushed.

    Args:
        client: Decides which servers take part.
    """

    def __init__(self, client: RolloutClient):
        self._client = client
        self._members: list[Member] = []
        # Of the servers that are in the groups, since when they joined.
        self._version: str | None = None
        self.has_changed = True

    def open(self, version: int) -> list[Member]:
        """Begin an update of all servers that are well, also of those that were left out.

        `has_changed` then tells whether they must join the groups anew.

        Returns:
            The servers that take part.

        Raises:
            ServerError: There are too few, or one cannot take weights this way.
        """
        return run_to_end(self._open(version))

    def join(self, group: str, address: str, port: int, backend: str) -> None:
        """Let the servers join a group whose rank 0 listens there; return once all have.

        Raises:
            ServerError: A server could not.
        """

        async def one(http: Transport, member: Member) -> None:
            earlier = self._members[: self._members.index(member)]
            body = {
                "master_address": address,
                "master_port": port,
                "rank_offset": 1 + sum(other.num_ranks for other in earlier),
                "world_size": self.world_size,
                "group_name": group,
                "backend": backend,
            }
            await self._post(http, member, "/init_weights_update_group", body)

        run_to_end(self._at_each(one))

    def send(self, group: str, header: BucketHeader) -> None:
        """Let the servers receive the group's next broadcast; return once they have its weights.

        Raises:
            ServerError: A server could not. What the others have is unknown.
        """
        body = header.to_json() | {
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        route = "/update_weights_from_distributed"
        run_to_end(self._at_each(lambda http, member: self._post(http, member, route, body)))

    def share(self, payloads: Sequence[Sequence[str]]) -> None:
        """Let the servers read a bucket in memory that they share; return once they have.

        A server whose rank cannot open that memory ends: it must be a process of this machine.

        Args:
            payloads: By server, as `open` returns them, and by its rank: what SGLang unpickles, in
                base64.

        Raises:
            ServerError: A server could not. What the others have is unknown.
        """

        async def one(http: Transport, member: Member) -> None:
            body = {
                "serialized_named_tensors": payloads[self._members.index(member)],
                "load_format": "flattened_bucket",
                "flush_cache": False,
            }
            await self._post(http, member, "/update_weights_from_tensor", body)

        run_to_end(self._at_each(one))

    def close(self, version: int, *, flush_cache: bool = True) -> None:
        """End the update: the servers serve the weights under their version.

        Args:
            version: Of the weights.
            flush_cache: Drop all cached prefixes, which the old weights computed.

        Raises:
            ServerError: A server could not.
        """

        async def one(http: Transport, member: Member) -> None:
            await self._post(http, member, "/end_weight_update", {})
            if flush_cache:
                await self._post(http, member, "/flush_cache", {})
            await self._name(http, member, str(version))

        run_to_end(self._at_each(one))
        self._version = str(version)
        weights = Weights(path=None, version=version, flush_cache=flush_cache)
        self._client.servers.expect(weights)

    def leave(self, groups: Sequence[str]) -> None:
        """Let the servers leave groups, as far as they are in them and answer; never raise.

        A broadcast of the trainer that waits for such a server ends with an error.
        """
        route = "/destroy_weights_update_group"
        calls = [(route, {"group_name": group}) for group in groups]
        run_to_end(self._at_each(lambda http, member: self._try(http, member, calls)))

    def abandon(self, groups: Sequence[str]) -> None:
        """End an update that failed, as far as the servers still answer; never raise."""
        self._version = None
        self.leave(groups)
        calls: list[tuple[str, dict[str, Any]]] = [("/end_weight_update", {})]
        run_to_end(self._at_each(lambda http, member: self._try(http, member, calls)))

    @property
    def world_size(self) -> int:
        """Ranks of a group: the trainer's one, and the servers'."""
        return 1 + sum(member.num_ranks for member in self._members)

    async def _open(self, version: int) -> list[Member]:
        servers = self._client.servers
        # Until the end nothing is expected of a server that comes back but that it is well.
        servers.weights = None
        async with self._client.transport() as http:
            watch = self._client.watch(http)
            # A health check samples a token, which takes a second: those in use do without.
            await asyncio.gather(*[watch.check(server) for server in servers if server.is_out])
            await watch.run(until_enough=True)
            members = await asyncio.gather(*[self._begin(http, s, version) for s in servers.in_use])
        earlier, self._members = self._members, [m for m, _ in members if m is not None]
        # One that reports another version was restarted: it is in no group.
        versions = {version for _, version in members}
        self.has_changed = earlier != self._members or versions != {self._version}
        if not servers.is_enough:
            raise servers.shortage()
        return self._members

    async def _begin(
        self, http: Transport, server: ServerState, version: int
    ) -> tuple[Member | None, str]:
        """Return the server as a member and its earlier version; no member if it is left out."""
        timeout_s = self._client.options.health_timeout_s
        mode, watch = self._client.servers.pause_mode, self._client.watch(http)
        try:
            earlier = await watch.weight_version(server)
            if mode and not server.is_paused:  # it came back just now
                await watch.pause(server, mode)
            info = await http.call("GET", server.url, "/server_info", timeout_s=timeout_s)
            member = member_of(server.url, info)
            await self._name(http, member, f"{INCOMPLETE}-{version}")
            # An update that broke off is still open.
            await self._try(http, member, [("/end_weight_update", {})])
            await self._post(http, member, "/begin_weight_update", {})
        except UnsupportedServerError:
            raise
        except ServerError as error:
            self._client.servers.leave_out(server, error)
            return None, ""
        return member, earlier

    async def _name(self, http: Transport, member: Member, version: str) -> None:
        """Name the weights, for answers and rows, and check it."""
        body = {"new_version": version, "abort_all_requests": False}
        await self._post(http, member, "/update_weight_version", body)
        got = await self._client.watch(http).weight_version(self._client.servers[member.url])
        if got != version:
            raise ServerError(
                "the server does not report the weight version that it was given",
                expected=version,
                got=got,
                where=member.url,
            )

    async def _at_each(
        self, call: Callable[[Transport, Member], Coroutine[Any, Any, None]]
    ) -> None:
        """Call each server; raise the first error at once, for the others may wait for that one."""
        async with self._client.transport() as http:
            calls = [asyncio.ensure_future(call(http, member)) for member in self._members]
            try:
                await asyncio.gather(*calls)
            finally:
                for one in calls:
                    one.cancel()
                await asyncio.gather(*calls, return_exceptions=True)

    async def _post(
        self, http: Transport, member: Member, route: str, body: Mapping[str, Any]
    ) -> None:
        timeout_s = self._client.options.control_timeout_s
        await http.call("POST", member.url, route, body, timeout_s=timeout_s)

    async def _try(
        self, http: Transport, member: Member, calls: Sequence[tuple[str, Mapping[str, Any]]]
    ) -> None:
        for route, body in calls:
            with contextlib.suppress(ServerError):
                await http.call("POST", member.url, route, body, timeout_s=ABANDON_TIMEOUT_S)


class UnsupportedServerError(ServerError):
    """A server whose layout SGLang cannot update this way."""


def member_of(url: str, info: Mapping[str, Any]) -> Member:
    """Return a server as a member.

    Args:
        url: Its base URL.
        info: Its answer to /server_info.

    Raises:
        UnsupportedServerError: It has data-parallel replicas or pipeline stages.
    """
    for name in ("dp_size", "pp_size"):
        if info.get(name, 1) != 1:
            raise UnsupportedServerError(
                "SGLang takes weights in buckets on tensor-parallel ranks only",
                expected=f"{name} 1",
                got=info[name],
                where=url,
                fix="Start more servers instead, or update from disk",
            )
    return Member(url=url, num_ranks=int(info.get("tp_size", 1)))
