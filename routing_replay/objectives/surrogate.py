"""A method's policy term, and the two forms that most methods share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """A method's policy term, to be maximised.

    Args:
        value_T: Differentiable; its gradient is the method's, its value may mean nothing.
        kept_T: bool; the token has a gradient.
        weight_T: The factor of A * grad log pi_theta of a kept token; detached, for metrics.
    """

    value_T: torch.Tensor
    kept_T: torch.Tensor
    weight_T: torch.Tensor


def weighted_log_prob(tokens: Tokens, weight_T: torch.Tensor, kept_T: torch.Tensor) -> Surrogate:
    """Return kept * sg[weight] * A * log pi_theta."""
    weight_T = weight_T.detach()
    value_T = torch.where(kept_T, weight_T, 0.0) * tokens.advantages_T * tokens.log_theta_T
    return Surrogate(value_T=value_T, kept_T=kept_T, weight_T=weight_T)


def trust_region(
    advantages_T: torch.Tensor, ratio_T: torch.Tensor, low: float | None, high: float | None
) -> torch.Tensor:
    """Return where PPO's clip leaves a gradient; bool [T]. A ratio on the border is inside."""
    outside_T = torch.zeros_like(advantages_T, dtype=torch.bool)
    if high is not None:
        outside_T = outside_T | ((advantages_T > 0) & (ratio_T > 1 + high))
    if low is not None:
        outside_T = outside_T | ((advantages_T < 0) & (ratio_T < 1 - low))
    return ~outside_T


def clipped(tokens: Tokens, ratio_T: torch.Tensor, low: float | None, high: float) -> Surrogate:
    """Return min(ratio * A, clip(ratio, 1 - low, 1 + high) * A): PPO's form on any ratio."""
    advantages_T = tokens.advantages_T
    lowest = None if low is None else 1 - low
    bounded_T = ratio_T.clamp(min=lowest, max=1 + high)
    return Surrogate(
        value_T=torch.minimum(ratio_T * advantages_T, bounded_T * advantages_T),
        kept_T=trust_region(advantages_T, ratio_T.detach(), low, high),
        weight_T=ratio_T.detach(),
    )
