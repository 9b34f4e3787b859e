"""The driver's side of a run on Ray: connect, reserve, start, end."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from routing_replay.errors import ConfigError

from ..settings.config import RecipeConfig
from .actors import Actor, RankActor, ServerActor
from .placed import Placed, call_all, make, require_alike, require_shared
from .placement import place, rank_bundles, rank_environments, server_bundles
from .watched import RayServer, RayTrainer

TESTED = "2.60"
NAMESPACE = "minirl"
CONNECT_S = 5.0
# A server's guard waits 3 s for it.
STOP_S = 15.0


@contextlib.contextmanager
def ray_cluster(config: RecipeConfig) -> Iterator[RayCluster]:
    """Connect to the cluster of a run and reserve its nodes; end all of it at the end.

    Raises:
        ConfigError: No cluster, another job in the same folder, or too few nodes.
    """
    with connected(config.run.ray), contextlib.ExitStack() as stack:
        held = lock(config.run.run_dir)
        stack.callback(ray.kill, held) if held else None
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        bundles = [*rank_bundles(config, has_gpus), *server_bundles(config, has_gpus)]
        group = place(bundles, config.run.node_timeout_s)
        stack.callback(remove_placement_group, group)
        cluster = RayCluster(group)
        stack.callback(cluster.stop)
        yield cluster


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect this process to a cluster.

    Raises:
        ConfigError: There is none, or it is of another version of Ray or Python.
    """
    check_version(ray.__version__)
    try:
        _require_listener(address)
        ray.init(address=address, namespace=NAMESPACE, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            "the Ray cluster cannot be reached",
            expected="auto on one of its nodes, or host:port of its head",
            got=error,
            where=address,
            fix="Start one with `ray start --head` on the first node and `ray start --address "
            "HOST:6379` on the others, and run this on one of them",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def check_version(version: str) -> None:
    """Warn of a Ray that the tests have not run with."""
    if not version.startswith(f"{TESTED}."):
        print(f"warning: Ray {version} is not tested; {TESTED} is", flush=True)


def lock(run_dir: str) -> Any:
    """Return an actor that keeps other jobs of the cluster out of a folder; None of a new folder.

    Raises:
        ConfigError: Another job trains there.
    """
    if not run_dir:
        return None
    name = str(Path(run_dir).absolute())
    try:
        return ray.remote(RunLock).options(num_cpus=0, name=name).remote()
    except ValueError as error:
        raise ConfigError(
            "another job on the cluster trains in this folder",
            where=name,
            fix="Wait for its end, end it with `ray job stop`, or choose another --run-dir",
        ) from error


class RunLock:
    """An actor whose name is the folder of a run. It ends with the driver."""


class RayCluster:
    """Starts servers and trainer as actors in a placement group.

    Args:
        group: Holds the bundles of the ranks, then those of the servers.
    """

    def __init__(self, group: PlacementGroup):
        self._group = group
        self._servers: list[Placed] = []

    def start_servers(self, config: RecipeConfig, run_dir: Path) -> list[RayServer]:
        """Start all servers at once, each on its node.

        Raises:
            ConfigError: They would differ, or a node does not see the run's folder.
            ServerError, LostActorError: One did not start.
        """
        bundles = range(len(self._group.bundle_specs))[-config.rollout.num_servers :]
        actors = self._make(ServerActor, bundles, self._gpus(bundles[0]), config)
        require_shared(actors, run_dir)
        require_alike(actors, call_all(actors, "identity", config))
        self._servers = actors
        logs = [run_dir.absolute() / "logs" / f"sglang_{n}.log" for n in range(len(actors))]
        refs = [one.actor.start.remote(config, log) for one, log in zip(actors, logs, strict=True)]
        servers = [RayServer(one, one.result(ref)) for one, ref in zip(actors, refs, strict=True)]
        for server, log in zip(servers, logs, strict=True):
            print(f"SGLang serves at {server.url}, log {log}", flush=True)
        return servers

    def start_trainer(self, config: RecipeConfig, run_dir: Path, urls: Sequence[str]) -> RayTrainer:
        """Start the training loop on all ranks.

        Raises:
            ConfigError: A node does not see the run's folder.
            LostActorError: A node was lost.
        """
        bundles = [n // config.training.tensor_parallel for n in range(config.world_size)]
        actors = self._make(RankActor, bundles, min(1.0, self._gpus(0)), config)
        require_shared(actors, run_dir)
        environments = rank_environments(config, [one.place for one in actors])
        ranks = []
        for rank, (number, environment) in enumerate(environments):
            ranks.append(replace(actors[number], name=f"rank {rank}"))
            log = run_dir.absolute() / "logs" / f"trainer_rank_{rank}.log"
            ranks[-1].actor.prepare.remote(environment, log)
        print(f"Ranks, by node: {', '.join(one.place.address for one in ranks)}", flush=True)
        port = ranks[0].call("hold_port")
        arguments = (config, run_dir, list(urls), port, self._servers)
        refs = [one.actor.train.remote(*arguments) for one in ranks]
        return RayTrainer(ranks, refs)

    def stop(self) -> None:
        """End the servers. Their actors and the ranks end with the placement group."""
        stops = [one.actor.stop.remote() for one in self._servers]
        ray.wait(stops, num_returns=len(stops), timeout=STOP_S) if stops else None

    def _make(
        self, kind: type[Actor], bundles: Sequence[int], num_gpus: float, config: RecipeConfig
    ) -> list[Placed]:
        return make(self._group, kind, bundles, num_gpus, config.run.node_timeout_s)

    def _gpus(self, bundle: int) -> float:
        return self._group.bundle_specs[bundle].get("GPU", 0)


def _require_listener(address: str) -> None:
    """Raise at once where nothing listens, or Ray Client does: Ray would try for long."""
    if "://" in address:
        raise ValueError("Ray Client, whose driver is outside the cluster")
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), CONNECT_S).close()
