"""One machine of a trainer of several: `python -m recipes.minirl.node RUN_DIR --node-rank K ...`.

It waits for the other machines, says which of them is missing, and becomes torchrun.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from routing_replay.errors import ConfigError, RoutingReplayError, reading

from .job.node_files import node_number
from .settings.config import RecipeConfig

POLL_S = 0.2
# Settings that may differ between machines.
OF_A_NODE = ("run_dir", "scratch_dir", "resume", "trainer_gpus")


class NodeError(RoutingReplayError):
    """A machine of the trainer that did not start, or started twice."""


def main(argv: list[str] | None = None) -> int:
    """Wait for the other machines, then replace this process by torchrun."""
    arguments = make_parser().parse_args(argv)
    address, port, node = arguments.master_addr, arguments.master_port, arguments.node_rank
    try:
        config = read_config(arguments.run_dir)
        # torchrun's own store comes after this one, at the port before it.
        meet(address, port + 1, node, config.run.nnodes, config.run.node_timeout_s)
    except RoutingReplayError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "torch.distributed.run", "--node-rank", str(node)]
    command += ["--nnodes", str(config.run.nnodes), "--nproc-per-node", str(config.run.nproc)]
    command += ["--master-addr", address, "--master-port", str(port)]
    command += ["-m", "recipes.minirl.train", str(arguments.run_dir)]
    return os.execv(sys.executable, [*command, "--rollout-url", *arguments.rollout_url])


def read_config(run_dir: Path) -> RecipeConfig:
    """Read the configuration of a prepared run.

    Raises:
        ConfigError: There is none on this machine, or it is damaged.
    """
    path = run_dir / "config.json"
    fix = (
        "Prepare the run with --prepare-only; copy config.json to machines with a disk of their own"
    )
    with reading(path, "the configuration of the run", ConfigError, fix=fix):
        values = json.loads(path.read_text())
    return RecipeConfig.from_mapping(values, path)


def meet(address: str, port: int, node: int, num_nodes: int, timeout_s: float) -> None:
    """Return once all machines have called this.

    Args:
        address, port: Of node 0; it listens there.
        node: This machine, from 0.
        num_nodes: Of the trainer.
        timeout_s: The longest wait.

    Raises:
        NodeError: Which machines did not start in time, or that two have the same number.
    """
    if not 0 <= node < num_nodes:
        expected = f"0..{num_nodes - 1} (--nnodes {num_nodes})"
        raise NodeError("the machine's number is out of range", expected=expected, got=node)
    deadline = time.monotonic() + timeout_s
    store = _open_store(address, port, node, timeout_s)
    try:
        if store.add(f"started/{node}", 1) > 1:
            raise NodeError(
                "two machines have the same number",
                got=f"--node-rank {node} on {socket.gethostname()} and on another",
                where=f"{address}:{port}",
            )
        _wait_for(store, "started", num_nodes, deadline, timeout_s)
        # Node 0 ends the store for all: it goes last.
        store.set(f"met/{node}", "")
        if node == 0:
            _wait_for(store, "met", num_nodes, deadline, timeout_s)
    except dist.DistNetworkError as error:
        raise NodeError(
            "node 0 ended while this machine waited for the others", got=error, where=address
        ) from error


def require_alike(values: Mapping[str, object]) -> None:
    """Refuse machines whose configurations or versions differ; collective.

    Raises:
        ConfigError: What differs, and where (on every rank).
    """
    own = {key: value for key, value in values.items() if key not in OF_A_NODE}
    own["version of torch"] = torch.__version__
    for package in ("megatron-core", "routing_replay"):
        own[f"version of {package}"] = importlib.metadata.version(package)
    nodes: list[tuple[int, dict[str, object]]] = [(0, {})] * dist.get_world_size()
    dist.all_gather_object(nodes, (node_number(), own))
    first = nodes[0][1]
    for node, other in nodes:
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise ConfigError(
                    f"the machines disagree on {key!r}",
                    expected=f"{first.get(key)!r}, as on node 0",
                    got=repr(other.get(key)),
                    where=f"node {node}",
                    fix="Give all of them the config.json of one --prepare-only, and alike "
                    "environments",
                )


def _open_store(address: str, port: int, node: int, timeout_s: float) -> TCPStore:
    """Listen as node 0, or connect to it, with tries until the time is over."""
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        return TCPStore(address, port, is_master=node == 0, wait_for_workers=False, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError) as error:
        what = "node 0 cannot listen" if node == 0 else "node 0 did not start"
        raise NodeError(
            what,
            expected=f"{address}:{port} within {timeout_s:g} s (--node-timeout-s)",
            got=str(error).splitlines()[0],
            fix="Start its command too; --master-addr is the address of node 0, and this port and "
            "the one before it must be free and open there",
        ) from error


def _wait_for(
    store: TCPStore, name: str, num_nodes: int, deadline: float, timeout_s: float
) -> None:
    while True:
        missing = [node for node in range(num_nodes) if not store.check([f"{name}/{node}"])]
        if not missing:
            return
        if time.monotonic() > deadline:
            raise NodeError(
                "some machines of the trainer did not start",
                expected=f"{num_nodes} machines within {timeout_s:g} s (--node-timeout-s)",
                got=f"none for --node-rank {', '.join(map(str, missing))}",
                fix="Start their commands too, in any order",
            )
        time.sleep(POLL_S)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of a machine's command."""
    parser = argparse.ArgumentParser(prog="python -m recipes.minirl.node", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder with config.json, of this machine")
    parser.add_argument("--node-rank", type=int, required=True, help="of this machine, from 0")
    parser.add_argument("--master-addr", required=True, help="address of node 0")
    parser.add_argument(
        "--master-port", type=int, default=29500, help="of node 0; the next one is used too"
    )
    parser.add_argument("--rollout-url", nargs="+", required=True, help="the rollout servers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
