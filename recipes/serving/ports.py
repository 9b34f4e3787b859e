"""TCP ports that stay ours until a child process listens on them, many seconds later."""

from __future__ import annotations

import socket

from routing_replay.errors import ServerError

HOST = "127.0.0.1"
# SGLang before 0.5.19 derives a second port from the first by adding 10,000, used or not.
HIGHEST_PORT = 65535 - 10000


class HeldPort:
    """A port of an address that nobody else is given; a context manager.

    A bound socket keeps the system from giving the port to whoever asks for a free one, or to an
    outgoing connection. It never listens, and it may be reused: a process that sets SO_REUSEADDR,
    as servers do, can listen beside it.

    Args:
        number: The port; a free one, if None.
        host: The address, one of this machine's.

    Raises:
        ServerError: The port is taken.
    """

    def __init__(self, number: int | None = None, host: str = HOST):
        self._socket = _bound(host, number) if number is not None else _bound_anywhere(host)
        self.number: int = self._socket.getsockname()[1]

    def __enter__(self) -> int:
        return self.number

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others have the port. Idempotent."""
        self._socket.close()


def _bound(host: str, number: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, number))
    except OSError as error:
        bound.close()
        raise ServerError(
            f"port {number} is taken",
            got=error.strerror,
            where=f"{host}:{number}",
            fix="Choose another port, or none to get a free one",
        ) from error
    return bound


def _bound_anywhere(host: str) -> socket.socket:
    while (bound := _bound(host, 0)).getsockname()[1] > HIGHEST_PORT:
        bound.close()
    return bound
