"""From the verifier's rewards to advantages, once per step, when all log-probs are known."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from routing_replay.metrics.typed import Metric, masked_mean
from routing_replay.objectives import (
    advantages,
    differential_smoothing,
    overlong_penalty,
    reward_penalty,
)

from ..rollout.batch import Batch

if TYPE_CHECKING:  # Megatron takes many seconds to import, and nothing here runs it
    from .policy import Policy
from .scoring import Scores


def with_advantages(
    policy: Policy, batch: Batch, old: Scores, reference: Scores | None
) -> tuple[Batch, dict[str, Metric]]:
    """Return the batch with its advantages, and metrics of what changed the rewards.

    Collective over the last pipeline stage; earlier stages have no loss and need none.
    """
    if not policy.is_last_stage:
        return batch, {}
    o, metrics = policy.config.objective, {}
    rewards_S = batch.rewards_S.double()
    if o.overlong_cache:
        longest = policy.config.rollout.max_new_tokens
        penalty_S = overlong_penalty(batch.num_sampled_S, longest, o.overlong_cache)
        metrics["reward/overlong_penalty"] = _mean(penalty_S)
        rewards_S = rewards_S + penalty_S
    if o.reward_kl_coefficient:
        penalty_S = _kl_penalty(policy, batch, old, reference)
        metrics["reward/kl_penalty"] = _mean(penalty_S)
        rewards_S = rewards_S + penalty_S
    name = policy.config.make_objective().parameters.advantage
    advantages_S = advantages(name, rewards_S, batch.group_S)
    if o.smoothing_correct or o.smoothing_wrong:
        logp_N = policy.dense(old, batch).cpu().double()
        smoothed_S = differential_smoothing(
            advantages_S,
            batch.sums(torch.where(batch.mask_N, logp_N, 0.0)),
            batch.rewards_S > 0,
            gamma_correct=o.smoothing_correct,
            gamma_wrong=o.smoothing_wrong,
        )
        metrics["reward/smoothing"] = _mean(smoothed_S - advantages_S)
        advantages_S = smoothed_S
    return replace(batch, advantages_S=advantages_S.float()), metrics


def _kl_penalty(
    policy: Policy, batch: Batch, old: Scores, reference: Scores | None
) -> torch.Tensor:
    assert reference is not None
    o = policy.config.objective
    return reward_penalty(
        policy.dense(old, batch).cpu(),
        policy.dense(reference, batch).cpu(),
        batch.mask_N,
        batch.sequence_N,
        len(batch.lengths_S),
        coefficient=o.reward_kl_coefficient,
        estimator=o.reward_kl_estimator,
    )


def _mean(values_S: torch.Tensor) -> Metric:
    return masked_mean(values_S, torch.ones_like(values_S))
