"""What the driver watches: a server and a trainer whose processes are actors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from routing_replay.errors import RoutingReplayError

from ..launch.processes import TrainingError
from .placed import LostActorError, Placed


class RayServer:
    """A server that an actor keeps running on its node; the methods are those of `KeptServer`.

    All of them raise LostActorError if the actor died.
    """

    def __init__(self, placed: Placed, url: str):
        self._placed = placed
        self.url = url

    def keep(self, out_since: float | None) -> bool:
        """Start the server again if it is dead or was left out for long."""
        return bool(self._placed.call("keep", out_since))

    def check(self) -> None:
        """Raise ServerError if the server has died."""
        self._placed.call("check")


class RayTrainer:
    """The ranks of a trainer.

    Args:
        ranks: Their actors, by rank.
        refs: Of each the end of its training.
    """

    def __init__(self, ranks: Sequence[Placed], refs: Sequence[Any]):
        self._running = dict(zip(refs, ranks, strict=True))
        self._errors: list[RoutingReplayError] = []

    @property
    def status(self) -> int | None:
        """None while all ranks run, 1 once one has failed, 0 after success of all."""
        refs = list(self._running)
        for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else ():
            try:
                self._running.pop(ref).result(ref)
            except RoutingReplayError as error:
                self._errors.append(error)
        if self._errors:
            return 1
        return None if self._running else 0

    def error(self) -> RoutingReplayError:
        """Return the cause: a lost rank before what the others say of their broken connections."""
        assert self.status
        return min(self._errors, key=_order)


def _order(error: RoutingReplayError) -> int:
    if isinstance(error, LostActorError):
        return 0
    return 2 if isinstance(error, TrainingError) else 1
