"""recipes.serving.ports: a held port is nobody else's, and a server can listen on it."""

import errno
import socket

import pytest

from recipes.serving.ports import HOST, HeldPort
from routing_replay.errors import ServerError


def listening(port, *, reuses):
    """A socket that listens on the port, as a server's does or as any other program's."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuses))
    listener.bind((HOST, port))
    listener.listen()
    return listener


def test_a_held_port_is_listened_on_by_a_server_and_reached():
    with (
        HeldPort() as port,
        listening(port, reuses=True) as listener,
        socket.create_connection((HOST, port), timeout=5) as client,
    ):
        assert listener.accept()[1] == client.getsockname()


def test_a_held_port_is_given_to_nobody_else():
    with HeldPort() as port, pytest.raises(OSError) as caught:
        listening(port, reuses=False)
    assert caught.value.errno == errno.EADDRINUSE
    listening(port, reuses=False).close()  # released


def test_two_held_ports_differ():
    held = [HeldPort() for _ in range(64)]
    assert len({port.number for port in held}) == len(held)
    for port in held:
        port.release()


def test_a_port_on_which_somebody_listens_is_refused():
    taken = "port [0-9]+ is taken.*Choose another port"
    with HeldPort() as port, listening(port, reuses=True), pytest.raises(ServerError, match=taken):
        HeldPort(port)
