"""Work that every rank does, and that fails on every rank if it fails on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from routing_replay.errors import RoutingReplayError

Result = TypeVar("Result")


def on_every_rank(work: Callable[[], Result]) -> Result:
    """Run `work` and raise the first rank's error on every rank; collective.

    Without it the other ranks would wait in their next collective for a rank that has failed.

    Args:
        work: Does not communicate, and raises RoutingReplayError only.

    Returns:
        What `work` returned on this rank.
    """
    results: list[Result] = []
    own_error = None
    try:
        results.append(work())
    except RoutingReplayError as error:
        own_error = error
    errors: list[RoutingReplayError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, own_error)
    for rank_error in errors:
        if rank_error is not None:
            raise rank_error
    return results[0]
