"""New weights for the rollout servers: as they are, in block FP8, or rounded to FP8's grid.

They go as files on a disk that all see, or in buckets over process groups.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ParamSpec

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from recipes.model import fp8
from recipes.model.buckets import Buckets, Tensors
from recipes.model.fp8 import E4M3_MAX
from routing_replay.rollout import RolloutClient
from routing_replay.rollout.servers import LostWeightsError
from routing_replay.rollout.streaming import WeightStream

from ..job.first_rank import FirstRank, Work
from ..launch.addresses import require_reachable
from ..policy import models
from ..policy.policy import Policy
from ..settings.sections import RolloutSettings
from .weight_stream import WeightSender

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

    Raises:
        ConfigError: A server that not all of the trainer's machines reach.
    """

    def __init__(
        self,
        policy: Policy,
        checkpoint: Path,
        folder: Path,
        first_rank: FirstRank,
        client: RolloutClient | None,
        urls: Sequence[str],
    ):
        self._policy = policy
        self._checkpoint = checkpoint
        self._folder = folder
        self._first_rank = first_rank
        self._client = client
        self._version = 0
        self._num_published = 0
        self._sender: WeightSender | None = None
        rollout = policy.config.rollout
        if rollout.publish == "buckets":
            require_reachable(urls, policy.config.run.nnodes)
            stream = None if client is None else WeightStream(client)
            self._sender = WeightSender(stream, urls, rollout.publish_timeout_s)

    def publish(self, version: int) -> dict[str, float]:
        """Give the current weights to all servers; return metrics on rank 0.

        Buckets that do not arrive are followed by files: no server keeps parts of new weights.
        """
        self._version = version
        self._num_published += 1
        if self._sender is None:
            self._publish_files()
            return {}
        rollout = self._policy.config.rollout
        size, dtype = rollout.publish_bucket_mb * MEGABYTE, getattr(torch, rollout.rollout_dtype)
        # Made anew, for a plan may have moved experts.
        buckets = Buckets(list(self._policy.chunks), size, dtype)
        error = self._sender.send(buckets, version, lambda tensors: served(tensors, rollout))
        if error:
            if self._client is not None:
                print(f"Weights: version {version} goes by files instead: {error}", flush=True)
            self._publish_files()
        elif self._client is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        return {"rollout/weights_by_files": float(bool(error))} if self._client is not None else {}

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
            attempt = self.guarded(work)
            metrics = self._first_rank.run(f"{name}_{number}", attempt, *args, **kwargs)
            if not self.has_lost_weights(metrics):
                return metrics
            self.publish(self._version)
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

    def _publish_files(self) -> None:
        # Under a name of its own: a server's network file system may still show it an earlier
        # folder of the same name, and the old weights would pass for the new ones.
        folder = self._folder / f"version_{self._version:06d}"
        write_weights(self._policy, folder, self._checkpoint)

        def update() -> None:
            assert self._client is not None
            self._client.update_weights(str(folder), self._version)
            remove_others(folder)

        self._first_rank.run(f"published_{self._num_published}", update)


def served(tensors: Tensors, rollout: RolloutSettings) -> Tensors:
    """Return what the servers load, of tensors in the rollout's dtype."""
    match rollout.rollout_weights:
        case "fp8":
            return [pair for name, tensor in tensors for pair in fp8.quantized(name, tensor)]
        case "fp8-grid":
            return [(name, _on_grid(name, tensor)) for name, tensor in tensors]
    return tensors


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
        is_fp8=rollout.rollout_weights == "fp8",
    )
    if rollout.rollout_weights == "fp8-grid" and torch.distributed.get_rank() == 0:
        for path in sorted(folder.glob("*.safetensors")):
            _round_file(path)
    return folder


def round_to_fp8_grid(weight: torch.Tensor) -> torch.Tensor:
    """Return the nearest weight that is a float8 e4m3 number times its row's scale, in its dtype.

    An emulation: real FP8 inference also quantises activations and multiplies on other hardware.
    """
    values = weight.float()
    scale = values.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scale = scale / E4M3_MAX
    grid = (values / scale).to(torch.float8_e4m3fn).float()
    return (grid * scale).to(weight.dtype)


def _round_file(path: Path) -> None:
    """Round the projections of one file; router, norms, embedding and head keep their values."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    partial = path.with_suffix(".tmp")
    save_file({name: _on_grid(name, tensor) for name, tensor in tensors.items()}, partial, metadata)
    partial.replace(path)


def _on_grid(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return round_to_fp8_grid(tensor) if name.endswith("_proj.weight") else tensor


def remove_others(folder: Path) -> None:
    """Remove everything beside a folder."""
    for path in folder.parent.iterdir():
        if path != folder:
            shutil.rmtree(path, ignore_errors=True)
