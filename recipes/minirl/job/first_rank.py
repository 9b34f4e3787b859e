"""Work that rank 0 does while the other ranks wait."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from routing_replay.errors import DataError

from .node_files import broadcast_files, first_ranks, node_number, send_files

# A collective would time out while a server samples. The wait ends early if rank 0 dies: the store
# ends with it. (The store's client counts milliseconds in 32 bits, hence no longer.)
LONGEST_WAIT = timedelta(days=20)
P = ParamSpec("P")
Work = Callable[P, Mapping[str, float] | None]


@dataclass(frozen=True, kw_only=True)
class Pending:
    """Work that rank 0 has begun; every rank has one.

    Args:
        key: What tells the other ranks in the store that it is done.
        store: Of the process group.
        future: Its result; None on the other ranks.
    """

    key: str
    store: Store
    future: Future[dict[str, float]] | None

    def complete(self, work: Work[P], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call the work on rank 0, and keep its result or its error."""
        if self.future is None:
            return
        try:
            self.future.set_result(dict(work(*args, **kwargs) or {}))
        except BaseException as error:
            self.future.set_exception(error)

    def wait(self) -> dict[str, float]:
        """Return what the work returned on rank 0, nothing elsewhere, once it is done.

        Raises:
            Exception: What the work raised, on rank 0. The others' wait ends when rank 0 ends.
        """
        if self.future is None:
            self.store.wait([self.key], LONGEST_WAIT)
            return {}
        metrics = self.future.result()
        self.store.set(self.key, "done")
        return metrics

    def await_end(self) -> None:
        """Return on every rank once the work has ended; `wait` then tells how."""
        key = f"{self.key}/ended"
        if self.future is None:
            self.store.wait([key], LONGEST_WAIT)
        else:
            futures.wait([self.future])
            self.store.set(key, "ended")


class FirstRank:
    """Runs work on rank 0 alone. The other ranks wait for it, however long it takes.

    The signal goes through the process group's store, and so do files between nodes. Polling a
    shared disk would be slow: a network file system remembers for up to a minute that a file did
    not exist.

    Args:
        folder: Scratch folder of the run. Each node has a part of its own in it, emptied at the
            start, so it may lie on a disk of the node or on one that all share.
    """

    def __init__(self, folder: Path):
        first_of_nodes = first_ranks()
        self.is_me = dist.get_rank() == 0
        self.folder = folder / f"node_{node_number()}"
        self._is_first_of_node = dist.get_rank() in first_of_nodes
        self._store = dist.distributed_c10d._get_default_store()
        # On ranks outside it the group is a number, which nothing there uses.
        has_group = len(first_of_nodes) > 1
        self._group: Any = dist.new_group(first_of_nodes, backend="gloo") if has_group else None
        if self._is_first_of_node:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        dist.barrier()

    def run(self, name: str, work: Work[P], *args: P.args, **kwargs: P.kwargs) -> dict[str, float]:
        """Call `work` on rank 0; return on every rank once it is done.

        Args:
            name: Unique within the run.
            work: What rank 0 does; its arguments follow.

        Returns:
            The metrics that `work` returned; nothing on the other ranks.
        """
        pending = self._pending(name)
        pending.complete(work, *args, **kwargs)
        return pending.wait()

    def begin(self, name: str, work: Work[P], *args: P.args, **kwargs: P.kwargs) -> Pending:
        """Call `work` in a thread of rank 0; return at once.

        The arguments are those of `run`. The work takes part in no collective: those belong to the
        main thread, which goes on meanwhile.
        """
        pending = self._pending(name)

        def complete() -> None:
            pending.complete(work, *args, **kwargs)

        if self.is_me:
            # A daemon: a process that is interrupted ends without waiting for the servers' answers.
            threading.Thread(target=complete, name=name, daemon=True).start()
        return pending

    def new_folder(self, name: str) -> Path:
        """Make a folder for files that rank 0 writes and all read, on each node."""
        path = self.folder / name
        if self._is_first_of_node:
            path.mkdir()
        return path

    def share(self, path: Path, names: Sequence[str]) -> None:
        """Copy files of rank 0's folder to the other nodes, as far as it has them; collective.

        Raises:
            DataError: A node could not write them (on every rank).
        """
        if self._group is not None:
            is_first = self._is_first_of_node
            error = broadcast_files(path, names, self._group) if is_first else None
            self._require_written(path, error)

    def share_parts(self, path: Path, names: Sequence[str]) -> None:
        """Copy the files that this rank needs to its node, each once per node; collective.

        Args:
            path: Rank 0's folder with all files, and this node's.
            names: What this rank reads.

        Raises:
            DataError: A node could not write them (on every rank).
        """
        if self._group is not None:
            self.bring(path, names, lambda wanted: send_files(path, wanted, self._group))

    def bring(
        self,
        path: Path,
        names: Sequence[str],
        copy: Callable[[Mapping[int, set[str]]], OSError | None],
    ) -> None:
        """Let each node bring the files that its ranks need; collective.

        Args:
            path: The nodes' folder for them.
            names: What this rank reads.
            copy: Called on the first rank of each node with what each node needs, by its first
                rank; returns the error of a file that it could not write.

        Raises:
            DataError: A node could not write them (on every rank).
        """
        wanted: list[tuple[int, Sequence[str]]] = [(0, ())] * dist.get_world_size()
        dist.all_gather_object(wanted, (node_number(), names))
        error = None
        if self._is_first_of_node:
            first_of: dict[int, int] = {}
            by_first: dict[int, set[str]] = {}
            for rank, (node, of_rank) in enumerate(wanted):
                by_first.setdefault(first_of.setdefault(node, rank), set()).update(of_rank)
            error = copy(by_first)
        self._require_written(path, error)

    def _require_written(self, path: Path, error: OSError | None) -> None:
        errors: list[tuple[int, OSError | None]] = [(0, None)] * dist.get_world_size()
        dist.all_gather_object(errors, (node_number(), error))
        for node, failure in errors:
            if failure is not None:
                raise DataError(
                    "a node could not write the files of a step",
                    got=failure,
                    where=f"node {node}, {path.parent.parent}",
                    fix="Free space there, or choose a larger disk with --scratch-dir",
                )

    def keep(self, path: Path, target: Path) -> None:
        """Move rank 0's folder to `target`, replacing it, once all ranks have finished with it."""
        dist.barrier()
        if self.is_me:
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(path, target)
        elif self._is_first_of_node:
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Remove the scratch folder once all ranks have finished with it."""
        dist.barrier()
        if self._is_first_of_node:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another node's part is still there
                self.folder.parent.rmdir()

    def _pending(self, name: str) -> Pending:
        future: Future[dict[str, float]] | None = Future() if self.is_me else None
        return Pending(key=f"first_rank/{name}", store=self._store, future=future)
