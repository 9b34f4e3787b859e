"""The clipped surrogate of PPO and its descendants on the token ratio r = pi_theta / pi_old."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .parameters import Parameters, aggregation, eps_high, eps_low, parameter
from .registry import objective
from .surrogate import Surrogate, clipped
from .tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Clipped(Parameters):
    eps_low: float = eps_low(0.2, "PPO (1707.06347)")
    eps_high: float = eps_high(0.2, "PPO (1707.06347)")


@dataclass(frozen=True, kw_only=True)
class PPO(Clipped):
    aggregation: str = aggregation("token-mean", "verl")
    dual_clip: float | None = parameter(
        3.0, "where A < 0 the term is at least this times A; none: no bound", source="verl", above=1
    )


@dataclass(frozen=True, kw_only=True)
class DecoupledPPO(Clipped):
    has_m: ClassVar[bool] = True
    aggregation: str = aggregation("token-mean", "AReaL")
    cap: float | None = parameter(
        None, "truncation of m; none: as in the equation", source="equation", above=0
    )


@objective(PPO)
def ppo(tokens: Tokens, p: PPO) -> Surrogate:
    """PPO's clip, with the second bound for negative advantages (dual clip).

    Equation: min(r * A, clip(r, 1 - eps_low, 1 + eps_high) * A); where A < 0 additionally at least
        dual_clip * A.
    Reference: PPO (1707.06347) equation 7; dual clip: 1912.09729.
    Use: As the ancestor that others are compared with. The paper's advantages come from a value
        model (GAE), which nothing here trains: pass advantages_T of one in LossInputs.
    Pitfalls: It sees r only: m stays uncorrected unless `correction` is set. AReaL's examples use
        0.4 for eps where the paper has 0.2.
    """
    surrogate = clipped(tokens, tokens.log_r_T.exp(), p.eps_low, p.eps_high)
    if p.dual_clip is None:
        return surrogate
    negative_T = tokens.advantages_T < 0
    floor_T = p.dual_clip * tokens.advantages_T
    value_T = surrogate.value_T
    below_T = negative_T & (value_T.detach() < floor_T)
    return Surrogate(
        value_T=torch.where(below_T, floor_T, value_T),
        kept_T=surrogate.kept_T & ~below_T,
        weight_T=surrogate.weight_T,
    )


@objective(Clipped)
def grpo(tokens: Tokens, p: Clipped) -> Surrogate:
    """PPO's clip with advantages normalised in the group, mean over each response.

    Equation: mean over the response's tokens of min(r * A, clip(r, 1 - eps_low, 1 + eps_high) * A).
    Reference: GRPO (2402.03300) equation 3; add its KL with kl_coefficient (0.04 there).
    Use: The common baseline.
    Pitfalls: Length bias from 1/|y| and difficulty bias from the division by std (Dr.GRPO). No m.
    """
    return clipped(tokens, tokens.log_r_T.exp(), p.eps_low, p.eps_high)


@objective(DecoupledPPO)
def decoupled_ppo(tokens: Tokens, p: DecoupledPPO) -> Surrogate:
    """PPO's clip around a proximal policy, weighted from the behaviour policy to the proximal one.

    Equation: sg[m] * min(r * A, clip(r, 1 - eps_low, 1 + eps_high) * A), m = pi_old / mu.
    Reference: Batch-size invariance (2110.00641); AReaL (2505.24298).
    Use: Asynchronous training, where mu is older than pi_old.
    Pitfalls: m is not bounded by default. Without clipping it is the gradient of w * A.
    """
    m_T = tokens.log_m_T.exp().clamp(max=p.cap) if p.cap is not None else tokens.log_m_T.exp()
    surrogate = clipped(tokens, tokens.log_r_T.exp(), p.eps_low, p.eps_high)
    return Surrogate(
        value_T=m_T * surrogate.value_T,
        kept_T=surrogate.kept_T,
        weight_T=m_T * surrogate.weight_T,
    )
