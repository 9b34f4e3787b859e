"""Run a command and end it, with everything it started, when its owner goes away.

Run by path, with the standard library only: `python -I guard.py COMMAND...`. Its standard input is
a pipe whose other end its owner holds; the pipe closes when the owner dies, however it dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

# Servers drain on SIGTERM; without an owner nothing waits for the rollouts.
GRACE_S = 3.0


def main(command: Sequence[str]) -> int:
    """Run the command in a session of its own until it ends or standard input closes."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: end(child))
    threading.Thread(target=end_when_abandoned, args=(child,), daemon=True).start()
    status = child.wait()
    signal_group(child, signal.SIGKILL)  # workers that outlived the server
    return status if status >= 0 else 128 - status


def end_when_abandoned(child: subprocess.Popen[bytes]) -> None:
    """End the command when the owner's end of the pipe closes."""
    while os.read(0, 4096):
        pass
    end(child)


def end(child: subprocess.Popen[bytes]) -> None:
    """Terminate the whole session; kill what remains after GRACE_S."""
    signal_group(child, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    signal_group(child, signal.SIGKILL)


def signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
