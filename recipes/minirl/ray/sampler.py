"""Beside a server: its groups are sampled, rewarded and written where they were decoded."""

from __future__ import annotations

import contextlib
import shutil
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from routing_replay.errors import TableError, reading
from routing_replay.rollout.servers import Weights
from routing_replay.routes.shape import MoEShape

from ..data.prompts import Prompt
from ..rollout.groups import Group, GroupWriter, StepFiles
from ..rollout.sampling import Rollout, client_options
from ..settings.config import RecipeConfig


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """What the samplers of a run have in common.

    Args:
        config: The run's.
        checkpoint: Folder whose tokenizer is used.
        model: Layers, experts and top-k of the routes.
        folder: Scratch folder of the run; each sampler has a part of its own in it.
    """

    config: RecipeConfig
    checkpoint: Path
    model: MoEShape
    folder: Path


class Sampler:
    """Samples groups from one server. Several threads may call its methods.

    Args:
        options: As for all samplers.
        url: The server.
        number: Its own, which the names of its parts begin with.

    Raises:
        ServerError: The server answers wrongly; see `Rollout`.
    """

    def __init__(self, options: SamplerOptions, url: str, number: int):
        self._config = options.config
        # Groups of a server that is left out go elsewhere at once.
        client = replace(client_options(options.config), min_servers=1, recovery_timeout_s=0.0)
        self._rollout = Rollout(
            options.config, [url], options.checkpoint, options.model, options=client
        )
        self._folder = options.folder / f"server_{number}"
        self._prefix = prefix_of(number)
        self._running: defaultdict[str, set[Future[Group]]] = defaultdict(set)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def out_since(self) -> float | None:
        """Unix time since which the server is left out and does not come back by itself."""
        (server,) = self._rollout.client.servers
        return None if server.is_loading or server.is_stale else server.out_since

    def sample(
        self,
        call: str,
        number: int,
        prompt: Prompt,
        num_samples: int,
        files: StepFiles | None,
        weights: Weights | None,
    ) -> Group:
        """Sample a group to its end.

        Args:
            call: What `cancel` knows it by.
            number, prompt, num_samples, files: As of `Rollout.begin`; the parts go to a folder of
                this node.
            weights: Those that were published last.

        Raises:
            Exception: As `Rollout.sample`.
        """
        self._expect(weights)
        if files is not None and files.writer is not None:
            files = replace(files, writer=self._own(files.writer))
        future = self._rollout.begin(number, prompt, num_samples, files)
        self._running[call].add(future)
        try:
            return future.result()
        finally:
            self._running[call].discard(future)

    def cancel(self, call: str) -> None:
        """End the groups of a call."""
        for future in list(self._running.pop(call, ())):
            future.cancel()

    def recover(self, weights: Weights | None) -> None:
        """Wait until the server is well and has the weights.

        Raises:
            ServerError: It is not within `--server-recovery-s`; LostWeightsError if its weights are
                on no disk.
        """
        self._expect(weights)
        self._rollout.client.wait_for_servers(self._config.rollout.server_recovery_s)

    def part(self, step: str, name: str) -> np.ndarray:
        """Return the bytes of a part's file, uint8.

        Args:
            step: Name of the step's folder.
            name: Of the file.

        Raises:
            TableError: There is none.
        """
        path = self._folder / step / name
        with reading(path, "a part of a step's routes", TableError):
            return np.fromfile(path, np.uint8)

    def state(self) -> dict[str, float]:
        """Return metrics as `Rollout.state` does."""
        return self._rollout.state()

    def close(self) -> None:
        """Remove the parts."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another's are still there
            self._folder.parent.rmdir()

    def pause(self, mode: str) -> None:
        """Know that no server samples, and that weights change."""
        servers = self._rollout.client.servers
        servers.pause_mode, servers.weights = mode, None

    def resume(self, weights: Weights | None) -> None:
        """Know that servers sample again, with the weights that were published last."""
        self._expect(weights)
        self._rollout.client.servers.pause_mode = ""

    def _expect(self, weights: Weights | None) -> None:
        """Know the weights; what was sent before an update may come after it."""
        servers = self._rollout.client.servers
        if weights is None or weights == servers.weights:
            return
        if servers.published is None or weights.version >= servers.published.version:
            servers.expect(weights)

    def _own(self, writer: GroupWriter) -> GroupWriter:
        """Return a writer to this node; parts of steps that are over are removed."""
        folder = self._folder / writer.folder.name
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # The step in training, those that run ahead, and one whose parts may still be fetched.
            num_kept = self._config.rollout.ahead + 2
            for old in sorted(self._folder.iterdir())[:-num_kept]:
                shutil.rmtree(old, ignore_errors=True)
        return replace(writer, folder=folder, prefix=self._prefix)


def prefix_of(number: int) -> str:
    """Return what the names of a sampler's parts begin with."""
    return f"server_{number}_"


def number_in(name: str) -> int:
    """Return the number of the sampler that wrote a part."""
    return int(name.split("_")[1])
