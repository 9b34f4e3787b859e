"""Child processes of the launcher: started with a log, ended by handle, never left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .server import GUARD, last_lines

# torchrun gives its workers 30 s before it kills them; a worker of ours ends at once.
STOP_S = 15.0


class Child:
    """A command under the guard: it ends with everything it started when we stop it or die.

    Args:
        command: What to run.
        log_path: Where its standard error goes; its standard output is ours.
        environment: Further environment variables.
    """

    def __init__(
        self, command: Sequence[str], log_path: Path, environment: Mapping[str, str] | None = None
    ):
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(log_path, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", str(GUARD), *command],
                stdin=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs."""
        return self.process.poll()

    def last_lines(self) -> str:
        return last_lines(self.log_path)

    def stop(self) -> None:
        """End it. Idempotent."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
