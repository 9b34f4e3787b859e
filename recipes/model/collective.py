"""Work that every rank does, and that fails on every rank if it fails on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from routing_replay.errors import CheckpointError

Result = TypeVar("Result")


def on_every_rank(work: Callable[[], Result]) -> Result:
    """Run `work` and raise the first rank's CheckpointError on every rank; collective.

    Without it the other ranks would wait in their next collective for a rank that has failed.

    Args:
        work: Does not communicate, and raises CheckpointError only.

    Returns:
        What `work` returned on this rank.
    """
    result, error = None, None
    try:
        result = work()
    except CheckpointError as raised:
        error = raised
    errors: list[CheckpointError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    for raised in errors:
        if raised is not None:
            raise raised
    return result
