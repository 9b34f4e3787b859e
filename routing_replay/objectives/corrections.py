"""Weights and masks on the policy term of any surrogate, against the engines' discrepancy.

None of them has a gradient, and none changes a denominator. They act on m = pi_old / mu, except
DeepSeek-V3.2's off-policy mask, which uses pi_theta as well.
"""

from __future__ import annotations

import torch

from .parameters import Parameters
from .tokens import MAX_LOG_RATIO, Tokens


def weight(tokens: Tokens, p: Parameters) -> torch.Tensor:
    """Return the factor of each token's policy term: one of CORRECTIONS, cap = `correction_cap`.

    Truncated (TIS, Yao et al. 2025): min(m, cap). Masked (MIS, richardli.xyz/rl-collapse): m or 0.
    """
    if p.correction == "none":
        return torch.ones_like(tokens.log_m_T)
    form, level = p.correction.split("-")
    ratio_T = importance(tokens, level)
    if form == "tis":
        return ratio_T.clamp(max=p.correction_cap)
    return torch.where(ratio_T <= p.correction_cap, ratio_T, torch.zeros_like(ratio_T))


def importance(tokens: Tokens, level: str) -> torch.Tensor:
    """Return m per token, or its product (`sequence`) or `geometric` mean over the sequence."""
    if level == "token":
        return tokens.log_m_T.exp()
    combine = tokens.sum_S if level == "sequence" else tokens.mean_S
    log_S = combine(tokens.log_m_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return tokens.spread(log_S).exp()


def keep(tokens: Tokens, p: Parameters) -> torch.Tensor:
    """Return which tokens neither a mask of the parameters nor the caller's `keep_T` drops."""
    kept_T = torch.ones_like(tokens.inputs.mask_T)
    if tokens.inputs.keep_T is not None:
        kept_T = kept_T & tokens.inputs.keep_T
    if p.geometric_low is not None or p.geometric_high is not None:
        kept_T = kept_T & geometric_mask(tokens, p.geometric_low, p.geometric_high)
    if p.sequence_k3_max is not None:
        kept_T = kept_T & k3_mask(tokens, p.sequence_k3_max)
    if p.veto_below is not None:
        kept_T = kept_T & veto_mask(tokens, p.veto_below)
    if p.off_policy_delta is not None:
        kept_T = kept_T & off_policy_mask(tokens, p.off_policy_delta, p.off_policy_anchor)
    return kept_T


def geometric_mask(tokens: Tokens, low: float | None, high: float | None) -> torch.Tensor:
    """Keep a sequence iff low <= (product of m)^(1/T) <= high (richardli.xyz/rl-collapse)."""
    ratio_T = importance(tokens, "geometric")
    kept_T = torch.ones_like(tokens.inputs.mask_T)
    if low is not None:
        kept_T = kept_T & (ratio_T >= low)
    if high is not None:
        kept_T = kept_T & (ratio_T <= high)
    return kept_T


def k3_mask(tokens: Tokens, highest: float) -> torch.Tensor:
    """Keep a sequence iff its mean of m - 1 - log m, estimating KL(mu || pi_old), is low enough."""
    k3_T = tokens.log_m_T.expm1() - tokens.log_m_T
    return tokens.spread(tokens.mean_S(k3_T)) <= highest


def veto_mask(tokens: Tokens, lowest: float) -> torch.Tensor:
    """Drop a whole sequence if any of its tokens has m < lowest."""
    # A count instead of a minimum: sums are what context-parallel ranks share.
    vetoed_T = (tokens.log_m_T.exp() < lowest).to(tokens.log_m_T.dtype)
    return tokens.spread(tokens.sum_S(vetoed_T)) == 0


def off_policy_mask(tokens: Tokens, delta: float, anchor: str) -> torch.Tensor:
    """Drop where A < 0 and the sequence's mean of log(anchor / pi_theta) is above delta.

    The paper's anchor is the inference engine's log-prob (`mu`); the KL term is not masked. Its
    delta is not published. Implementations that take the trainer's `old` measure staleness without
    discrepancy.

    Source: 2512.02556 equations 8 and 9.
    """
    log_ratio_T = (tokens.log_w_T if anchor == "mu" else tokens.log_r_T).detach()
    far_T = tokens.spread(-tokens.mean_S(log_ratio_T)) > delta
    return ~(far_T & (tokens.advantages_T < 0))
