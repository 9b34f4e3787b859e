"""KL terms: estimators from sampled tokens, and the expected gradient of each.

Samples come from mu. d = log(pi_theta / other) per token. The table says what the expected gradient
of the term is when it stands in the loss (tests/test_objectives_kl.py proves each row by
enumerating a vocabulary):

| direction | ratio | k1 | k2 | k3 |
| --- | --- | --- | --- | --- |
| reverse, mu = pi_theta | none | 0 | R | F |
| reverse | none | not a KL's | not a KL's | not a KL's |
| reverse | stopped | 0 | R | F |
| reverse | graph | R, noisy | not a KL's | R |
| forward, other = mu | none | F | not a KL's | F |
| forward | stopped or graph | F | not a KL's | F |

R is the gradient of KL(pi_theta || other), F that of KL(other || pi_theta).

The first row holds in the first mini-step of equal engines only; afterwards it is the second.
`k3+` has k3's value and k2's gradient. As values, k1 and k3 with the right ratio are unbiased and
k2 is not. DeepSeek-V3.2 (2512.02556 equation 7) is reverse, graph, k3, against ref.
"""

from __future__ import annotations

import torch

from .parameters import Parameters
from .tokens import MAX_LOG_RATIO, Tokens


def kl_term(tokens: Tokens, p: Parameters) -> torch.Tensor:
    """Return one value per token of the KL between pi_theta and `p.kl_reference`."""
    theta_T = tokens.log_theta_T
    other_T = tokens.need(f"logp_{p.kl_reference}_T")
    # A token without a score of the other policy contributes a KL of zero.
    known_T = tokens.counted_T & torch.isfinite(other_T)
    other_T = torch.where(known_T, other_T, theta_T.detach())
    theta_T = torch.where(known_T, theta_T, theta_T.detach())
    first_T, second_T = (theta_T, other_T) if p.kl_direction == "reverse" else (other_T, theta_T)
    log_ratio_T = first_T - second_T
    value_T = estimate(log_ratio_T, p.kl_estimator)
    if p.kl_ratio == "none":
        return value_T
    ratio_T = (first_T - tokens.log_mu_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return (ratio_T if p.kl_ratio == "graph" else ratio_T.detach()) * value_T


def estimate(log_ratio_T: torch.Tensor, estimator: str) -> torch.Tensor:
    """Estimate KL(q || p) from one sample of q per token, log_ratio = log(q / p).

    k1 = log(q/p); k2 = log(q/p)^2 / 2; k3 = p/q - 1 - log(p/q); `k3+` = value of k3 with the
    gradient of k2.

    Source: joschu.net/blog/kl-approx.html; `k3+` as verl's straight-through form.
    """
    log_ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return log_ratio_T
    k2_T = 0.5 * log_ratio_T**2
    if estimator == "k2":
        return k2_T
    k3_T = torch.expm1(-log_ratio_T) + log_ratio_T
    if estimator == "k3":
        return k3_T
    return k2_T + (k3_T - k2_T).detach()


def reward_penalty(
    logp_sampled_T: torch.Tensor,
    logp_ref_T: torch.Tensor,
    mask_T: torch.Tensor,
    sequence_T: torch.Tensor,
    num_sequences: int,
    *,
    coefficient: float,
    estimator: str = "k1",
) -> torch.Tensor:
    """Return the KL in the reward: -coefficient * sum over the tokens, added before advantages.

    With k1 the policy gradient of the penalised reward is that of the sequence KL, unbiased; k3 in
    the reward is known to collapse (A Comedy of Estimators, 2512.21852). Detached: it is part of
    the reward.

    Args:
        logp_sampled_T: Log-probs of the policy that sampled: pi_old, or mu.
        logp_ref_T: The frozen reference's.
    """
    log_ratio_T = torch.where(mask_T, (logp_sampled_T - logp_ref_T).detach(), 0.0)
    sums_S = log_ratio_T.new_zeros(num_sequences)
    return -coefficient * sums_S.index_add(0, sequence_T, estimate(log_ratio_T, estimator))
