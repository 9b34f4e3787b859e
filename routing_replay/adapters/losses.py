"""Our objectives in a framework's registry of policy losses: padded responses in, one loss out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ObjectiveError
from ..metrics.typed import to_floats
from ..objectives import Denominators, LossInputs, Objective, get, names
from .patches import require_parameters

PREFIX = "routing_replay/"


@dataclass(frozen=True, kw_only=True)
class PaddedResponses:
    """The responses of a microbatch, padded on any side: B responses of at most R tokens.

    Args:
        logp_theta_BR: log pi_theta, with gradient.
        logp_old_BR: log pi_old.
        logp_mu_BR: log mu; None if the framework did not pass it on.
        advantages_BR: The framework's advantages.
        mask_BR: Tokens that count, bool or 0/1.
    """

    logp_theta_BR: torch.Tensor
    logp_old_BR: torch.Tensor
    logp_mu_BR: torch.Tensor | None
    advantages_BR: torch.Tensor
    mask_BR: torch.Tensor


def register(registry: Any, loss_of: Callable[[str], Callable[..., Any]]) -> None:
    """Register every objective that needs nothing beyond log-probs, advantages and a mask.

    Args:
        registry: A framework's module with a decorator `register_policy_loss(name)`.
        loss_of: Return an objective, given its name, as the framework calls its losses.
    """
    decorator = registry.register_policy_loss
    require_parameters(decorator, ("name",), f"{registry.__name__}.register_policy_loss")
    for name in names():
        if not get(name).needs:
            decorator(PREFIX + name)(loss_of(name))


def objective_of(name: str, **parameters: Any) -> Objective:
    """Return an objective; parameters that its method does not have are left out."""
    known = vars(get(name).parameters)
    return get(name, **{p: value for p, value in parameters.items() if p in known})


def padded_loss(
    objective: Objective, responses: PaddedResponses, denominators: Denominators
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the microbatch's share of the step's loss, and its metrics that are finite numbers.

    Raises:
        ObjectiveError: The method weighs by m = pi_old / mu, and mu is not there.
    """
    mu_BR = responses.logp_mu_BR
    if mu_BR is None:
        if objective.parameters.needs_mu:
            raise ObjectiveError(
                f"the objective {objective.name} needs the rollout's log-probs",
                expected="log mu of each token",
                got="none",
                fix="Turn them on in the framework (docs/adopt), or use a method without m",
            )
        mu_BR = responses.logp_old_BR
    num_sequences, length = responses.logp_theta_BR.shape
    numbers_S = torch.arange(num_sequences, device=responses.logp_theta_BR.device)
    outputs = objective(
        LossInputs(
            logp_theta_T=responses.logp_theta_BR.flatten(),
            logp_old_T=responses.logp_old_BR.detach().flatten(),
            logp_mu_T=mu_BR.detach().flatten(),
            advantages_T=responses.advantages_BR.detach().flatten(),
            mask_T=responses.mask_BR.bool().flatten(),
            sequence_T=numbers_S.repeat_interleave(length),
            num_sequences=num_sequences,
            denominators=denominators,
        )
    )
    values = to_floats(outputs.metrics)
    numbers = {name: value for name, value in values.items() if isinstance(value, float)}
    return outputs.loss, {name: v for name, v in numbers.items() if math.isfinite(v)}
