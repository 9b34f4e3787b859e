"""`plan`: packing and placement of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..errors import ConfigError, unknown_name
from ..routes.step_routes import StepRoutes
from . import packing as packings
from .budget import Budget
from .cost import CostModel
from .layout import PlanLayout
from .loads import StepLoads
from .packing import Packing
from .placement import Placement, swapped
from .prediction import Prediction, lower_bound_L

Kind = Literal["none", "packing", "placement", "both"]
KINDS = ("none", "packing", "placement", "both")
# Parts of a step that placement tells apart; more are added up in groups of neighbours.
MOST_PARTS = 8


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a plan may change, and what bounds it.

    Args:
        minibatch_size: Sequences of an optimizer step, over all ranks: which ones is fixed. 0: all.
        budget: What fits into a microbatch of one data-parallel rank.
        kind: none (natural order is predicted), packing, placement, both.
        cost: Seconds by load.
        placement: Where the experts lie now; Megatron's order if None.
        natural: The packing without a plan; if None, the first bin in which each sequence fits, in
            the order of the step.
        move_s: Seconds to move one expert with its optimizer state, in the unit of `cost`.
        horizon: Steps for which a placement is expected to stay.
        rounds: Exchanges that packing tries for each sequence.
        seed: Of these.

    Raises:
        ConfigError: An unknown kind, or numbers out of range.
    """

    minibatch_size: int = 0
    budget: Budget = field(default_factory=lambda: Budget(microbatches=1))
    kind: Kind = "both"
    cost: CostModel = field(default_factory=CostModel)
    placement: Placement | None = None
    natural: Packing | None = None
    move_s: float = 0.0
    horizon: int = 1
    rounds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("kind of plan", self.kind, KINDS)
        numbers = (self.minibatch_size, self.move_s, self.rounds, self.horizon - 1)
        if min(numbers) < 0:
            raise ConfigError(
                "an option of the plan is out of range",
                expected="minibatch_size, move_s and rounds >= 0, horizon >= 1",
                got=self,
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """A planned step.

    Args:
        packing: Sequences to data-parallel ranks and microbatches.
        placement: Experts to expert-parallel ranks.
        prediction: Of both together.
        natural: Without a plan: natural order, Megatron's own placement.
        seconds: The cost of the planned step.
        natural_seconds: The cost without a plan.
        num_moves: Experts that change their rank before the step.
        lower_bound_L: Peak over mean that nothing can go below.
        num_unknown: Tokens without routes, counted as their layer's average.
        counts_SLE: The exact counts that the plan was made of.
    """

    packing: Packing
    placement: Placement
    prediction: Prediction
    natural: Prediction
    seconds: float
    natural_seconds: float
    num_moves: int
    lower_bound_L: np.ndarray
    num_unknown: int
    counts_SLE: np.ndarray

    def dispatch(self, group: int, minibatches: Sequence[int] | None = None) -> np.ndarray:
        """Return `packing.dispatch` of the step's counts: what `replaying(dispatch=)` compares."""
        return self.packing.dispatch(self.counts_SLE, group, minibatches)

    def sizes(self, group: int, minibatches: Sequence[int] | None = None) -> np.ndarray:
        """Return `packing.sizes` of the step's counts: what `replaying(sizes=)` takes."""
        return self.packing.sizes(self.counts_SLE, group, minibatches)


def plan(
    routes: StepRoutes | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    layout: PlanLayout,
    options: PlanOptions | None = None,
    *,
    top_k: int | None = None,
) -> StepPlan:
    """Plan a step whose routes are known.

    Args:
        routes: The step's table, or its counts (`table.expert_counts()`), of all its sequences.
        lengths: Tokens of each sequence, prompt and response; the last one is not fed.
        layout: The trainer's parallel sizes.
        options: What may change.
        top_k: Of the model; needed beside counts.

    Returns:
        The plan: the same for the same arguments, on every rank and machine.

    Raises:
        ConfigError: A layout that the batch does not fit, a budget below the longest sequence.
        TableError: Routes of other sequences.
    """
    options = options or PlanOptions()
    loads = StepLoads.of(routes, np.asarray(lengths), top_k)
    natural_placement = Placement.natural(loads.num_layers, loads.num_experts, layout.expert)
    natural_packing = options.natural or _natural_packing(loads, layout, options)
    placement, current = options.placement or natural_placement, options.placement
    if current is not None and current.num_ranks != layout.expert:
        raise ConfigError(
            "the placement is of another number of ranks",
            expected=layout.expert,
            got=current.num_ranks,
        )
    packing = natural_packing
    if options.kind in ("placement", "both"):
        placement = _placed(loads, packing, placement, options)
    natural_RSL, loads_RSL = loads.by_rank(natural_placement, placement)
    if options.kind in ("packing", "both"):
        packing = _packed(loads, loads_RSL, layout, options)
    natural = Prediction.of(loads, natural_packing, natural_RSL, options.cost)
    planned = Prediction.of(loads, packing, loads_RSL, options.cost)
    return StepPlan(
        packing=packing,
        placement=placement,
        prediction=planned,
        natural=natural,
        seconds=options.cost.seconds(planned.features),
        natural_seconds=options.cost.seconds(natural.features),
        num_moves=placement.num_moves(current or natural_placement),
        lower_bound_L=lower_bound_L(loads, layout.expert),
        num_unknown=loads.num_unknown,
        counts_SLE=loads.counts_SLE,
    )


def minibatches(num_sequences: int, size: int) -> list[np.ndarray]:
    """Return the sequences of each minibatch.

    Raises:
        ConfigError: A size that does not divide the step.
    """
    size = size or num_sequences
    if not num_sequences or num_sequences % size:
        raise ConfigError(
            "the minibatches do not divide the step",
            expected=f"a divisor of {num_sequences} sequences",
            got=size,
        )
    return list(np.arange(num_sequences).reshape(-1, size))


def _natural_packing(loads: StepLoads, layout: PlanLayout, options: PlanOptions) -> Packing:
    options.budget.check(loads.lengths_S)
    bins = []
    for sequences in minibatches(len(loads.lengths_S), options.minibatch_size):
        own = np.arange(len(sequences))
        found = packings.in_order(loads.lengths_S[sequences], own, options.budget, layout)
        bins.append(_renumbered(found, sequences, layout))
    return Packing(bins=tuple(bins), layout=layout)


def _packed(
    loads: StepLoads, loads_RSL: np.ndarray, layout: PlanLayout, options: PlanOptions
) -> Packing:
    bins = []
    for sequences in minibatches(len(loads.lengths_S), options.minibatch_size):
        found = packings.pack(
            loads_RSL[:, sequences],
            loads.lengths_S[sequences],
            options.budget,
            layout,
            options.cost,
            options.rounds,
            options.seed,
        )
        bins.append(_renumbered(found, sequences, layout))
    return Packing(bins=tuple(bins), layout=layout)


def _renumbered(
    bins: packings.Bins, sequences: np.ndarray, layout: PlanLayout
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return packings.deal([sequences[one].tolist() for one in bins], layout)


def _placed(
    loads: StepLoads, packing: Packing, start: Placement, options: PlanOptions
) -> Placement:
    if options.kind == "both":
        # Packing will even out the cells of a minibatch; it cannot change what a minibatch holds.
        parts = [np.sort(np.concatenate(ranks)) for ranks in map(_sequences_of, packing.bins)]
    else:
        numbers = range(packing.num_minibatches)
        parts = [np.array(cell) for number in numbers for cell in packing.cells(number)]
    loads_PLE = np.stack([loads.by_expert(sequences) for sequences in parts])
    count = min(len(parts), MOST_PARTS)
    parts_MLE = np.stack([part.sum(0) for part in np.array_split(loads_PLE, count)])
    least_gain = 2 * options.move_s / (options.horizon * max(options.cost.expert_s, 1e-30))
    # The sum first: the swaps of several parts at once end in worse places from far away.
    rough = swapped(parts_MLE.sum(0)[:, None], start, least_gain)
    return swapped(parts_MLE.swapaxes(0, 1), rough, least_gain)


def _sequences_of(ranks: tuple[tuple[tuple[int, ...], ...], ...]) -> list[tuple[int, ...]]:
    """All bins of a minibatch."""
    return [one for bins in ranks for one in bins]
