"""A launched server that is kept running: started again when it dies or stays left out.

The client alone decides who gets requests. It writes what it decided to a file; the launcher, which
owns the processes, reads it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from routing_replay.errors import ServerError
from routing_replay.files import atomic_write
from routing_replay.rollout.servers import ServerState

from .server import Server, ServerOptions, answers, launch

STATE_FILE = "servers.json"


class KeptServer:
    """A running server, and the means to start it again on its port; a context manager.

    Args:
        model_path, options: As for `launch`.
        num_restarts: How often it is started again.
        restart_after_s: How long it may be left out before it is ended and started again.

    Raises:
        ServerError: As for `launch`.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        options: ServerOptions,
        *,
        num_restarts: int,
        restart_after_s: float,
    ):
        self.server = launch(model_path, options)
        self.num_started = 1
        self._model_path = Path(model_path)
        # The log is named by now even if the caller left it to the server.
        self._options = replace(options, log_path=self.server.log_path)
        self._num_restarts = num_restarts
        self._restart_after_s = restart_after_s
        # Since when this process answers; None while it loads.
        self._answers_since: float | None = time.time()
        self._started_at = time.time()

    def __enter__(self) -> KeptServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()

    @property
    def url(self) -> str:
        return self.server.url

    def check(self) -> None:
        """Raise ServerError if the server has died."""
        self.server.check()

    def keep(self, out_since: float | None) -> bool:
        """Start the server again if it is dead or was left out for long; do not wait for it.

        Args:
            out_since: Unix time since which its client has left it out; None if it has not.

        Returns:
            Whether it was started again.

        Raises:
            ServerError: It was started too often already.
        """
        if self.server.is_alive and not self._is_lost(out_since):
            return False
        if self.num_started > self._num_restarts:
            self.server.check()
            raise ServerError(
                "the SGLang server does not work again",
                got=f"{self.num_started} starts",
                where=f"{self.url}, log {self.server.log_path}",
                fix=f"Its last lines:\n{self.server.last_lines()}",
            )
        self.server.stop()
        self.server = Server(self._model_path, self._options, self.server.port)
        self.num_started += 1
        self._answers_since, self._started_at = None, time.time()
        return True

    def _is_lost(self, out_since: float | None) -> bool:
        if out_since is None:
            return False
        if self._answers_since is None and answers(self.url):
            self._answers_since = time.time()
        if self._answers_since is None:
            patience_s = max(self._restart_after_s, self._options.ready_timeout_s)
            return time.time() - self._started_at > patience_s
        # What was decided before its last start is about the process before it.
        return time.time() - max(out_since, self._answers_since) > self._restart_after_s


def write_states(path: Path, servers: Iterable[ServerState]) -> None:
    """Write which servers are left out, since when and why.

    One that loads weights on its way back, or waits for the next ones, is not: another start would
    not help it.
    """
    states = {
        s.url: {
            "out_since": None if s.is_loading or s.is_stale else s.out_since,
            "reason": s.reason,
        }
        for s in servers
    }
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(states, indent=2) + "\n")


def read_absences(path: Path) -> dict[str, float]:
    """Return since when the servers that are left out are so; nothing without a file."""
    try:
        states = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {url: state["out_since"] for url, state in states.items() if state["out_since"]}
