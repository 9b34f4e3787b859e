"""Work of one rank that the others wait for."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

POLL_S = 0.02


class FirstRank:
    """Work of one rank that the others wait for asleep, however long it takes.

    A collective would time out while a server samples, so they look for a file instead.

    Args:
        folder: On a disk that all ranks see; emptied at the start.
    """

    def __init__(self, folder: Path):
        self.is_me = dist.get_rank() == 0
        self.folder = folder
        if self.is_me:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()

    def does(self, name: str, work: Callable, *args) -> dict[str, float]:
        """The first rank calls `work(*args)`; nobody goes on before it is done.

        Returns:
            The metrics that it returned; nothing on the other ranks.
        """
        marker, metrics = self.folder / name, {}
        if self.is_me:
            metrics = work(*args) or {}
            marker.touch()
        while not marker.exists():
            time.sleep(POLL_S)
        return metrics

    def new_folder(self, name: str) -> Path:
        """A folder for files of the first rank that the others open."""
        path = self.folder / name
        if self.is_me:
            path.mkdir()
        return path

    def keep(self, path: Path, target: Path) -> None:
        """Such a folder takes the place of `target` once all ranks have finished with it."""
        dist.barrier()
        if self.is_me:
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)

    def remove(self, path: Path) -> None:
        """Remove such a folder once all ranks have finished with it."""
        dist.barrier()
        if self.is_me:
            shutil.rmtree(path, ignore_errors=True)
