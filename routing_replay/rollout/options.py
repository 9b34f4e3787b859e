"""Timeouts, retries and limits of a client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """Timeouts, retries and limits of a client.

    Args:
        request_timeout_s: For one generation, from its dispatch to its answer. A request that is
            aborted again and again, and cannot be continued, is given up after as long.
        control_timeout_s: For one control call: abort, pause, weight update.
        connect_timeout_s: For the connection alone: a dead machine should not cost a generation,
            nor thousands of connections at once on a loaded machine a failure.
        num_retries: Further tries of a request that met a dead, full or hanging server, or whose
            answer was damaged.
        retry_wait_s: Before the first retry; doubled for each further one.
        max_in_flight: Requests at a time at each data-parallel replica of a server (`--dp-size`,
            which the server reports). The server queues what it cannot run.
        max_faults: Failures in a row after which a server is left out. One that answers, though
            wrongly, stays as long as the others are no more than `min_servers`.
        health_every_s: Between two health checks of a server while a batch runs. After two missed
            ones it is left out, and its requests go elsewhere.
        health_timeout_s: For a health check.
        min_servers: Fewest servers in use.
        recovery_timeout_s: How long there may be fewer, before a batch or a weight update fails.
        max_uncovered: Largest fraction of the rows of a batch that may come back uncovered against
            the caller's intention; above it `generate` raises with the causes. 1: any.
    """

    request_timeout_s: float = 1800.0
    control_timeout_s: float = 600.0
    connect_timeout_s: float = 30.0
    num_retries: int = 3
    retry_wait_s: float = 0.5
    max_in_flight: int = 512
    max_faults: int = 3
    health_every_s: float = 30.0
    health_timeout_s: float = 20.0
    min_servers: int = 1
    recovery_timeout_s: float = 60.0
    max_uncovered: float = 1.0
