"""Where a run's servers and trainer start: this machine, or the nodes of a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from recipes.serving.children import Child
from recipes.serving.kept import KeptServer
from recipes.serving.server import ServerOptions
from routing_replay.errors import ConfigError, RoutingReplayError

from ..data.inputs import server_folder
from ..settings.config import RecipeConfig
from . import devices
from .commands import (
    request_arguments,
    thread_environment,
    trainer_arguments,
    visible_devices,
)

# In health checks: a server that is healthy again comes back by itself before that.
RESTART_AFTER = 2.0


class TrainingError(RoutingReplayError):
    """A trainer or a preparation that failed."""


class LaunchedServer(Protocol):
    """A rollout server that its machine keeps running; see `KeptServer`."""

    @property
    def url(self) -> str: ...
    def keep(self, out_since: float | None) -> bool: ...
    def check(self) -> None: ...


class LaunchedTrainer(Protocol):
    """The trainer's processes: `status` is None while they run, 0 after success."""

    @property
    def status(self) -> int | None: ...
    def error(self) -> RoutingReplayError: ...


class Machines(Protocol):
    """Starts servers and trainer."""

    def start_servers(self, config: RecipeConfig, run_dir: Path) -> Sequence[LaunchedServer]: ...
    def start_trainer(
        self, config: RecipeConfig, run_dir: Path, urls: Sequence[str]
    ) -> LaunchedTrainer: ...


def machines_of(config: RecipeConfig) -> contextlib.AbstractContextManager[Machines]:
    """Return the machines of a run; leaving them ends what was started there.

    They are nodes of a Ray cluster if the run names one, and this machine otherwise.

    Raises:
        ConfigError: They do not suffice for the run, or Ray is not installed.
    """
    if not config.run.ray:
        return ThisMachine(config)
    try:
        from ..ray.cluster import ray_cluster  # Ray is loaded for these runs only
    except ModuleNotFoundError as error:
        raise ConfigError(
            "Ray is not installed",
            got=error,
            fix="Install it with `pip install 'routing_replay[ray]'`, or leave out --ray",
        ) from error
    return ray_cluster(config)


class ThisMachine(contextlib.ExitStack):
    """Starts one server and a trainer of one node as child processes.

    Raises:
        ConfigError: A trainer of several machines, or GPUs that are missing or not divided.
    """

    def __init__(self, config: RecipeConfig):
        super().__init__()
        require_one_node(config)
        devices.require_own_devices(config, torch.cuda.device_count())

    def start_servers(self, config: RecipeConfig, run_dir: Path) -> list[KeptServer]:
        """Start one SGLang server with our plugin."""
        options = server_options(config, run_dir / "logs" / "sglang.log")
        server = self.enter_context(keep_server(config, options))
        print(f"SGLang serves at {server.url}, log {options.log_path}", flush=True)
        return [server]

    def start_trainer(
        self, config: RecipeConfig, run_dir: Path, urls: Sequence[str]
    ) -> LocalTrainer:
        """Start torchrun with one process per rank."""
        return self.enter_context(LocalTrainer(config, run_dir, urls))


class LocalTrainer(Child):
    """torchrun on this machine."""

    def __init__(self, config: RecipeConfig, run_dir: Path, urls: Sequence[str]):
        self._run_dir = run_dir
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += trainer_arguments(config, run_dir, urls)
        environment = thread_environment(config, config.run.nproc)
        environment |= visible_devices(config.run.trainer_gpus)
        super().__init__(command, run_dir / "logs" / "trainer.log", environment)

    def error(self) -> TrainingError:
        """Return why the trainer failed: the message that it left, or its last lines."""
        messages = sorted(self._run_dir.glob("error_rank_*.txt"), key=os.path.getmtime)
        if messages:
            return TrainingError(messages[0].read_text())
        return TrainingError(
            f"the trainer ended with status {self.status}",
            where=self.log_path,
            fix=f"Its last lines:\n{self.last_lines()}",
        )


def require_one_node(config: RecipeConfig) -> None:
    """Raise ConfigError for a trainer of several machines, of which this is only one."""
    if config.run.nnodes > 1:
        raise ConfigError(
            "the launcher starts a trainer on this machine only",
            expected="--nnodes 1, or --ray with the address of a cluster",
            got=config.run.nnodes,
            fix="Prepare the run with --prepare-only; it prints the command of each node",
        )


def server_options(config: RecipeConfig, log_path: Path) -> ServerOptions:
    """Return how a run starts a server on this machine."""
    rollout = config.rollout
    return ServerOptions(
        weight_version=-1,
        port=rollout.server_port or None,
        python=rollout.rollout_python or sys.executable,
        capture=config.rollout_capture,
        log_path=log_path,
        arguments=(
            *("--dtype", rollout.rollout_dtype),
            *request_arguments(config),
            *("--log-level-http", "warning"),  # a line per request would bury the rest
            *rollout.server_arguments,
        ),
        environment=thread_environment(config, 1) | visible_devices(rollout.rollout_gpus),
        ready_timeout_s=rollout.ready_timeout_s,
    )


def keep_server(config: RecipeConfig, options: ServerOptions) -> KeptServer:
    """Start a server of a run, to be kept running.

    Raises:
        ServerError: It does not start.
    """
    return KeptServer(
        server_folder(config),
        options,
        num_restarts=config.rollout.server_restarts,
        restart_after_s=RESTART_AFTER * config.rollout.health_every_s,
    )
