"""The actors of a run: one beside each rollout server, one per rank of the trainer.

Nothing that loads torch is imported before an actor has its environment: torch reads it once.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import ray

from routing_replay.errors import CheckpointError, ConfigError, RoutingReplayError, reading

if TYPE_CHECKING:
    import numpy as np

    from routing_replay.rollout.servers import Weights

    from ..rollout.exchange import Exchange
    from ..rollout.groups import Group
    from ..settings.config import RecipeConfig
    from .placed import Placed
    from .sampler import Sampler, SamplerOptions

STANDARD_ERROR = 2
# A thread each. A group is several requests, and a server queues what it cannot run.
GROUPS_AT_ONCE = 128
VERSIONS = """\
import importlib.metadata as m
print(*(m.version(name) for name in ("sglang", "routing_replay")))"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an actor runs.

    Args:
        node: Ray's id of the node.
        address: IP address of the node.
        gpus: CUDA devices that Ray gave the actor.
        num_cores: Of the node.
    """

    node: str
    address: str
    gpus: tuple[str, ...]
    num_cores: int


class Actor:
    """What both kinds of actors can do.

    `concurrency_groups` are threads beside the main one, by the methods that run in them.
    """

    name: ClassVar[str]
    concurrency_groups: ClassVar[Mapping[str, int]] = {}

    def enter(self, folder: Path) -> Place:
        """Go to the folder that the run's relative paths start from; return where this is.

        Raises:
            ConfigError: The node does not see the folder.
        """
        context = ray.get_runtime_context()
        address = ray.util.get_node_ip_address()
        try:
            os.chdir(folder)
        except OSError as error:
            raise ConfigError(
                "a node does not see the folder that the run was started from",
                got=error.strerror,
                where=f"{folder}, node {address}",
                fix="Start it from a folder that all nodes see, under the same path",
            ) from error
        return Place(
            node=context.get_node_id(),
            address=address,
            gpus=tuple(str(gpu) for gpu in ray.get_gpu_ids()),
            num_cores=os.cpu_count() or 1,
        )

    def require_shared(self, run_dir: Path, digest: str) -> None:
        """Raise ConfigError unless the folder of the run is the driver's."""
        path = run_dir / "config.json"
        fix = "Name a folder that all nodes see with --run-dir"
        with reading(path, "the configuration of the run", ConfigError, fix=fix):
            own = digest_of(path)
        if own != digest:
            raise ConfigError(
                "a node has another configuration in the folder of the run",
                where=f"{path}, node {ray.util.get_node_ip_address()}",
                fix=fix,
            )


class ServerActor(Actor):
    """Launches an SGLang server on its node, keeps it running, and samples from it."""

    name = "server"
    concurrency_groups: ClassVar[Mapping[str, int]] = {
        "sampling": GROUPS_AT_ONCE,
        "parts": 8,
        "recovery": 1,
    }

    def __init__(self) -> None:
        self._server: Any = None
        self._sampler: Sampler | None = None

    def identity(self, config: RecipeConfig) -> dict[str, str]:
        """Return what all servers of a run have in common, as this node would start them.

        Raises:
            CheckpointError: The node does not see the checkpoint.
            ConfigError: The interpreter does not exist, or has no SGLang or no routing_replay.
        """
        from ..data.inputs import server_folder

        python = config.rollout.rollout_python or sys.executable
        try:
            command = [python, "-c", VERSIONS]
            asked = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ConfigError(
                "the servers' interpreter has no SGLang with our plugin",
                got=str(getattr(error, "stderr", error)).strip().rpartition("\n")[2],
                where=f"{python}, node {ray.util.get_node_ip_address()}",
            ) from error
        sglang, plugin = asked.stdout.split()
        model = checkpoint_digest(server_folder(config))
        return {"SGLang": sglang, "routing_replay": plugin, "the checkpoint": model}

    def start(self, config: RecipeConfig, log_path: Path) -> str:
        """Start the server on a free port of the node's address; return its URL.

        Raises:
            ServerError: It does not start.
        """
        from ..launch.processes import keep_server, server_options

        options = server_options(config, log_path)
        options = replace(options, host=ray.util.get_node_ip_address())
        self._server = keep_server(config, options)
        return self._server.url

    def keep(self, out_since: float | None) -> bool:
        own = self._sampler.out_since if self._sampler is not None else None
        return self._server.keep(own or out_since)

    def check(self) -> None:
        self._server.check()

    def stop(self) -> None:
        if self._server is not None:
            self._server.server.stop()
        if self._sampler is not None:
            self._sampler.close()

    def open_sampler(self, options: SamplerOptions, number: int) -> None:
        """Begin to sample from the server; the methods below are those of `Sampler`."""
        from .sampler import Sampler

        self._sampler = Sampler(options, self._server.url, number)

    @ray.method(concurrency_group="sampling")
    def sample(self, *arguments: Any) -> Group:
        return self._opened.sample(*arguments)

    def cancel(self, call: str) -> None:
        self._opened.cancel(call)

    @ray.method(concurrency_group="recovery")
    def recover(self, weights: Weights | None) -> None:
        self._opened.recover(weights)

    @ray.method(concurrency_group="parts")
    def part(self, step: str, name: str) -> np.ndarray:
        return self._opened.part(step, name)

    def pause(self, mode: str) -> None:
        self._opened.pause(mode)

    def resume(self, weights: Weights | None) -> None:
        self._opened.resume(weights)

    def state(self) -> dict[str, float]:
        return self._opened.state()

    @property
    def _opened(self) -> Sampler:
        assert self._sampler is not None
        return self._sampler


class RankActor(Actor):
    """Runs one rank of the trainer."""

    name = "trainer process"

    def prepare(self, environment: Mapping[str, str], log_path: Path) -> None:
        """Set the rank's environment, as torchrun would; send standard error to a log."""
        os.environ.update(environment)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(log_path, "ab") as log:
            os.dup2(log.fileno(), STANDARD_ERROR)

    def hold_port(self) -> int:
        """Return a free port of this node, where the ranks meet if this is rank 0."""
        from recipes.serving.ports import HeldPort

        self._held = HeldPort(host=ray.util.get_node_ip_address())
        return self._held.number

    def train(
        self,
        config: RecipeConfig,
        run_dir: Path,
        urls: list[str],
        port: int,
        samplers: Sequence[Placed],
    ) -> None:
        """Run the training loop to its end.

        Args:
            config: The run's.
            run_dir: Its folder.
            urls: Its servers.
            port: Where the ranks meet.
            samplers: Actors of the servers; none for servers that were launched elsewhere, from
                which rank 0 samples.

        Raises:
            RoutingReplayError: Why it failed; of another exception, its type and text.
        """
        from recipes.model import parallel

        from ..launch.processes import TrainingError
        from ..rollout.exchange import LocalExchange
        from ..train import scratch_folder, train
        from .exchange import RayExchange

        exchange_of: Callable[..., Exchange] = LocalExchange
        if samplers:
            folder = scratch_folder(config, run_dir)
            exchange_of = partial(RayExchange, samplers, urls, folder)
        os.environ["MASTER_PORT"] = str(port)
        try:
            train(config, run_dir, urls, exchange_of)
            parallel.destroy()
        except RoutingReplayError:
            raise
        except Exception as error:
            traceback.print_exc()
            raise TrainingError(f"{type(error).__name__} in the trainer: {error}") from error


def digest_of(path: Path) -> str:
    """Return a digest of a file's content."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def checkpoint_digest(folder: Path) -> str:
    """Return what tells checkpoints apart: their configuration, names and sizes of their weights.

    Raises:
        CheckpointError: There is none.
    """
    fix = "Give all nodes the checkpoint under this path"
    with reading(folder / "config.json", "the checkpoint", CheckpointError, fix=fix):
        digest = digest_of(folder / "config.json")
    sizes = sorted((path.name, path.stat().st_size) for path in folder.glob("*.safetensors"))
    return hashlib.blake2b(f"{digest}{sizes}".encode(), digest_size=16).hexdigest()
