"""recipes.minirl.launch.machine: servers that can share memory with the trainer."""

import shutil
import subprocess
import sys

import pytest
from rollout_servers import FakeServer

from recipes.minirl.launch.machine import is_beside_us, require_one_machine
from recipes.serving.ports import HeldPort
from routing_replay.errors import ConfigError

LISTEN = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


def test_a_server_of_this_machine_is_beside_us_until_it_ends():
    with FakeServer() as fake:
        require_one_machine([fake.url])
    with pytest.raises(ConfigError, match=f"on the trainer.s machine.*got {fake.url}.*buckets"):
        require_one_machine([fake.url])


def test_a_port_without_a_listener_is_not_beside_us():
    with HeldPort() as number:
        assert not is_beside_us(f"http://127.0.0.1:{number}")


def test_a_server_that_sees_other_files_is_not_beside_us():
    """As in a container whose port is published on this machine."""
    command = [*("unshare", "--mount"), sys.executable, "-c", LISTEN]
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        port = process.stdout.readline().strip()
        if not port:
            pytest.skip(f"no namespace can be made here: {process.communicate()[1].strip()}")
        assert not is_beside_us(f"http://127.0.0.1:{port}")
        process.communicate("")
