"""MiniRL, and MiniRL with one part taken away at a time. Source: arXiv 2512.01374."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .parameters import Parameters, advantage, aggregation, eps_high, eps_low, parameter
from .registry import objective
from .surrogate import Surrogate, trust_region, weighted_log_prob
from .tokens import Tokens

_PAPER = "MiniRL (2512.01374)"


@dataclass(frozen=True, kw_only=True)
class MiniRL(Parameters):
    has_m: ClassVar[bool] = True
    aggregation: str = aggregation("seq-mean-token-sum", "equation 7; the divisor is implied")
    advantage: str = advantage("group-mean", _PAPER)
    eps_low: float = eps_low(0.2, _PAPER)
    eps_high: float = eps_high(0.27, _PAPER)
    cap: float = parameter(5.0, "truncation C of the importance weight", source=_PAPER, above=0)


@dataclass(frozen=True, kw_only=True)
class MiniRLLengthNorm(MiniRL):
    aggregation: str = aggregation("seq-mean-token-mean", "the paper's ablation")


@objective(MiniRL)
def minirl(tokens: Tokens, p: MiniRL) -> Surrogate:
    """REINFORCE per token, weighted by pi_theta / mu, masked where pi_theta is far from pi_old.

    Equation: sum over tokens of M * sg[min(w, cap)] * A * log pi_theta;
        M = 0 where (A > 0 and r > 1 + eps_high) or (A < 0 and r < 1 - eps_low), else 1.
    Reference: MiniRL (2512.01374) equation 7, truncation read literally.
    Use: The default. With R3 or R2 once a batch is split into several mini-batches; alone
        on-policy.
    Pitfalls: The loss value means nothing, only its gradient. In the paper length normalisation
        costs reward and leaving out m collapses the run. DPPO's authors call the mask on r
        misspecified: it does not see m.
    """
    return weighted_log_prob(tokens, tokens.log_w_T.exp().clamp(max=p.cap), _inside(tokens, p))


@objective(MiniRL)
def minirl_decoupled(tokens: Tokens, p: MiniRL) -> Surrogate:
    """MiniRL with the truncation on the discrepancy alone, as the public stacks apply it.

    Equation: sum over tokens of M * sg[min(m, cap) * r] * A * log pi_theta; M as in minirl.
    Reference: MiniRL (2512.01374); truncation as slime, miles and verl place TIS.
    Use: To compare with runs of those stacks. Equal to minirl on-policy (r = 1).
    Pitfalls: The whole weight is not bounded: r is free where its sign of A is not masked.
    """
    weight_T = tokens.log_m_T.exp().clamp(max=p.cap) * tokens.log_r_T.exp()
    return weighted_log_prob(tokens, weight_T, _inside(tokens, p))


@objective(MiniRLLengthNorm)
def minirl_length_norm(tokens: Tokens, p: MiniRLLengthNorm) -> Surrogate:
    """Ablation: MiniRL divided by the length of each response.

    Equation: mean over the response's tokens, instead of the sum, of minirl's terms.
    Reference: MiniRL (2512.01374), ablation "length normalisation".
    Use: For study. Stable but lower in the paper.
    Pitfalls: No longer a first-order approximation of the sequence objective.
    """
    return minirl(tokens, p)


@objective(MiniRL)
def minirl_no_is(tokens: Tokens, p: MiniRL) -> Surrogate:
    """Ablation: MiniRL without the train-inference weight m.

    Equation: sum over tokens of M * sg[min(r, cap)] * A * log pi_theta; on-policy the weight is 1.
    Reference: MiniRL (2512.01374), ablation "without train-infer IS"; r off-policy is our reading.
    Use: For study of what the weight m does.
    Pitfalls: Collapses quickly in the paper, with replay too.
    """
    return weighted_log_prob(tokens, tokens.log_r_T.exp().clamp(max=p.cap), _inside(tokens, p))


@objective(MiniRL)
def minirl_no_clip(tokens: Tokens, p: MiniRL) -> Surrogate:
    """Ablation: MiniRL without the mask on r.

    Equation: sum over tokens of sg[min(w, cap)] * A * log pi_theta; eps_* have no effect.
    Reference: MiniRL (2512.01374), ablation "no clipping".
    Use: For study; the same as minirl on-policy.
    Pitfalls: Collapses early off-policy in the paper.
    """
    everywhere_T = torch.ones_like(tokens.inputs.mask_T)
    return weighted_log_prob(tokens, tokens.log_w_T.exp().clamp(max=p.cap), everywhere_T)


def _inside(tokens, p):
    return trust_region(tokens.advantages_T, tokens.log_r_T.exp(), p.eps_low, p.eps_high)
