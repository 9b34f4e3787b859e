"""Rank 0 hands out prompts; groups are sampled beside the servers, and ranks fetch their parts.

What passes through rank 0 are tokens, log-probs and rewards. Routes stay on the server's node until
the ranks that train them ask for their parts, which are Ray objects then.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist

from routing_replay.errors import PayloadError, RoutesError, ServerError
from routing_replay.files import atomic_write
from routing_replay.rollout.servers import Weights

from ..data.prompts import Prompt
from ..job.first_rank import FirstRank
from ..rollout.groups import Group, StepFiles
from ..rollout.sampling import Rollout
from .actors import GROUPS_AT_ONCE
from .placed import Placed, call_all
from .sampler import SamplerOptions, number_in

# A group goes elsewhere so many times.
NUM_RETRIES = 3
# Parts that a node asks for at once: they are in its memory together.
PARTS_AT_ONCE = 16


@dataclass(kw_only=True)
class SamplerState:
    """A sampler as rank 0 sees it.

    Args:
        placed: Its actor.
        url: Its server.
        num_running: Groups that it samples.
        is_out: It gets none, for its server failed.
        recovery: The end of its server's recovery, while it recovers.
        weights: Those that the server then has.
    """

    placed: Placed
    url: str
    num_running: int = 0
    is_out: bool = False
    recovery: Any = None
    weights: Weights | None = None


class RayExchange:
    """Samples beside each server; a group goes elsewhere if its server fails.

    Args:
        samplers: The servers' actors, by number.
        urls: Their servers.
        folder: Scratch folder of the run.
        rollout: On rank 0; None elsewhere.
        first_rank: Knows the nodes.
    """

    def __init__(
        self,
        samplers: Sequence[Placed],
        urls: Sequence[str],
        folder: Path,
        rollout: Rollout | None,
        first_rank: FirstRank,
    ):
        pairs = zip(samplers, urls, strict=True)
        self._states = [SamplerState(placed=placed, url=url) for placed, url in pairs]
        self._rollout = rollout
        self._first_rank = first_rank
        self._lock = threading.Lock()
        if rollout is not None:
            model = rollout.client.model
            assert model is not None
            options = SamplerOptions(
                config=rollout.config, checkpoint=rollout.checkpoint, model=model, folder=folder
            )
            opened = [
                placed.actor.open_sampler.remote(options, number)
                for number, placed in enumerate(samplers)
            ]
            for placed, ref in zip(samplers, opened, strict=True):
                placed.result(ref)

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        files: StepFiles | None = None,
        first: int = 0,
    ) -> list[Group]:
        """Sample groups beside the servers, as `Rollout.sample` does."""
        assert self._rollout is not None
        servers = self._rollout.client.servers
        self._recover()
        call = uuid.uuid4().hex
        most = self._rollout.client.options.max_in_flight // num_samples
        most = min(max(1, most), GROUPS_AT_ONCE)
        waiting = deque(range(len(prompts)))
        running: dict[Any, tuple[SamplerState, int]] = {}
        groups: dict[int, Group] = {}
        tried: list[list[str]] = [[] for _ in prompts]
        try:
            while len(groups) < len(prompts):
                while waiting and (state := self._with_room(tried[waiting[0]], most)):
                    number = waiting.popleft()
                    task = (first + number, prompts[number], num_samples, files)
                    arguments = (*task, servers.weights)
                    running[state.placed.actor.sample.remote(call, *arguments)] = state, number
                for ref in self._ended(running):
                    state, number = running.pop(ref)
                    with self._lock:
                        state.num_running -= 1
                    try:
                        groups[number] = state.placed.result(ref)
                    except (ServerError, PayloadError, RoutesError) as error:
                        tried[number].append(state.url)
                        if len(tried[number]) > NUM_RETRIES:
                            raise
                        waiting.appendleft(number)
                        self._leave_out(state, error)
                        self._recover()
        finally:
            self._end(call, running)
        return [groups[number] for number in range(len(prompts))]

    def fetch(self, folder: Path, names: Sequence[str]) -> None:
        """Bring parts of routes to this rank's node, each at most once; collective.

        Raises:
            DataError: A node could not write them (on every rank).
            TableError, LostActorError: They are no more where they were made.
        """

        def copy(wanted: Mapping[int, set[str]]) -> OSError | None:
            missing = [name for name in wanted[dist.get_rank()] if not (folder / name).exists()]
            return self._copy(folder, sorted(missing))

        self._first_rank.bring(folder, names, copy)

    @contextlib.contextmanager
    def paused(self, mode: str) -> Iterator[None]:
        """Within: no server samples, and weights may change; the samplers know of it."""
        assert self._rollout is not None
        client, placed = self._rollout.client, [state.placed for state in self._states]
        call_all(placed, "pause", mode)
        try:
            with client.paused(mode):
                yield
        finally:
            call_all(placed, "resume", client.servers.weights)

    def state(self) -> dict[str, float]:
        """Return metrics of the servers since this was last called; on rank 0."""
        assert self._rollout is not None
        metrics = Counter(self._rollout.state())
        for of_sampler in call_all([state.placed for state in self._states], "state"):
            metrics.update(of_sampler)
        num_used = sum(not state.is_out for state in self._states)
        return dict(metrics) | {"rollout/servers": float(num_used)}

    def _with_room(self, tried: Sequence[str], most: int) -> SamplerState | None:
        """Take a place at the least busy sampler of those that a group tried least; None: full."""
        with self._lock:
            used = [state for state in self._states if not state.is_out]
            fewest = min((tried.count(state.url) for state in used), default=0)
            free = [
                state
                for state in used
                if state.num_running < most and tried.count(state.url) == fewest
            ]
            if not free:
                return None
            state = min(free, key=lambda s: s.num_running)
            state.num_running += 1
            return state

    def _ended(self, running: Mapping[Any, object]) -> list[Any]:
        """Wait until a group ends or a server is back; return the groups' calls that have ended."""
        with self._lock:
            recoveries = {s.recovery: s for s in self._states if s.recovery is not None}
        refs = [*running, *recoveries]
        ray.wait(refs, num_returns=1)
        ended, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in ended:
            if ref in recoveries:
                self._take_back(recoveries[ref], ref)
        return [ref for ref in ended if ref in running]

    def _leave_out(self, state: SamplerState, error: Exception) -> None:
        with self._lock:
            was_out, state.is_out = state.is_out, True
        if not was_out:
            print(f"Servers: {state.url} gets no groups: {error}", flush=True)

    def _recover(self) -> None:
        """Let the servers recover that failed; those that lost weights get those of now."""
        assert self._rollout is not None
        weights = self._rollout.client.servers.weights
        with self._lock:
            for state in self._states:
                if state.is_out and state.recovery is None:
                    state.weights = weights
                    state.recovery = state.placed.actor.recover.remote(weights)

    def _take_back(self, state: SamplerState, ref: Any) -> None:
        """Give a sampler groups again if its server has recovered.

        Raises:
            ServerError: It has not, and the others are fewer than `--min-servers`; LostWeightsError
                if publishing the weights again helps.
        """
        assert self._rollout is not None
        servers = self._rollout.client.servers
        with self._lock:
            if state.recovery is not ref:
                return
            state.recovery = None
        try:
            state.placed.result(ref)
        except ServerError:
            if state.weights != servers.weights:
                self._recover()
            # Otherwise it is asked again when the next groups are sampled.
            elif sum(not state.is_out for state in self._states) < servers.min_servers:
                raise
        else:
            state.is_out = False
            servers.passed(servers[state.url])

    def _end(self, call: str, running: Mapping[Any, tuple[SamplerState, int]]) -> None:
        """End what still runs of a call that failed."""
        for state, _ in running.values():
            state.placed.actor.cancel.remote(call)
        ray.wait(list(running), num_returns=len(running)) if running else None
        with self._lock:
            for state, _ in running.values():
                state.num_running -= 1

    def _copy(self, folder: Path, names: Sequence[str]) -> OSError | None:
        """Write parts into a folder; return the error of a file that could not be written."""
        for start in range(0, len(names), PARTS_AT_ONCE):
            some = names[start : start + PARTS_AT_ONCE]
            places = [self._states[number_in(name)].placed for name in some]
            calls = zip(places, some, strict=True)
            refs = [placed.actor.part.remote(folder.name, name) for placed, name in calls]
            for placed, name, ref in zip(places, some, refs, strict=True):
                content = placed.result(ref)
                try:
                    with atomic_write(folder / name, is_durable=False) as partial:
                        content.tofile(partial)
                except OSError as error:
                    return error
        return None
