"""Our objectives in SkyRL's registry: `algorithm.policy_loss_type=routing_replay/minirl`."""

from __future__ import annotations

from typing import Any

import torch

from ..objectives import Denominators
from . import losses
from .losses import PaddedResponses, objective_of, padded_loss


def register(ppo_utils: Any) -> None:
    """Register our objectives in the module `skyrl.backends.skyrl_train.utils.ppo_utils`."""
    losses.register(ppo_utils, PolicyLoss)


class PolicyLoss:
    """An objective as SkyRL calls its policy losses: summed over tokens.

    SkyRL divides the advantages by what its `loss_reduction` says, before the loss sees them; its
    `eps_clip_low` and `eps_clip_high` replace the method's.

    Args:
        name: Of the objective.
    """

    def __init__(self, name: str):
        self.name = name

    def __call__(
        self,
        log_probs: torch.Tensor,
        old_log_probs: torch.Tensor,
        advantages: torch.Tensor,
        config: Any,
        loss_mask: torch.Tensor | None = None,
        rollout_logprobs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the sum that SkyRL adds up over microbatches, and numbers for its logger."""
        objective = objective_of(
            self.name,
            aggregation="token-mean",
            eps_low=config.eps_clip_low,
            eps_high=config.eps_clip_high,
        )
        responses = PaddedResponses(
            logp_theta_BR=log_probs,
            logp_old_BR=old_log_probs,
            logp_mu_BR=rollout_logprobs,
            advantages_BR=advantages,
            mask_BR=torch.ones_like(log_probs) if loss_mask is None else loss_mask > 0,
        )
        over = Denominators(num_sequences=1, num_tokens=1)
        return padded_loss(objective, responses, over)
