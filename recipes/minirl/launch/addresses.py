"""Addresses of machines in the network of the servers."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from routing_replay.errors import ConfigError, ServerError

ANY_PORT = 9


def address_towards(urls: Sequence[str]) -> str:
    """Return this machine's address in the network of the servers.

    Raises:
        ServerError: They have no address, or no route leads there.
    """
    hosts = [urlsplit(url).hostname or "" for url in urls]
    # A server on this machine is reached by the address that the others see, too.
    host = next((host for host in hosts if not is_loopback(host)), hosts[0])
    try:
        family, *_, target = socket.getaddrinfo(host, ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: it chooses the route
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ServerError("no route leads to the server", got=error, where=host) from error


def require_reachable(urls: Sequence[str], num_nodes: int) -> None:
    """Refuse servers that only one of several trainer machines could send weights to.

    Raises:
        ConfigError: Which they are.
    """
    local = [url for url in urls if is_loopback(urlsplit(url).hostname or "")]
    if num_nodes > 1 and local:
        raise ConfigError(
            "a trainer of several machines cannot send weights to a server without an address",
            expected="--rollout-url with an address that all machines reach",
            got=", ".join(local),
            fix="Start the servers with --host and an address of their machine, or choose "
            "--publish disk",
        )


def is_loopback(host: str) -> bool:
    """Return whether a host's name or address is this machine's own only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
