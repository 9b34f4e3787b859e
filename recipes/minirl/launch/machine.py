"""Whether a server is a process of this machine, with which memory can be shared."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from routing_replay.errors import ConfigError

PROCESSES = Path("/proc")
LISTENING = "0A"  # in the kernel's table of TCP sockets
ADDRESS, STATE, INODE = 1, 3, 9  # columns of that table


def require_one_machine(urls: Sequence[str]) -> None:
    """Refuse servers that could not open the trainer's memory: it would end them.

    Raises:
        ConfigError: Which they are.
    """
    foreign = [url for url in urls if not is_beside_us(url)]
    if foreign:
        raise ConfigError(
            "weights as shared tensors need servers on the trainer's machine",
            expected="servers whose processes this one sees, in the same container",
            got=", ".join(foreign),
            fix="Start them here as the same user, or choose --publish buckets",
        )


def is_beside_us(url: str) -> bool:
    """Return whether the process that listens at a URL's port is here, and sees our files."""
    own = os.readlink(PROCESSES / "self" / "ns" / "mnt")
    sockets = {f"socket:[{inode}]" for inode in _inodes(urlsplit(url).port or 80)}
    for process in PROCESSES.glob("[0-9]*"):
        # Other users' processes, and those that end meanwhile.
        with contextlib.suppress(OSError):
            if any(os.readlink(handle) in sockets for handle in _handles(process)):
                return os.readlink(process / "ns" / "mnt") == own
    return False


def _inodes(port: int) -> Iterator[str]:
    """Yield the sockets that listen at a port."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in (PROCESSES / "net" / table).read_text().splitlines()[1:]:
                columns = line.split()
                is_port = int(columns[ADDRESS].rpartition(":")[2], 16) == port
                if is_port and columns[STATE] == LISTENING:
                    yield columns[INODE]


def _handles(process: Path) -> Iterator[Path]:
    return (process / "fd").iterdir()
