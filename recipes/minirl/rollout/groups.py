"""Groups of samples as they end: their routes become parts on the disk, and leave the memory."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from routing_replay.config import ReplayConfig
from routing_replay.routes.origin import num_uncovered, require_few_uncovered
from routing_replay.routes.part_index import GroupParts, PartIndex, Stages
from routing_replay.routes.parts import write_parts
from routing_replay.routes.routes import Routes
from routing_replay.routes.shape import MoEShape

from ..settings.config import RecipeConfig
from .answers import StepAnswers
from .batch import Sample

# Of the routes; the parts lie beside it.
INDEX_FILE = "routes.safetensors"
# Data-parallel ranks share a group's responses, and each reads whole parts. Long responses have
# parts of their own, short ones few files: with 48 layers of 8 experts this is 1.6 MB of ids.
PART_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Group:
    """The responses to one prompt.

    Args:
        samples: With their routes, unless these are in parts.
        parts: What the index needs of their parts, in the order of the samples.
        uncovered: Rows without routes, by cause.
        num_stored: Responses that were found, not sampled.
    """

    samples: Sequence[Sample]
    parts: Sequence[GroupParts] = ()
    uncovered: Mapping[str, int] = field(default_factory=dict)
    num_stored: int = 0


@dataclass(frozen=True, kw_only=True)
class GroupWriter:
    """Writes the routes of a step's groups, each when it has ended. Several threads may do so.

    Args:
        folder: For the parts.
        shape: Of the whole model.
        stages: Layers of each pipeline stage.
        oldest_version: Rows of older weights route live.
        num_calls: Calls of a layer's routers that a group takes part in, in one pass.
        replay: What agreement samples.
        is_planned: The step is planned by its routes.
        prefix: Of the parts' names: those of several writers may come together.
    """

    folder: Path
    shape: MoEShape
    stages: Stages
    oldest_version: int | None
    num_calls: int
    replay: ReplayConfig
    is_planned: bool
    prefix: str = ""

    @classmethod
    def of(
        cls, config: RecipeConfig, step: int, folder: Path, shape: MoEShape, stages: Stages
    ) -> GroupWriter:
        """Return that of a step of a run."""
        # Tensor-parallel ranks route parts of a sequence, each on its own.
        ranks = config.training.tensor_parallel * config.training.context_parallel
        return cls(
            folder=folder,
            shape=shape,
            stages=stages,
            oldest_version=oldest_version(config, step),
            num_calls=config.data.samples_per_prompt * ranks,
            replay=config.replay,
            is_planned=config.training.plan != "none",
        )

    def write(self, number: int, samples: Sequence[Sample]) -> Group:
        """Write the parts of a group, and return it without its routes.

        Args:
            number: Of the group, within the step.
            samples: With their routes.

        Raises:
            TableError: The disk is full.
        """
        routes = replayed_routes(samples, self.oldest_version)
        keeps_gates = rows_with_gates(samples, self.num_calls, self.replay)
        name = f"{self.prefix}group_{number:06d}"
        parts = [
            write_parts(
                self.folder,
                f"{name}_{piece.start:03d}",
                routes[piece],
                self.stages,
                np.concatenate(keeps_gates[piece]),
                self.is_planned,
            )
            for piece in pieces([one.num_rows for one in routes], PART_ROWS)
        ]
        samples = [replace(sample, routes=None) for sample in samples]
        return Group(samples=samples, parts=parts, uncovered=num_uncovered(routes))

    def save_index(
        self, folder: Path, groups: Sequence[Group], max_uncovered: float
    ) -> dict[str, float]:
        """Write the index of the step; return the fractions of uncovered rows by cause.

        Raises:
            RoutesError: More than `max_uncovered` of the rows are not covered.
            TableError: The disk is full.
        """
        parts = [part for group in groups for part in group.parts]
        counts: Counter[str] = Counter()
        for group in groups:
            counts.update(group.uncovered)
        num_rows = sum(int(group.rows_S.sum()) for group in parts)
        where = "the rollout of a step"
        uncovered = require_few_uncovered(counts, num_rows, max_uncovered, where)
        index = PartIndex(shape=self.shape, stages=self.stages, groups=parts)
        index.save(folder / INDEX_FILE)
        return uncovered


@dataclass(frozen=True, kw_only=True)
class StepFiles:
    """Where the groups of a step go that is trained.

    Args:
        step: Its number: a server that has requests of several takes the earliest first.
        answers: For their responses; None: they are not stored.
        writer: Of their routes; None: they have none.
    """

    step: int = 0
    answers: StepAnswers | None = None
    writer: GroupWriter | None = None


def oldest_version(config: RecipeConfig, step: int) -> int | None:
    """Return the oldest weights whose routes a step replays; None: any.

    The step is trained from weights of version `step - 1`.
    """
    return step - 1 - config.max_version_lag if config.rollout.ahead else None


def replayed_routes(samples: Sequence[Sample], oldest_version: int | None) -> list[Routes]:
    """Return the routes that a step replays; rows of older weights route live."""
    routes = [sample.routes for sample in samples if sample.routes is not None]
    if oldest_version is None:
        return routes
    return [one.without_versions_before(oldest_version) for one in routes]


def pieces(rows: Sequence[int], fewest: int) -> list[slice]:
    """Return runs of responses with at least so many rows each, the last one excepted."""
    starts, num_rows = [0], 0
    for number, more in enumerate(rows):
        if num_rows >= fewest:
            starts.append(number)
            num_rows = 0
        num_rows += more
    return [slice(*bounds) for bounds in itertools.pairwise([*starts, len(rows)])]


def rows_with_gates(
    samples: Sequence[Sample], num_calls: int, replay: ReplayConfig
) -> list[np.ndarray]:
    """Return which rows of some samples keep their gates: a part of the response tokens.

    Agreement looks at `agreement_tokens` tokens of a router call. So many for each call have gates,
    evenly spaced over the samples.

    Args:
        samples: With their routes.
        num_calls: Calls of a layer's routers that the samples take part in, in one pass.
        replay: What agreement samples.

    Returns:
        bool over the rows of each sample.
    """
    responses = [
        sample.predicts_sampled_T[: sample.routes.num_rows]
        for sample in samples
        if sample.routes is not None
    ]
    is_response_T = np.concatenate(responses)
    rows_N = np.flatnonzero(is_response_T)
    num_compared = num_calls * replay.agreement_tokens or len(rows_N)
    every = max(1, len(rows_N) // max(1, num_compared))
    keeps_T = np.zeros_like(is_response_T)
    if replay.agreement_every:
        keeps_T[rows_N[::every]] = True
    return np.split(keeps_T, np.cumsum([len(one) for one in responses])[:-1])
