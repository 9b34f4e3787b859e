"""Actors with their nodes: made in the bundles of a placement group, called, compared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from routing_replay.errors import ConfigError, RoutingReplayError

from .actors import Actor, Place, digest_of

POLL_S = 0.5
# An actor that ends would kill the guard of its server, and not the server.
KEEPS_CHILDREN = {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "false"}}


class LostActorError(RoutingReplayError):
    """An actor whose process or node ended."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """An actor and its node.

    Args:
        name: What it serves or trains, for errors.
        actor: Its handle.
        place: Its node.
    """

    name: str
    actor: Any
    place: Place

    def call(self, method: str, *arguments: object) -> Any:
        """Call a method and return its result.

        Raises:
            RoutingReplayError: What the method raised.
            LostActorError: The actor died.
        """
        return self.result(getattr(self.actor, method).remote(*arguments))

    def result(self, ref: Any) -> Any:
        """Wait for a call; errors as of `call`."""
        try:
            return ray.get(ref)
        except RayTaskError as error:
            raise error.cause from error
        except RayActorError as error:
            raise LostActorError(
                f"{self.name} died with its actor",
                got=str(error).strip().rpartition("\n")[2],
                where=f"node {self.place.address}, {self.place.node}",
            ) from error


def call_all(placed: Sequence[Placed], method: str, *arguments: object) -> list[Any]:
    """Call a method of all actors at once; return the results, with errors as of `Placed.call`."""
    refs = [getattr(one.actor, method).remote(*arguments) for one in placed]
    return [one.result(ref) for one, ref in zip(placed, refs, strict=True)]


def make(
    group: PlacementGroup,
    kind: type[Actor],
    bundles: Sequence[int],
    num_gpus: float,
    timeout_s: float,
) -> list[Placed]:
    """Make an actor in each of some bundles; several may have the same bundle.

    Args:
        group: Has the bundles.
        kind: The actors' class; its `name` is for errors.
        bundles: Of the actors.
        num_gpus: Of each.
        timeout_s: The longest wait for them.

    Raises:
        LostActorError: A node was lost, or they did not start in time.
        ConfigError: A node does not see this process's folder.
    """
    nodes = placement_group_table(group)["bundles_to_node_id"]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    remote: Any = ray.remote  # its types lack this option
    made = remote(concurrency_groups=dict(kind.concurrency_groups))(kind)
    placed = []
    for number, bundle in enumerate(bundles):
        strategy = PlacementGroupSchedulingStrategy(group, bundle)
        options = {
            "num_cpus": 1,
            "num_gpus": num_gpus,
            "scheduling_strategy": strategy,
            "runtime_env": KEEPS_CHILDREN,
        }
        node = nodes.get(bundle, "")
        placed.append(
            Placed(
                name=f"{kind.name} {number}",
                actor=made.options(**options).remote(),
                place=Place(
                    node=node, address=addresses.get(node, "unknown"), gpus=(), num_cores=1
                ),
            )
        )
    refs = [one.actor.enter.remote(Path.cwd()) for one in placed]
    _wait(refs, placed, timeout_s)
    return [replace(one, place=one.result(ref)) for one, ref in zip(placed, refs, strict=True)]


def _wait(refs: Sequence[Any], placed: Sequence[Placed], timeout_s: float) -> None:
    """Wait for new actors while their nodes live: Ray would wait for other nodes."""
    deadline = time.monotonic() + timeout_s
    while True:
        ready, pending = ray.wait(list(refs), num_returns=len(refs), timeout=POLL_S)
        if not pending:
            return
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        lost = [one.place for one in placed if one.place.node not in alive]
        if lost or time.monotonic() > deadline:
            raise LostActorError(
                "a node was lost before the run started" if lost else "some actors do not start",
                expected=f"{len(refs)} actors within {timeout_s:g} s (--node-timeout-s)",
                got=len(ready),
                where=", ".join(dict.fromkeys(f"{p.address}, {p.node}" for p in lost)) or None,
                fix="Start the run again once the node is back; `ray status` lists the nodes",
            )


def require_alike(placed: Sequence[Placed], identities: Sequence[dict[str, str]]) -> None:
    """Raise ConfigError for servers of different versions or checkpoints.

    Args:
        placed: The servers' actors.
        identities: Of each, by the name of what must be the same.
    """
    for one, identity in zip(placed, identities, strict=True):
        for what, value in identity.items():
            if value != identities[0][what]:
                raise ConfigError(
                    f"two servers would differ in {what}",
                    expected=f"{identities[0][what]}, as on node {placed[0].place.address}",
                    got=value,
                    where=f"node {one.place.address}",
                    fix="Give all nodes the same environment and checkpoint",
                )


def require_shared(placed: Sequence[Placed], run_dir: Path) -> None:
    """Raise ConfigError for a node that does not see the folder of the run."""
    call_all(placed, "require_shared", run_dir, digest_of(run_dir / "config.json"))
