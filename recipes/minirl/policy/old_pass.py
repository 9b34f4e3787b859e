"""The passes over a step before its updates: what is scored under which routes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from routing_replay.megatron import Recording
from routing_replay.metrics.load import expert_load
from routing_replay.metrics.typed import Metric
from routing_replay.metrics.version_lag import with_lag
from routing_replay.routes.step_routes import StepRoutes

from ..job.journal import Clock
from ..rollout.batch import Batch
from .policy import Policy
from .scoring import Scores, mean_scores


@dataclass(frozen=True, kw_only=True)
class OldPass:
    """Results of the old policy's pass that the updates need.

    Args:
        scores: log pi_old.
        table: The routes that the updates replay; None if they route live.
    """

    scores: Scores
    table: StepRoutes | None


@dataclass(frozen=True, kw_only=True)
class StepScores:
    """What a step's passes before its updates found.

    Args:
        old: Of pi_old.
        live: Its scores without replay, if this step measures what replay changes.
        reference: Of the reference policy, if there is one.
        metrics: Of all passes, over all ranks.
    """

    old: OldPass
    live: Scores | None
    reference: Scores | None
    metrics: dict[str, Metric]


def score_batch(
    policy: Policy, clock: Clock, batch: Batch, table: StepRoutes | None, measures_live: bool
) -> StepScores:
    """Score a step's batch with pi_old, without replay if asked, and with the reference."""
    with clock("old log-probs"):
        old = averaged(policy, batch, score_old(policy, batch, table))
        metrics = policy.reduce(policy.discrepancy(batch, old.scores))
        if table is not None:
            # Over all rows, so of none newer than the name tells.
            lag = int(batch.lag_N(policy.weight_version)[batch.mask_N].max())
            metrics |= with_lag(policy.replay.metrics(), lag)
        if old.table is not None:
            metrics |= expert_load(old.table, device=policy.sharding.device)
    live = reference = None
    if measures_live:
        with clock("live log-probs"):
            live = score_live(policy, batch, old.scores)
            metrics |= policy.reduce(policy.discrepancy(batch, live, "_live"))
    if policy.reference is not None:
        with clock("reference log-probs"):
            reference = policy.score_reference(batch)
    return StepScores(old=old, live=live, reference=reference, metrics=metrics)


def score_old(policy: Policy, batch: Batch, table: StepRoutes | None) -> OldPass:
    """Score with pi_old in the configured mode; decide what the updates replay."""
    match policy.config.replay.mode:
        case "R3":
            assert table is not None
            with (
                replaying(policy, table, policy.planned_counts()),
                policy.remembering_routers(table.num_rows),
            ):
                scores = policy.score(batch, table)
            return OldPass(scores=scores, table=table)
        case "R2":
            scores, recorded = score_and_record(policy, batch)
            # An update shards the batch as this pass did.
            table = recorded.own_table(policy.weight_version)
            return OldPass(scores=scores, table=table)
        case "disabled" if policy.router_shift is not None:
            scores, _ = score_and_record(policy, batch)
        case "disabled":
            scores = policy.score(batch, None)
        case mode:
            raise AssertionError(f"the mode {mode!r} is not resolved")
    return OldPass(scores=scores, table=None)


def averaged(policy: Policy, batch: Batch, old: OldPass) -> OldPass:
    """Return the mean of `logprob_passes` passes under the old pass's routes, itself among them."""
    passes = [old.scores]
    for _ in range(policy.config.training.logprob_passes - 1):
        with replaying(policy, old.table):
            passes.append(policy.score(batch, old.table))
    return replace(old, scores=mean_scores(passes)) if len(passes) > 1 else old


def score_live(policy: Policy, batch: Batch, old: Scores) -> Scores:
    """Return pi_old's scores without replay; except in R3 its own pass has already routed live."""
    if policy.config.replay.mode != "R3":
        return old
    return policy.score(batch, None)


def score_replayed(policy: Policy, batch: Batch, old: OldPass) -> Scores:
    """Score with the routes of the updates, for BuPO's pi_old of an inner layer."""
    with replaying(policy, old.table):
        return policy.score(batch, old.table)


def score_and_record(policy: Policy, batch: Batch) -> tuple[Scores, Recording]:
    """Score under live routing and record it."""
    with (
        policy.replay.recording(batch.lengths_S.numpy()) as recorded,
        policy.remembering_routers(recorded.num_rows),
    ):
        old = policy.score(batch, recorded)
    return old, recorded


def replaying(
    policy: Policy, table: StepRoutes | None, counts: Mapping[str, Any] | None = None
) -> contextlib.AbstractContextManager[object]:
    """Open the scope of a pass that replays a table, if there is one.

    Ages of routes (`soft_decay`) count from the trained weights: the table's newest may be older.
    """
    if table is None:
        return contextlib.nullcontext()
    version = policy.weight_version
    return policy.replay.replaying(table, weight_version=version, **(counts or {}))
