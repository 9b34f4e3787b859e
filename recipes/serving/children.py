"""Child processes: started with a log, ended by handle, never left behind."""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

GUARD = Path(__file__).with_name("guard.py")
# The guard waits 3 s for its command; more than this means that the guard itself hangs.
STOP_S = 10.0
LAST_LINES, LAST_BYTES = 20, 16384
C = TypeVar("C", bound="Child")


class Child:
    """A command under the guard: it ends, with everything it started, when we stop it or die.

    Args:
        command: What to run.
        log_path: Where its standard error goes.
        environment: Variables on top of the inherited ones.
        inherited: The inherited variables; ours, if None.
        logs_output: Whether its standard output goes to the log too; otherwise it is ours.
    """

    def __init__(
        self,
        command: Sequence[str],
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        *,
        inherited: Mapping[str, str] | None = None,
        logs_output: bool = False,
    ):
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(log_path, "ab") as log:  # a resumed run keeps the log of the one that crashed
            self.process = subprocess.Popen(
                # A guard that inherited -O or PYTHONPATH could not start where its command could.
                [sys.executable, "-I", str(GUARD), *command],
                stdin=subprocess.PIPE,
                stdout=log if logs_output else None,
                stderr=log,
                env={**(os.environ if inherited is None else inherited), **(environment or {})},
                # Ray kills the process group of an actor: the guard must outlive it.
                start_new_session=True,
            )
        atexit.register(self.stop)

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs."""
        return self.process.poll()

    def last_lines(self, count: int = LAST_LINES) -> str:
        """Return the end of the log, without reading the whole of it."""
        with contextlib.suppress(OSError), open(self.log_path, "rb") as log:
            log.seek(max(0, os.path.getsize(self.log_path) - LAST_BYTES))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-count:])
        return ""

    def stop(self) -> None:
        """End the command and everything it started. Idempotent."""
        atexit.unregister(self.stop)
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
