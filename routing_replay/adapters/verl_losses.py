"""Our objectives in verl's registry: `actor.policy_loss.loss_mode=routing_replay/minirl`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..objectives import Denominators
from . import losses
from .losses import PaddedResponses, objective_of, padded_loss


def register(core_algos: Any) -> None:
    """Register our objectives in the module `verl.trainer.ppo.core_algos`."""
    losses.register(core_algos, PolicyLoss)


class PolicyLoss:
    """An objective as verl calls its policy losses.

    verl's settings replace the method's: `loss_agg_mode`, `clip_ratio_low`, `clip_ratio_high`.

    Args:
        name: Of the objective.
    """

    def __init__(self, name: str):
        self.name = name

    def __call__(
        self,
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss that verl would aggregate, and numbers for its logger.

        `rollout_is_weights` is m: `rollout_correction.rollout_is=token` with a threshold that
        truncates nothing. verl's gradient reduction averages over data-parallel ranks; the factor
        `dp_size` makes a sum of it.
        """
        step: Mapping[str, Any] = config.global_batch_info
        is_sum = loss_agg_mode == "token-sum"  # a mean over one token, to us
        objective = objective_of(
            self.name,
            aggregation="token-mean" if is_sum else loss_agg_mode,
            eps_low=_first(config.clip_ratio_low, config.clip_ratio),
            eps_high=_first(config.clip_ratio_high, config.clip_ratio),
        )
        num_tokens = _first(step.get("batch_num_tokens"), response_mask.sum())
        denominators = Denominators(
            num_sequences=int(_first(step.get("global_batch_size"), len(response_mask))),
            num_tokens=1 if is_sum else int(num_tokens),
            max_length=int(_first(step.get("loss_scale_factor"), response_mask.shape[1])),
        )
        mu = None if rollout_is_weights is None else old_log_prob - rollout_is_weights.log()
        responses = PaddedResponses(
            logp_theta_BR=log_prob,
            logp_old_BR=old_log_prob,
            logp_mu_BR=mu,
            advantages_BR=advantages,
            mask_BR=response_mask,
        )
        loss, metrics = padded_loss(objective, responses, denominators)
        return loss * step.get("dp_size", 1), metrics


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
