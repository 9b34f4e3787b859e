"""Rollouts that run beside the training of the steps before theirs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..publish.publisher import Publisher
from ..settings.config import RecipeConfig
from .checkpoints import Progress
from .first_rank import FirstRank, Pending

# (step, number of its first prompt, folder) -> the rollout's metrics.
Sampling = Callable[[int, int, Path], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class StepRollout:
    """The rollout of a step, which rank 0 has begun.

    Args:
        step: Whose batch it samples.
        first_prompt: Number of its first prompt.
        folder: Where batch and routes will be, on each node.
        number: How often the step's sampling was begun before.
        num_published: How often weights had been published when it was begun.
        pending: Its end, with its metrics.
    """

    step: int
    first_prompt: int
    folder: Path
    number: int
    num_published: int
    pending: Pending


class RolloutPool:
    """The rollouts that run, of consecutive steps. Its methods are collective.

    A step takes the oldest, so batches are trained in the order of steps, each with the prompts
    that it would have without a pool: short responses do not come first.

    Args:
        config: The run's. `ahead` rollouts run while a step is trained, so no response is of
            weights more than `ahead` versions old.
        first_rank: Runs the rollouts.
        publisher: What gives servers their weights again.
        sample: Samples a batch, on rank 0.
    """

    def __init__(
        self,
        config: RecipeConfig,
        first_rank: FirstRank,
        publisher: Publisher,
        sample: Sampling,
    ):
        self._config = config
        self._first_rank = first_rank
        self._publisher = publisher
        self._sample = sample
        self._running: deque[StepRollout] = deque()

    def take(self, progress: Progress) -> StepRollout:
        """Return the next step's rollout, once it has ended.

        Where the servers lost weights that are on no disk, these are published again, and what is
        not stored is sampled with them.

        Raises:
            Exception: What the rollout raised, on rank 0.
        """
        self._fill(progress, max(1, self._config.rollout.ahead))
        rollout = self._running.popleft()
        while self._publisher.has_lost_weights(rollout.pending.wait()):
            self._publisher.publish_again(rollout.num_published)
            rollout = self._begin(
                rollout.step, rollout.first_prompt, rollout.folder, rollout.number + 1
            )
        return rollout

    def refill(self, progress: Progress) -> None:
        """Begin rollouts of steps after `progress`, as many as may run while a step is trained."""
        self._fill(progress, self._config.rollout.ahead)

    def await_ends(self) -> None:
        """Return once all rollouts have ended; one that failed raises where it is taken."""
        for rollout in self._running:
            rollout.pending.await_end()

    def _fill(self, progress: Progress, count: int) -> None:
        while len(self._running) < count:
            num_steps = len(self._running)
            step = progress.step + 1 + num_steps
            if step > self._config.run.steps:
                return
            start = progress.prompts_consumed + num_steps * self._config.data.prompts_per_step
            folder = self._first_rank.new_folder(f"step_{step:06d}")
            self._running.append(self._begin(step, start, folder, 0))

    def _begin(self, step: int, first_prompt: int, folder: Path, number: int) -> StepRollout:
        name, work = f"sampled_{step}_{number}", self._publisher.guarded(self._sample)
        pending = self._first_rank.begin(name, work, step, first_prompt, folder)
        return StepRollout(
            step=step,
            first_prompt=first_prompt,
            folder=folder,
            number=number,
            num_published=self._publisher.num_published,
            pending=pending,
        )
