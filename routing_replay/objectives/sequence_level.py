"""Methods whose ratio belongs to the sequence. Each token carries the value of its sequence, so
that the mean over tokens is the sequence's value once, however its tokens are split over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .parameters import Parameters, advantage, eps_high, eps_low, parameter
from .registry import objective
from .surrogate import Surrogate, clipped, trust_region
from .tokens import MAX_LOG_RATIO, Tokens

_GSPO = "GSPO (2507.18071)"
# The paper prints the clip range as (e^-0.4, e^0.4).
_GMPO = "GMPO (2507.20673)"


@dataclass(frozen=True, kw_only=True)
class SequenceIS(Parameters):
    has_m: ClassVar[bool] = True
    advantage: str = advantage("group-mean", "MiniRL (2512.01374)")
    cap: float | None = parameter(None, "truncation of the product of w; none: no bound", above=0)


@dataclass(frozen=True, kw_only=True)
class GSPO(Parameters):
    eps_low: float = eps_low(3e-4, _GSPO)
    eps_high: float = eps_high(4e-4, _GSPO)
    per_token: bool = parameter(
        False, "the gradient is each token's own: for advantages per token", source=_GSPO
    )


@dataclass(frozen=True, kw_only=True)
class GMPO(Parameters):
    log_low: float = parameter(0.4, "log r is clipped at -log_low", source=_GMPO, least=0)
    log_high: float = parameter(0.4, "log r is clipped at log_high", source=_GMPO, least=0)


@dataclass(frozen=True, kw_only=True)
class RSPO(GMPO):
    needs: ClassVar[frozenset[str]] = frozenset({"router_shift_T"})
    shift_min: float = parameter(
        0.8, "floor of the router-shift factor", source="a third party's code only", above=0
    )


@objective(SequenceIS)
def sequence_is(tokens: Tokens, p: SequenceIS) -> Surrogate:
    """The true objective: one importance weight for the whole response.

    Equation: (product over tokens of w) * A per response; with a cap, its gradient is zero beyond.
    Reference: MiniRL (2512.01374) section 2, the objective that token weights approximate.
    Use: For study, on short responses.
    Pitfalls: The product's variance grows exponentially with the length.
    """
    log_S = tokens.sum_S(tokens.log_w_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_T = tokens.spread(log_S.exp())
    bounded_T = ratio_T if p.cap is None else ratio_T.clamp(max=p.cap)
    return Surrogate(
        value_T=bounded_T * tokens.advantages_T,
        kept_T=bounded_T.detach() == ratio_T.detach(),
        weight_T=ratio_T.detach(),
    )


@objective(GSPO)
def gspo(tokens: Tokens, p: GSPO) -> Surrogate:
    """PPO's clip on the geometric mean of the response's token ratios.

    Equation: min(s * A, clip(s, 1 - eps_low, 1 + eps_high) * A) per response; s = (product of
        r)^(1/|y|); with per_token sg[s] * pi_theta / sg[pi_theta] in place of s.
    Reference: GSPO (2507.18071), sequence-level objective.
    Use: MoE models without replay: the mean over the response is less touched by routing noise.
    Pitfalls: Its clip range is a thousandth of PPO's; clips far more tokens (0.15 against 0.0013).
    """
    ratio_T = tokens.spread(tokens.mean_S(tokens.log_r_T).exp())
    if p.per_token:
        # A product, so that the value is bitwise that of the sequence: exp(0) = 1.
        ratio_T = ratio_T.detach() * (tokens.log_theta_T - tokens.log_theta_T.detach()).exp()
    return clipped(tokens, ratio_T, p.eps_low, p.eps_high)


@objective(GMPO)
def gmpo(tokens: Tokens, p: GMPO) -> Surrogate:
    """The geometric mean of token ratios, each clipped by itself and symmetrically in log space.

    Equation: A * exp(mean over tokens of a * min(a * log r, a * clip(log r, -log_low, log_high))),
        a = sign A.
    Reference: GMPO (2507.20673); verl's `geo_mean`.
    Use: Where token outliers dominate an arithmetic mean.
    Pitfalls: A clipped token still scales the gradient of the response's other tokens.
    """
    return _clipped_geometric(tokens, tokens.log_r_T, p)


@objective(RSPO)
def rspo(tokens: Tokens, p: RSPO) -> Surrogate:
    """GMPO whose token ratios shrink where the router has moved.

    Equation: gmpo with log r + log sg[max(gamma, shift_min)] in place of log r; gamma = exp(-mean
        over layers and the old policy's experts of |log router_theta - log router_old|).
    Reference: RSPO (2510.23027v2) abstract and equation 11: scaled before the clip.
    Use: Instead of replay, to compare with it.
    Pitfalls: Version 1 of the paper reads as scaling after the clip. With a gradient through gamma
        it collapses. Under replay gamma is of the replayed experts.
    """
    shift_T = tokens.need("router_shift_T").detach().clamp(min=p.shift_min, max=1)
    known_T = tokens.counted_T & torch.isfinite(shift_T)
    shift_T = torch.where(known_T, shift_T, torch.ones_like(shift_T))
    return _clipped_geometric(tokens, tokens.log_r_T + shift_T.log(), p)


def _clipped_geometric(tokens: Tokens, log_ratio_T: torch.Tensor, p: GMPO) -> Surrogate:
    sign_T = tokens.advantages_T.sign()
    bounded_T = log_ratio_T.clamp(-p.log_low, p.log_high)
    lower_T = sign_T * torch.minimum(sign_T * log_ratio_T, sign_T * bounded_T)
    ratio_T = tokens.spread(tokens.mean_S(tokens.safe(lower_T)).exp())
    return Surrogate(
        value_T=ratio_T * tokens.advantages_T,
        # trust_region's borders are 1 - low and 1 + high: shifted by one they serve logarithms.
        kept_T=trust_region(tokens.advantages_T, 1 + log_ratio_T.detach(), p.log_low, p.log_high),
        weight_T=ratio_T.detach(),
    )
