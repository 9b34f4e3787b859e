"""New weights for the rollout servers: as they are, in block FP8, or rounded to FP8's grid.

They go as files on a disk that all see, or in buckets: over process groups, or in shared memory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec

import torch
import torch.distributed as dist

from recipes.model import fp8
from recipes.model.buckets import Buckets, Tensors
from routing_replay.rollout import RolloutClient
from routing_replay.rollout.servers import LostWeightsError
from routing_replay.rollout.streaming import WeightStream

from ..job.first_rank import FirstRank, Work
from ..launch.addresses import require_reachable
from ..launch.machine import require_one_machine
from ..policy import models
from ..policy.policy import Policy
from ..settings.config import RecipeConfig
from ..settings.sections import RolloutSettings
from .broadcasts import Broadcasts
from .shared_tensors import SharedTensors
from .weight_sender import WeightSender

P = ParamSpec("P")
MEGABYTE = 1 << 20
# What guarded work returns instead of metrics.
LOST = "lost_weights"


class Publisher:
    """Gives the servers the trainer's weights. Its methods are collective.

    Args:
        policy: The trained policy.
        checkpoint: Folder that config and tokenizer are copied from.
        folder: For weights that go as files; all servers see it.
        first_rank: Runs what rank 0 does.
        client: Of the servers, on rank 0; None elsewhere.
        urls: The servers.
        paused: Within what it returns for a mode no server samples; called on rank 0.

    Raises:
        ConfigError: A server that not all of the trainer's machines reach, or for shared tensors
            one that is no process of this machine.
    """

    def __init__(
        self,
        policy: Policy,
        checkpoint: Path,
        folder: Path,
        first_rank: FirstRank,
        client: RolloutClient | None,
        urls: Sequence[str],
        paused: Callable[[str], contextlib.AbstractContextManager[None]],
    ):
        self._paused_in = paused
        self._policy = policy
        self._checkpoint = checkpoint
        self._folder = folder
        self._first_rank = first_rank
        self._client = client
        self._version = 0
        self.num_published = 0  # updates so far
        self._sender = _sender(policy.config, client, urls)

    def publish(self, version: int) -> dict[str, float]:
        """Give the current weights to all servers; return metrics on rank 0.

        Buckets that do not arrive are followed by files: no server keeps parts of new weights.
        Responses that run are paused meanwhile.
        """
        self._version = version
        self.num_published += 1
        if self._sender is None:
            folder = self._write_files()
            with self._paused():
                self._load_files(folder)
            return {}
        with self._paused():
            error = self._send(self._sender)
            if error:
                self._load_files(self._write_files())
        if self._client is None:
            return {}
        if not error:
            shutil.rmtree(self._folder, ignore_errors=True)
        return {"rollout/weights_by_files": float(bool(error))}

    def publish_again(self, num_published: int) -> None:
        """Give the servers the last weights again, unless they got weights since an update.

        Args:
            num_published: Which update it was.
        """
        if self.num_published == num_published:
            self.publish(self._version)

    def sample(
        self,
        name: str,
        work: Work[P],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> dict[str, float]:
        """Run work that samples, as `FirstRank.run` does; begin anew if servers lose the weights.

        Weights that went in buckets are on no disk: a server that was restarted gets them here.
        """
        for number in itertools.count():
            num_published = self.num_published
            attempt = self.guarded(work)
            metrics = self._first_rank.run(f"{name}_{number}", attempt, *args, **kwargs)
            if not self.has_lost_weights(metrics):
                return metrics
            self.publish_again(num_published)
        raise AssertionError

    def guarded(self, work: Work[P]) -> Work[P]:
        """Return work whose result tells if servers lost weights that are on no disk."""

        @functools.wraps(work)
        def attempt(*args: P.args, **kwargs: P.kwargs) -> Mapping[str, float] | None:
            try:
                return work(*args, **kwargs)
            except LostWeightsError as error:
                print(f"Weights: published again: {error}", flush=True)
                return {LOST: 1.0}

        return attempt

    def has_lost_weights(self, metrics: Mapping[str, float]) -> bool:
        """Return on every rank what guarded work told on rank 0; collective."""
        is_lost = [LOST in metrics]
        if self._sender is not None:
            dist.broadcast_object_list(is_lost)
        return is_lost[0]

    def close(self) -> None:
        """Leave the servers' groups."""
        if self._sender is not None:
            self._sender.leave()

    @property
    def _mode(self) -> str:
        """How responses are paused. None run before the first update; a cache is another run's."""
        pause = self._policy.config.rollout.publish_pause
        return "" if pause == "wait" or self.num_published == 1 else pause

    @property
    def _flush_cache(self) -> bool:
        # Requests that go on where they were hold a part of it.
        return self._mode != "in_place"

    def _paused(self) -> contextlib.AbstractContextManager[None]:
        """Within: no server samples, if responses run through an update."""
        if self._client is None or not self._mode:
            return contextlib.nullcontext()
        return self._paused_in(self._mode)

    def _send(self, sender: WeightSender) -> str:
        """Send the weights in buckets; return "", or why they did not arrive."""
        rollout = self._policy.config.rollout
        size, dtype = rollout.publish_bucket_mb * MEGABYTE, getattr(torch, rollout.rollout_dtype)
        # Made anew, for a plan may have moved experts.
        buckets = Buckets(list(self._policy.chunks), size, dtype)
        error = sender.send(
            buckets,
            self._version,
            lambda tensors: served(tensors, rollout),
            flush_cache=self._flush_cache,
        )
        if error and self._client is not None:
            print(f"Weights: version {self._version} goes by files instead: {error}", flush=True)
        return error

    def _write_files(self) -> Path:
        # Under a name of its own: a server's network file system may still show it an earlier
        # folder of the same name, and the old weights would pass for the new ones.
        folder = self._folder / f"version_{self._version:06d}"
        return write_weights(self._policy, folder, self._checkpoint)

    def _load_files(self, folder: Path) -> None:
        def update() -> None:
            assert self._client is not None
            self._client.update_weights(str(folder), self._version, self._flush_cache)
            remove_others(folder)

        self._first_rank.run(f"published_{self.num_published}", update)


def _sender(
    config: RecipeConfig, client: RolloutClient | None, urls: Sequence[str]
) -> WeightSender | None:
    """Return what sends weights without a disk; None: they go as files."""
    stream = None if client is None else WeightStream(client)
    match config.rollout.publish:
        case "disk":
            return None
        case "buckets":
            require_reachable(urls, config.run.nnodes)
            return Broadcasts(stream, urls, config.rollout.publish_timeout_s)
        case "tensors":
            require_one_machine(urls)
            return SharedTensors(stream)


def served(tensors: Tensors, rollout: RolloutSettings) -> Tensors:
    """Return what the servers load, of tensors in the rollout's dtype."""
    form = rollout.rollout_weights
    return [pair for name, tensor in tensors for pair in fp8.in_form(name, tensor, form)]


def write_weights(policy: Policy, folder: Path, checkpoint: Path) -> Path:
    """Write the weights to serve; collective.

    Args:
        policy: The trained policy.
        folder: Folder of the weights; replaced as a whole.
        checkpoint: Folder that config and tokenizer are copied from.

    Returns:
        The folder.
    """
    rollout = policy.config.rollout
    models.save(
        policy.chunks,
        folder,
        checkpoint,
        policy.config.training,
        dtype=getattr(torch, rollout.rollout_dtype),
        form=rollout.rollout_weights,
    )
    return folder


def remove_others(folder: Path) -> None:
    """Remove everything beside a folder."""
    for path in folder.parent.iterdir():
        if path != folder:
            shutil.rmtree(path, ignore_errors=True)
