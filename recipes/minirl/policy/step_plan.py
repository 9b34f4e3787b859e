"""A step planned by its routes: rank 0 plans, all ranks follow.

The plan is made of the counts in the index of the routes. Sequences change their microbatch and
their rank, never their minibatch; experts change their rank, never their number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from recipes.model.collective import on_every_rank
from routing_replay.balance import (
    Budget,
    Packing,
    Placement,
    PlanLayout,
    PlanOptions,
    Prediction,
    StepPlan,
    plan,
)
from routing_replay.metrics.typed import LayerValues, Value
from routing_replay.routes.step_routes import StepRoutes

from ..rollout.batch import Batch
from ..settings.sections import TrainingSettings
from .microbatches import Sharding

# Ranks whose loads become metrics of their own.
MOST_RANKS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedStep:
    """What every rank follows.

    Args:
        packing: Sequences of the microbatches of all ranks.
        placement: Of the experts.
        counts_SLE: Of the step's table.
        metrics: Of the prediction, on rank 0.
        is_whole: Every token that is fed has a route.
    """

    packing: Packing
    placement: Placement
    counts_SLE: np.ndarray
    metrics: dict[str, Value]
    is_whole: bool = False

    def counts(
        self, data_rank: int, minibatches: list[int] | None = None, has_sizes: bool = False
    ) -> dict[str, Any]:
        """Return what `replaying` is told of the tokens that a rank's experts get; empty: nothing.

        Args:
            data_rank: Of this rank.
            minibatches: Whose microbatches the scope runs; all if None.
            has_sizes: The dispatchers take sizes, where every token has a route.
        """
        layout = self.packing.layout
        if not layout.has_whole_sequences:
            return {}
        group = data_rank // layout.ranks_per_group
        if has_sizes and self.is_whole:
            return {"sizes": self.packing.sizes(self.counts_SLE, group, minibatches)}
        return {"dispatch": self.packing.dispatch(self.counts_SLE, group, minibatches)}


def plan_layout(t: TrainingSettings, world_size: int) -> PlanLayout:
    """Return the plan's view of the parallel layout.

    Raises:
        ConfigError: Groups of experts that do not hold whole data-parallel ranks.
    """
    model_ranks = t.tensor_parallel * t.pipeline_parallel * t.context_parallel
    return PlanLayout(
        data=max(1, world_size // model_ranks),
        expert=t.expert_parallel,
        tensor=t.tensor_parallel,
        context=t.context_parallel,
        pipeline=t.pipeline_parallel,
        virtual_pipeline=t.virtual_pipeline,
    )


def plan_step(
    t: TrainingSettings,
    sharding: Sharding,
    batch: Batch,
    table: StepRoutes,
    placement: Placement | None,
) -> PlannedStep:
    """Plan a step on rank 0 and share the plan; collective.

    Args:
        t: Says what may change.
        sharding: This rank's, without a plan.
        batch: All sequences.
        table: Their routes.
        placement: Where the experts lie; None if they never move.

    Raises:
        ConfigError: A batch that the layout does not fit (on every rank).
    """

    def planned() -> StepPlan | None:
        if torch.distributed.get_rank() > 0:
            return None
        return plan_alone(t, sharding, batch, table, placement)

    step = on_every_rank(planned)
    content: list[Any] = [None]
    if step is not None:
        # Padded sequences have positions that the plan does not count.
        is_whole = bool(t.microbatch_tokens) and not step.num_unknown
        content = [(step.packing, step.placement, is_whole)]
    torch.distributed.broadcast_object_list(content, src=0)
    packing, experts, is_whole = content[0]
    return PlannedStep(
        packing=packing,
        placement=experts,
        counts_SLE=table.expert_counts(),
        metrics={} if step is None else plan_metrics(step, table.shape.layers),
        is_whole=is_whole,
    )


def plan_metrics(step: StepPlan, layers: tuple[int, ...]) -> dict[str, Value]:
    """Describe a plan: loads per layer and rank with and without it, and what it predicts."""
    metrics: dict[str, Value] = {
        "routing_replay/plan_moved_experts": float(step.num_moves),
        "routing_replay/plan_unknown_tokens": float(step.num_unknown),
        "routing_replay/plan_predicted_cost": step.seconds / max(step.natural_seconds, 1e-30),
        "routing_replay/plan_lower_bound": _by_layer(layers, step.lower_bound_L, None),
    }
    for suffix, prediction in (("", step.prediction), ("_natural", step.natural)):
        metrics[f"routing_replay/ep_peak_over_mean{suffix}"] = _by_layer(
            layers, prediction.peak_over_mean_L, prediction.peak_over_mean
        )
        for rank, load_L in enumerate(_load_of_ranks(prediction)[:MOST_RANKS]):
            metrics[f"routing_replay/ep_load_rank_{rank}{suffix}"] = _by_layer(layers, load_L, None)
    return metrics


def _load_of_ranks(prediction: Prediction) -> np.ndarray:
    """Each rank's tokens over the mean rank's, [R, L]."""
    loads_LR = prediction.loads_CLR.sum(0)
    over_mean_RL: np.ndarray = (loads_LR / np.maximum(loads_LR.mean(1), 1e-30)[:, None]).T
    return over_mean_RL


def _by_layer(layers: tuple[int, ...], values_L: np.ndarray, mean: float | None) -> LayerValues:
    return LayerValues(mean=mean, layers=dict(zip(layers, values_L.tolist(), strict=True)))


def plan_alone(
    t: TrainingSettings,
    sharding: Sharding,
    batch: Batch,
    table: StepRoutes,
    placement: Placement | None,
) -> StepPlan:
    """Plan a step on this rank, without the others; arguments and errors as `plan_step`."""
    world_size = torch.distributed.get_world_size()
    layout = plan_layout(t, world_size)
    lengths_S = batch.lengths_S.numpy()
    if t.microbatch_tokens:
        # Each packed sequence is padded by itself: what is fed is known.
        lengths_S = np.array(sharding.padded_lengths(batch.lengths_S)) + 1
        budget = Budget(tokens=max(t.microbatch_tokens, int(lengths_S.max()) - 1))
    else:
        share = t.minibatch_size // layout.data
        size = min(t.microbatch_size, share)
        budget = Budget(sequences=size, microbatches=share // size)
    options = PlanOptions(
        minibatch_size=t.minibatch_size,
        budget=budget,
        kind=t.plan,  # type: ignore[arg-type]
        placement=placement,
        natural=_natural(sharding, batch, layout),
        move_s=float(t.placement_move_tokens),
        horizon=t.placement_horizon,
    )
    return plan(table, lengths_S, layout, options)


def _natural(sharding: Sharding, batch: Batch, layout: PlanLayout) -> Packing:
    """The microbatches that all ranks would run without a plan."""
    ranks = [replace(sharding, data_rank=rank) for rank in range(layout.data)]
    by_rank = [rank.plan(batch.lengths_S) for rank in ranks]
    minibatches = zip(*by_rank, strict=True)
    return Packing(bins=tuple(tuple(map(tuple, bins)) for bins in minibatches), layout=layout)
