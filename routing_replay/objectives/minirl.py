"""MiniRL, with switches for the parts that its paper removes one at a time (2512.01374)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .parameters import Parameters, advantage, aggregation, eps_high, eps_low, parameter
from .registry import objective
from .surrogate import Surrogate, trust_region, weighted_log_prob
from .tokens import Tokens

_PAPER = "MiniRL (2512.01374)"
WEIGHTS = {"w": "min(w, cap)", "decoupled": "min(m, cap) * r", "r": "min(r, cap)"}


def _listed(choices: dict[str, str]) -> str:
    return "; ".join(f"{name}: {formula}" for name, formula in choices.items())


@dataclass(frozen=True, kw_only=True)
class MiniRL(Parameters):
    has_m: ClassVar[bool] = True
    aggregation: str = aggregation("seq-mean-token-sum", "equation 7; the divisor is implied")
    advantage: str = advantage("group-mean", _PAPER)
    eps_low: float = eps_low(0.2, _PAPER)
    eps_high: float = eps_high(0.27, _PAPER)
    cap: float = parameter(5.0, "truncation C of the importance weight", source=_PAPER, above=0)
    weight: str = parameter(
        "w", "importance weight: " + _listed(WEIGHTS), source=_PAPER, choices=WEIGHTS
    )
    masked: bool = parameter(True, "tokens with r outside the region are masked", source=_PAPER)

    @property
    def needs_mu(self) -> bool:
        """Whether m is in the weight, or bounded."""
        return self.weight != "r" or self.has_bound_of_m


@objective(MiniRL)
def minirl(tokens: Tokens, p: MiniRL) -> Surrogate:
    """REINFORCE per token, weighted by pi_theta / mu, masked where pi_theta is far from pi_old.

    Equation: sum over tokens of M * sg[min(w, cap)] * A * log pi_theta;
        M = 0 where (A > 0 and r > 1 + eps_high) or (A < 0 and r < 1 - eps_low), else 1. `weight`
        replaces min(w, cap); masked=false sets M = 1.
    Reference: MiniRL (2512.01374) equation 7, truncation read literally.
    Use: The default. With R3 or R2 once a batch is split into several mini-batches; alone
        on-policy.
    Pitfalls: The loss value means nothing, only its gradient. In the paper length normalisation
        costs reward and leaving out m collapses the run. DPPO's authors call the mask on r
        misspecified: it does not see m.
    """
    r_T = tokens.log_r_T.exp()
    kept_T = torch.ones_like(tokens.inputs.mask_T)
    if p.masked:
        kept_T = trust_region(tokens.advantages_T, r_T, p.eps_low, p.eps_high)
    return weighted_log_prob(tokens, _weight(tokens, p, r_T), kept_T)


def _weight(tokens: Tokens, p: MiniRL, r_T: torch.Tensor) -> torch.Tensor:
    match p.weight:
        case "w":
            return tokens.log_w_T.exp().clamp(max=p.cap)
        case "decoupled":
            return tokens.log_m_T.exp().clamp(max=p.cap) * r_T
    return r_T.clamp(max=p.cap)
