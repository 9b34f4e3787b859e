"""Methods with one weight per token and no clipped surrogate: REINFORCE, CISPO, SAPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .parameters import Parameters, advantage, aggregation, eps_high, eps_low, parameter
from .registry import objective
from .surrogate import Surrogate, weighted_log_prob
from .tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class ReinforceIS(Parameters):
    has_m: ClassVar[bool] = True
    aggregation: str = aggregation("seq-mean-token-sum", "MiniRL (2512.01374) equation 3")
    advantage: str = advantage("group-mean", "MiniRL (2512.01374)")
    cap: float | None = parameter(None, "truncation of w; none: no bound", above=0)


@dataclass(frozen=True, kw_only=True)
class CISPO(Parameters):
    aggregation: str = aggregation("token-mean", "CISPO (2506.13585) equation 4")
    eps_low: float | None = eps_low(None, "CISPO disables the lower bound")
    eps_high: float = eps_high(4.0, "ours, MiniRL's cap of 5; the paper tunes and prints none")


@dataclass(frozen=True, kw_only=True)
class SAPO(Parameters):
    tau_positive: float = parameter(
        1.0, "temperature of the gate where A > 0", source="SAPO (2511.20347)", above=0
    )
    tau_negative: float = parameter(
        1.05, "temperature of the gate where A <= 0", source="SAPO (2511.20347)", above=0
    )


@objective(ReinforceIS)
def reinforce_is(tokens: Tokens, p: ReinforceIS) -> Surrogate:
    """REINFORCE with the token's importance weight and nothing else: the first-order objective.

    Equation: sum over tokens of sg[min(w, cap)] * A * log pi_theta.
    Reference: MiniRL (2512.01374) equations 3 and 4, which it shows to be first-order right.
    Use: The unclipped end of every comparison.
    Pitfalls: The weight is unbounded by default; off-policy it diverges.
    """
    w_T = tokens.log_w_T.exp()
    w_T = w_T if p.cap is None else w_T.clamp(max=p.cap)
    return weighted_log_prob(tokens, w_T, torch.ones_like(tokens.inputs.mask_T))


@objective(CISPO)
def cispo(tokens: Tokens, p: CISPO) -> Surrogate:
    """REINFORCE with the clipped staleness ratio as its weight; no token ever loses its gradient.

    Equation: sg[clip(r, 1 - eps_low, 1 + eps_high)] * A * log pi_theta, mean over all tokens.
    Reference: CISPO, MiniMax-M1 (2506.13585) equation 4.
    Use: When clipping starves rare but decisive tokens of gradient.
    Pitfalls: No m, and eps_high is not published: tune it. Some stacks take 0.28, a far lower cap.
    """
    lowest = None if p.eps_low is None else 1 - p.eps_low
    weight_T = tokens.log_r_T.exp().clamp(min=lowest, max=1 + p.eps_high)
    return weighted_log_prob(tokens, weight_T, torch.ones_like(tokens.inputs.mask_T))


@objective(SAPO)
def sapo(tokens: Tokens, p: SAPO) -> Surrogate:
    """A smooth gate on r in place of the clip, narrower for negative advantages.

    Equation: (4 / tau) * sigmoid(tau * (r - 1)) * A, mean over each response; tau by the sign of A.
    Reference: SAPO (2511.20347).
    Use: Where clipping's all-or-nothing gradient is the trouble.
    Pitfalls: The gate's slope 4 s (1 - s) is 1 at r = 1 and never quite 0. No m.
    """
    r_T = tokens.log_r_T.exp()
    tau_T = torch.full_like(r_T, p.tau_negative)
    tau_T = tau_T.masked_fill(tokens.advantages_T > 0, p.tau_positive)
    gate_T = torch.sigmoid(tau_T * (r_T - 1))
    return Surrogate(
        value_T=4 / tau_T * gate_T * tokens.advantages_T,
        kept_T=torch.ones_like(tokens.inputs.mask_T),
        weight_T=(4 * gate_T * (1 - gate_T) * r_T).detach(),
    )
