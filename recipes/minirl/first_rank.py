"""Work that rank 0 does while the other ranks wait."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import ParamSpec

import torch.distributed as dist

# A collective would time out while a server samples. The wait ends early if rank 0 dies: the store
# ends with it. (The store's client counts milliseconds in 32 bits, hence no longer.)
LONGEST_WAIT = timedelta(days=20)
P = ParamSpec("P")


class FirstRank:
    """Runs work on rank 0 alone. The other ranks wait for it, however long it takes.

    The signal goes through the process group's store. Polling a file would be slow on a network
    file system, which remembers for up to a minute that a file did not exist. Data do go through
    files: no rank opens one before the signal says that it is complete.

    Args:
        folder: Scratch folder on a disk that all ranks share; emptied at the start.
    """

    def __init__(self, folder: Path):
        self.is_me = dist.get_rank() == 0
        self.folder = folder
        self._store = dist.distributed_c10d._get_default_store()
        if self.is_me:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()

    def run(
        self,
        name: str,
        work: Callable[P, Mapping[str, float] | None],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> dict[str, float]:
        """Call `work` on rank 0; return on every rank once it is done.

        Args:
            name: Unique within the run.
            work: What rank 0 does; its arguments follow.

        Returns:
            The metrics that `work` returned; nothing on the other ranks.
        """
        key = f"first_rank/{name}"
        if not self.is_me:
            self._store.wait([key], LONGEST_WAIT)
            return {}
        metrics = dict(work(*args, **kwargs) or {})
        self._store.set(key, "done")
        return metrics

    def new_folder(self, name: str) -> Path:
        """Make a folder for files that rank 0 writes and the others read."""
        path = self.folder / name
        if self.is_me:
            path.mkdir()
        return path

    def keep(self, path: Path, target: Path) -> None:
        """Move such a folder to `target`, replacing it, once all ranks have finished with it."""
        dist.barrier()
        if self.is_me:
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)

    def remove(self, path: Path) -> None:
        """Remove such a folder once all ranks have finished with it."""
        dist.barrier()
        if self.is_me:
            shutil.rmtree(path, ignore_errors=True)
