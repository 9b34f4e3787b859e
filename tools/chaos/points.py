"""What disturbs a run: each point does one thing to a process, a connection or a disk."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from recipes.minirl.rollout.answers import FOLDER
from recipes.serving.kept import KeptServer
from routing_replay.rollout import RolloutClient

from .proxy import FAULTS, Proxy

# A stopped server is longer silent than two health checks (of 5 s, and as far apart), or shorter.
STOP_S = (2.0, 25.0)
FAULTY_ANSWERS = 5


@dataclass(kw_only=True)
class World:
    """What can be disturbed.

    Args:
        rng: Chooses.
        servers: Real ones, kept running by `keep`.
        proxies: Before each of them.
        run_dir: Of the run.
        launcher: Its process; set by who starts it.
    """

    rng: random.Random
    servers: list[KeptServer]
    proxies: list[Proxy]
    run_dir: Path
    launcher: psutil.Process | None = None
    faulty: dict[int, str] = field(default_factory=dict)

    def keep(self) -> None:
        """Start dead servers again."""
        for server in self.servers:
            server.keep(None)

    def ranks(self) -> list[psutil.Process]:
        """Return the trainer's ranks, by rank; none while it starts."""
        assert self.launcher is not None
        with contextlib.suppress(psutil.Error):
            children = self.launcher.children(recursive=True)
            ranks = [c for c in children if "recipes.minirl.train" in c.cmdline()]
            ranks = [c for c in ranks if "RANK" in c.environ()]
            return sorted(ranks, key=lambda c: int(c.environ()["RANK"]))
        return []


def kill_server(world: World) -> None:
    """Kill a server's first process; its guard ends the others."""
    with contextlib.suppress(psutil.Error, IndexError):
        world.rng.choice(_first_processes(world)).kill()


def stop_server(world: World) -> None:
    """Stop all processes of a server for a while."""
    with contextlib.suppress(psutil.Error, IndexError):
        process = world.rng.choice(_first_processes(world))
        group = [process, *process.children(recursive=True)]
        for member in group:
            member.send_signal(signal.SIGSTOP)
        time.sleep(world.rng.choice(STOP_S))
        for member in group:
            with contextlib.suppress(psutil.Error):
                member.send_signal(signal.SIGCONT)


def damage_answers(world: World) -> None:
    """Damage, delay or withhold some of the next answers."""
    proxy = world.rng.choice(world.proxies)
    chosen = [world.rng.choice(FAULTS) for _ in range(FAULTY_ANSWERS)]

    def fault_of(number: int) -> str | None:
        return chosen.pop() if chosen else None

    proxy.fault_of = fault_of


def freeze_connection(world: World) -> None:
    """Let nothing pass for a while: a network that is down, without a word."""
    proxy = world.rng.choice(world.proxies)
    proxy.freeze()
    time.sleep(world.rng.choice(STOP_S))
    proxy.release()


def abort_answers(world: World) -> None:
    """Abort all requests of a server, as an operator may."""
    with contextlib.suppress(Exception):
        RolloutClient([world.rng.choice(world.servers).url]).abort()


def kill_client(world: World) -> None:
    """Kill the rank that talks to the servers."""
    _kill_rank(world, 0)


def kill_rank(world: World) -> None:
    """Kill a rank that waits in a collective."""
    _kill_rank(world, -1)


def kill_launcher(world: World) -> None:
    """Kill the process that the user started; what it started must end with it."""
    assert world.launcher is not None
    with contextlib.suppress(psutil.Error):
        world.launcher.kill()


def fill_disk(world: World) -> None:
    """Let the disk have no room for the responses of the steps that follow."""
    folder = world.run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)  # no step has begun, perhaps
    newest = max((int(p.name.removeprefix("step_")) for p in folder.glob("step_*")), default=0)
    for step in (newest + 1, newest + 2):
        of_step = folder / f"step_{step:06d}"
        of_step.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.symlink("/dev/full", of_step / "group_000000.jsonl")


def free_disk(world: World) -> None:
    """Undo `fill_disk`."""
    for path in (world.run_dir / FOLDER).glob("step_*/group_*"):
        if path.is_symlink():
            path.unlink()


SURVIVED = (kill_server, stop_server, damage_answers, freeze_connection, abort_answers)
FATAL = (kill_client, kill_rank, kill_launcher, fill_disk)
POINTS: tuple[Callable[[World], None], ...] = (*SURVIVED, *SURVIVED, *FATAL)


def _first_processes(world: World) -> list[Any]:
    """The servers' own processes, which their guards started."""
    guards = [psutil.Process(server.server.process.pid) for server in world.servers]
    return [child for guard in guards for child in guard.children()]


def _kill_rank(world: World, index: int) -> None:
    with contextlib.suppress(psutil.Error, IndexError):
        world.ranks()[index].kill()
