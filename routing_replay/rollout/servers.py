"""The servers of a client: who gets requests, who is left out, since when and why."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import ServerError
from .transport import UnreachableError

# So many health checks in a row may be missed; the last of them leaves the server out.
MAX_MISSES = 2
# A server that missed a check or is left out is asked again soon. One that is left out repeatedly
# waits twice as long each time, up to the other number.
SOON_S, LONGEST_WAIT_S = 5.0, 600.0
# What the version of weights that are being replaced begins with. It is no number, so that answers
# and rows under it never pass for those of known weights.
INCOMPLETE = "incomplete"
# What an error tells of the past.
NUM_EVENTS = 12


class LostWeightsError(ServerError):
    """Servers lost the weights, which are on no disk: publish them again."""


@dataclass(kw_only=True)
class ServerState:
    """One server, as its client sees it.

    Args:
        url: Its base URL.
        num_replicas: Data-parallel replicas (`--dp-size`); None until it has told.
        tokens_per_step: Most tokens that a step adds to an answer; more than 1 if it speculates.
        load: Prompt tokens of its requests in flight.
        faults: Failures since it last answered well.
        misses: Health checks missed since it last answered one.
        absences: How often it was left out since the last new weights.
        out_since: Unix time since which it gets no requests; None while it gets some.
        reason: Why it gets none.
        is_loading: It is healthy again, and gets the current weights.
        is_stale: It is healthy again, and nothing but a further update can give it the weights.
        is_paused: It was told to stop sampling, and not yet to go on.
        check_at: When its health is asked next, by `time.monotonic`.
        answered_at: When it last answered a request well, by the same clock.
    """

    url: str
    num_replicas: int | None = None
    tokens_per_step: int = 1
    load: int = 0
    faults: int = 0
    misses: int = 0
    absences: int = 0
    out_since: float | None = None
    reason: str = ""
    is_loading: bool = False
    is_stale: bool = False
    is_paused: bool = False
    check_at: float = 0.0
    answered_at: float = 0.0

    @property
    def is_out(self) -> bool:
        return self.out_since is not None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the servers were told to load last.

    Args:
        path: A Hugging Face checkpoint; None for weights that are on no disk, so that a server
            which comes back cannot load them.
        version: Of its rows.
        flush_cache: Whether cached prefixes go with the old weights.
    """

    path: str | None
    version: int
    flush_cache: bool = True


def is_current(version: str, sent: Weights | None, now: Weights | None) -> bool:
    """Return whether a version that an answer names is of whole weights that are in use.

    A server that was started again names the version that it started with, and one that someone
    else updates a version that was never published here.

    Args:
        version: What the server reports. It is trusted until weights are published.
        sent: What had been published when the request was sent; None if nothing had.
        now: What has been published since, the same unless requests run on through an update; None
            while an update is under way.
    """
    if version.startswith(INCOMPLETE):
        return False
    if sent is None:
        return True
    is_old = not version.isdigit() or int(version) < sent.version
    return not is_old and (now is None or int(version) <= now.version)


class Servers:
    """All servers of a client. Nothing else decides who gets requests.

    Args:
        urls: Base URLs, one server each.
        max_faults: Failures in a row after which a server is left out.
        min_servers: Fewest servers in use.
        health_every_s: Between two health checks of a server in use.

    Raises:
        ServerError: Fewer URLs than the minimum.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        max_faults: int,
        min_servers: int,
        health_every_s: float,
    ):
        first_check_at = time.monotonic() + health_every_s
        states = {
            url: ServerState(url=url, check_at=first_check_at)
            for url in (url.rstrip("/") for url in urls)
        }
        if len(states) < max(1, min_servers):
            raise ServerError(
                "a client needs more servers than it has",
                expected=f"{max(1, min_servers)} URLs or more",
                got=", ".join(states) or "none",
            )
        self._states = states
        self._max_faults = max_faults
        self.min_servers = max(1, min_servers)
        self._health_every_s = health_every_s
        self._events: deque[str] = deque(maxlen=NUM_EVENTS)
        # What a server that comes back must load; None while an update in buckets is under way.
        self.weights: Weights | None = None
        self.published: Weights | None = None  # the last whole ones
        self.pause_mode = ""  # a paused server answers no health check
        self.num_aborts = 0  # that this client asked for
        self.counts: Counter[str] = Counter()
        self.on_event: Callable[[str], None] = lambda event: None

    def __iter__(self) -> Iterator[ServerState]:
        return iter(self._states.values())

    def __getitem__(self, url: str) -> ServerState:
        return self._states[url]

    @property
    def in_use(self) -> list[ServerState]:
        return [server for server in self if not server.is_out]

    @property
    def is_enough(self) -> bool:
        return len(self.in_use) >= self.min_servers

    @property
    def is_enough_with_stale(self) -> bool:
        """Whether an update of the weights would make enough servers of too few."""
        num_stale = sum(server.is_stale for server in self)
        return not self.is_enough and len(self.in_use) + num_stale >= self.min_servers

    @property
    def is_updating(self) -> bool:
        """Whether an update in buckets is under way that is not the first."""
        return self.weights is None and self.published is not None

    def answered(self, server: ServerState) -> None:
        """Note an answer that was right."""
        server.faults = 0
        server.answered_at = time.monotonic()

    def failed(self, server: ServerState, error: ServerError) -> None:
        """Note a failed request; leave the server out after too many in a row.

        A server that answers wrongly is better than too few servers: it stays.
        """
        self.counts["faults"] += 1
        server.faults += 1
        is_needed = len(self.in_use) <= self.min_servers and not isinstance(error, UnreachableError)
        if server.faults >= self._max_faults and not is_needed:
            self.leave_out(server, f"{server.faults} failures in a row, the last: {error}")

    def passed(self, server: ServerState) -> None:
        """Note a health check that was answered; a server that was left out is in use again."""
        server.misses = 0
        server.check_at = time.monotonic() + self._health_every_s
        if server.is_out:
            server.out_since, server.reason, server.faults = None, "", 0
            server.is_loading = server.is_stale = False
            self._note(f"{server.url} is in use again", "returned")

    def loading(self, server: ServerState, weights: Weights) -> None:
        """Note that a server that was left out is healthy, and gets the weights."""
        server.is_loading = True
        self._note(f"{server.url} is healthy again and loads version {weights.version}", "loads")

    def outdated(self, server: ServerState) -> None:
        """Note that a server that was left out is healthy, and waits for the next weights."""
        server.check_at = time.monotonic() + self._health_every_s
        if not server.is_stale:
            server.is_stale = True
            self._note(f"{server.url} is healthy again and waits for new weights", "outdated")

    def missed(self, server: ServerState, error: object) -> None:
        """Note a health check that failed."""
        server.misses += 1
        server.is_stale = False
        if server.is_loading:
            server.is_loading = False
            self._note(f"{server.url} could not load the weights: {error}", "failed_loads")
        server.check_at = time.monotonic() + min(SOON_S, self._health_every_s)
        if server.misses >= MAX_MISSES:
            self.leave_out(server, f"{server.misses} health checks in a row failed: {error}")

    def leave_out(self, server: ServerState, reason: object) -> None:
        """Give a server no more requests until it is healthy and has the current weights."""
        if server.is_out:
            return
        server.out_since, server.reason = time.time(), str(reason)
        wait_s = min(SOON_S, self._health_every_s) * 2**server.absences
        server.check_at = time.monotonic() + min(wait_s, LONGEST_WAIT_S)
        server.absences += 1
        self._note(f"{server.url} is left out: {reason}", "left_out")

    def expect(self, weights: Weights) -> None:
        """Note what the servers must load from now on; what is past counts less then."""
        self.weights = self.published = weights
        for server in self:
            server.absences, server.is_stale = 0, False

    def shortage(self, kind: type[ServerError] = ServerError) -> ServerError:
        """Return the error of too few servers."""
        reasons = "; ".join(f"{s.url}: {s.reason}" for s in self if s.is_out)
        return kind(
            "too few servers are left",
            expected=f"{self.min_servers} or more",
            got=f"{len(self.in_use)}; {reasons}",
            fix="See the servers' logs. What happened, the latest last:\n"
            + "\n".join(self._events),
        )

    def _note(self, event: str, count: str) -> None:
        self.counts[count] += 1
        self._events.append(f"{time.strftime('%H:%M:%S')} {event}"[:500])
        self.on_event(event)
