"""Between a step and the servers: who samples, and how the routes reach the ranks that train them.

Weights go the other way by `publish.Publisher`, which is the same in both forms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..data.prompts import Prompt
from ..job.first_rank import FirstRank
from .groups import Group, StepFiles
from .sampling import Rollout


class Exchange(Protocol):
    """The rollout of a job as its trainer sees it; `LocalExchange`, or `RayExchange`."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        files: StepFiles | None = None,
        first: int = 0,
    ) -> list[Group]:
        """Sample groups, as `Rollout.sample` does; on rank 0, in any of its threads."""

    def fetch(self, folder: Path, names: Sequence[str]) -> None:
        """Bring the parts of routes that this rank needs into its node's folder; collective.

        Each comes to a node at most once.

        Raises:
            DataError: A node could not write them (on every rank).
        """

    def paused(self, mode: str) -> contextlib.AbstractContextManager[None]:
        """Within: no server samples, and weights may change; on rank 0."""

    def state(self) -> dict[str, float]:
        """Return metrics of the servers since this was last called; on rank 0."""


class LocalExchange:
    """Rank 0 samples from all servers; parts go from its disk to the nodes by the process group.

    Args:
        rollout: On rank 0; None elsewhere.
        first_rank: Sends the parts.
    """

    def __init__(self, rollout: Rollout | None, first_rank: FirstRank):
        self._rollout = rollout
        self._first_rank = first_rank

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        files: StepFiles | None = None,
        first: int = 0,
    ) -> list[Group]:
        assert self._rollout is not None
        return self._rollout.sample(prompts, num_samples, files, first)

    def fetch(self, folder: Path, names: Sequence[str]) -> None:
        self._first_rank.share_parts(folder, names)

    def paused(self, mode: str) -> contextlib.AbstractContextManager[None]:
        assert self._rollout is not None
        return self._rollout.client.paused(mode)

    def state(self) -> dict[str, float]:
        assert self._rollout is not None
        return self._rollout.state()
