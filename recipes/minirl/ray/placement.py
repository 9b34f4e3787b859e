"""Where a run's actors go: its bundles of resources, and the rank of each actor of the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from routing_replay.errors import ConfigError

from ..launch.commands import thread_environment, visible_devices
from ..launch.server_plan import server_layout
from ..settings.config import RecipeConfig
from .actors import Place

# A cluster that does not scale has room at once.
AT_ONCE_S = 2.0


def rank_bundles(config: RecipeConfig, has_gpus: bool) -> list[dict[str, float]]:
    """Return the resources of the trainer: a tensor-parallel group of ranks is not divided."""
    size = config.training.tensor_parallel
    return [_resources(size, size * has_gpus)] * (config.world_size // size)


def server_bundles(config: RecipeConfig, has_gpus: bool) -> list[dict[str, float]]:
    """Return the resources of each server to launch."""
    if config.rollout.rollout_url:
        return []
    num_gpus = server_layout(config).num_gpus if has_gpus else 0
    return [_resources(1, num_gpus)] * config.rollout.num_servers


def place(bundles: Sequence[dict[str, float]], timeout_s: float) -> PlacementGroup:
    """Reserve all bundles together, on as few nodes as hold them.

    Two runs that are placed at once cannot keep each other waiting with a half each.

    Raises:
        ConfigError: There is no room within the time: what there is, and what is needed.
    """
    group = placement_group(list(bundles), strategy="PACK")
    if group.wait(AT_ONCE_S):
        return group
    print(f"Waiting for room on the cluster: {needed(bundles)}; {present()}", flush=True)
    if group.wait(timeout_s):
        return group
    remove_placement_group(group)
    raise ConfigError(
        "the Ray cluster has no room for the run",
        expected=f"{needed(bundles)}, within {timeout_s:g} s (--node-timeout-s)",
        got=present(),
        fix="Add nodes, end other jobs, or lower --nnodes, --nproc and --num-servers",
    )


def needed(bundles: Sequence[Mapping[str, float]]) -> str:
    """Describe bundles: how many of each kind."""
    kinds = [_text(bundle) for bundle in bundles]
    return ", ".join(f"{kinds.count(kind)} x ({kind})" for kind in dict.fromkeys(kinds))


def present() -> str:
    """Describe the nodes that live, and what is free on all of them together."""
    nodes = [
        f"{node['NodeManagerAddress']} ({_text(node['Resources'])})"
        for node in ray.nodes()
        if node["Alive"]
    ]
    return f"{', '.join(sorted(nodes))}; free: {_text(ray.available_resources())}"


def rank_environments(
    config: RecipeConfig, places: Sequence[Place]
) -> list[tuple[int, dict[str, str]]]:
    """Number the ranks node by node; nodes may hold different numbers of them.

    Args:
        config: The run's.
        places: Of the trainer's actors, in the order of their bundles.

    Returns:
        For each rank the number of its actor, and what torchrun would set. A rank sees the GPUs of
        all ranks of its node and takes the one of its local rank.
    """
    nodes = list(dict.fromkeys(place.node for place in places))
    order = sorted(range(len(places)), key=lambda number: nodes.index(places[number].node))
    ranks = []
    for rank, number in enumerate(order):
        node = places[number].node
        local = [other for other in order if places[other].node == node]
        gpus = ",".join(gpu for other in local for gpu in places[other].gpus)
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_RANK": str(local.index(number)),
            "LOCAL_WORLD_SIZE": str(len(local)),
            "GROUP_RANK": str(nodes.index(node)),
            "MASTER_ADDR": places[order[0]].address,
            **thread_environment(config, len(local), places[number].num_cores),
            **visible_devices(gpus),
        }
        ranks.append((number, environment))
    return ranks


def _resources(num_cpus: int, num_gpus: int) -> dict[str, float]:
    resources: dict[str, float] = {"CPU": num_cpus, "GPU": num_gpus}
    return {kind: number for kind, number in resources.items() if number}


def _text(resources: Mapping[str, Any]) -> str:
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
