"""Trust regions in probability, not in ratio, anchored at the inference engine: DPPO and DRPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .parameters import Parameters, advantage, aggregation, horizon, parameter
from .registry import objective
from .surrogate import Surrogate, weighted_log_prob
from .tokens import Tokens

# Smallest probability of "any other token" in a logarithm; below it float32 holds no information.
MIN_REST = 1e-12
_DPPO = "DPPO (2602.04879) script"


@dataclass(frozen=True, kw_only=True)
class DPPO(Parameters):
    has_m: ClassVar[bool] = True
    aggregation: str = aggregation("seq-mean-token-sum-norm", "DPPO (2602.04879)")
    advantage: str = advantage("group-mean", "DPPO (2602.04879)")
    cap: float = parameter(20.0, "truncation of w", source="verl; Stable-RL has 10", above=0)


@dataclass(frozen=True, kw_only=True)
class DPPOTV(DPPO):
    delta_low: float = parameter(0.15, "largest fall of probability", source=_DPPO, above=0)
    delta_high: float = parameter(0.15, "largest rise of probability", source=_DPPO, above=0)


@dataclass(frozen=True, kw_only=True)
class DPPOKL(DPPO):
    delta: float = parameter(0.05, "largest divergence in nats", source=_DPPO, above=0)


@dataclass(frozen=True, kw_only=True)
class DPPOTopK(DPPO):
    needs: ClassVar[frozenset[str]] = frozenset(
        {"sampled_ids_T", "topk_ids_TK", "topk_logp_mu_TK", "topk_logp_theta_TK"}
    )
    divergence: str = parameter(
        "tv",
        "divergence on the reduced support",
        source="ours",
        choices=("tv", "kl"),
    )
    delta: float = parameter(
        0.15, "largest divergence", source="ours: that of the binary TV", above=0
    )


@dataclass(frozen=True, kw_only=True)
class DRPO(Parameters):
    has_m: ClassVar[bool] = True
    aggregation: str = aggregation("seq-mean-token-sum-norm", "DRPO (2606.09821)")
    advantage: str = advantage("group-mean", "DRPO (2606.09821)")
    horizon: int | None = horizon(8192, "DRPO (2606.09821)")
    delta: float = parameter(12.5, "width of the region", source="DRPO (2606.09821)", above=0)


@objective(DPPOTV)
def dppo_tv(tokens: Tokens, p: DPPOTV) -> Surrogate:
    """MiniRL's form with another mask: how far the probability itself moved from the engine's.

    Equation: sum over tokens of M * sg[min(w, cap)] * A * log pi_theta / horizon;
        M = 0 where (A > 0 and pi_theta - mu > delta_high) or (A < 0 and mu - pi_theta > delta_low).
    Reference: DPPO, Rethinking the Trust Region in LLM RL (2602.04879), binary total variation.
    Use: An alternative to replay; claims to beat it.
    Pitfalls: The anchor must be mu: verl's example runs it against the recomputed pi_old. Sources
        disagree on delta (0.15, 0.2, 0.6 for FP8).
    """
    rise_T = (tokens.log_theta_T.exp() - tokens.log_mu_T.exp()).detach()
    high_T = (tokens.advantages_T > 0) & (rise_T > p.delta_high)
    low_T = (tokens.advantages_T < 0) & (rise_T < -p.delta_low)
    return weighted_log_prob(tokens, _weight(tokens, p), ~(high_T | low_T))


@objective(DPPOKL)
def dppo_kl(tokens: Tokens, p: DPPOKL) -> Surrogate:
    """dppo_tv with the KL of "this token or another" as its divergence.

    Equation: as dppo_tv; M = 0 where D > delta and (A > 0 and w > 1 or A < 0 and w < 1);
        D = mu log(mu / pi_theta) + (1 - mu) log((1 - mu) / (1 - pi_theta)).
    Reference: DPPO (2602.04879), binary KL.
    Use: As dppo_tv; stricter for improbable tokens.
    Pitfalls: As dppo_tv.
    """
    divergence_T = bernoulli_kl(tokens.log_mu_T, tokens.log_theta_T.detach())
    return weighted_log_prob(tokens, _weight(tokens, p), _inside(tokens, divergence_T > p.delta))


@objective(DPPOTopK)
def dppo_topk(tokens: Tokens, p: DPPOTopK) -> Surrogate:
    """dppo_tv with the divergence over mu's most likely tokens, the sampled one, and the rest as
    one.

    Equation: as dppo_kl; D = sum |mu - pi_theta| / 2 or KL(mu || pi_theta) on that support.
    Reference: DPPO (2602.04879), top-K (K = 20 there).
    Use: When the engine can return top-K log-probs: it sees moves of the other tokens too.
    Pitfalls: A lower bound of the divergence over the vocabulary. Payload grows with K.
    """
    divergence_T = _topk_divergence(tokens, p.divergence)
    return weighted_log_prob(tokens, _weight(tokens, p), _inside(tokens, divergence_T > p.delta))


@objective(DRPO)
def drpo(tokens: Tokens, p: DRPO) -> Surrogate:
    """A quadratic penalty on the move in probability instead of a mask.

    Equation: sum over tokens of w * A - |A| / (2 delta) * mu * (w - 1)^2, divided by horizon;
        its gradient is that of w * A times 1 - sign(A (w - 1)) * |pi_theta - mu| / delta.
    Reference: DRPO, Rethinking the Divergence Regularization in LLM RL (2606.09821) equation 8.
    Use: A smooth region without any token cut off.
    Pitfalls: At the published delta of 12.5 the factor stays in [0.92, 1.08]: the announced
        corrective gradient beyond a border needs delta < 1 (0.15 resembles DPPO). Another DRPO is
        2510.04474.
    """
    w_T, mu_T, advantages_T = tokens.log_w_T.exp(), tokens.log_mu_T.exp(), tokens.advantages_T
    penalty_T = advantages_T.abs() / (2 * p.delta) * mu_T * (w_T - 1) ** 2
    slope_T = 1 - advantages_T.sign() * mu_T * (w_T - 1) / p.delta
    return Surrogate(
        value_T=w_T * advantages_T - penalty_T,
        kept_T=torch.ones_like(tokens.inputs.mask_T),
        weight_T=(w_T * slope_T).detach(),
    )


def bernoulli_kl(logp_T: torch.Tensor, logq_T: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) of "this token or another" from its log-probs; finite at 1."""
    rest_p_T, rest_q_T = (-torch.expm1(logs_T) for logs_T in (logp_T, logq_T))
    log_rest_T = rest_p_T.clamp(min=MIN_REST).log() - rest_q_T.clamp(min=MIN_REST).log()
    return logp_T.exp() * (logp_T - logq_T) + rest_p_T * log_rest_T


def _weight(tokens: Tokens, p: DPPO) -> torch.Tensor:
    return tokens.log_w_T.exp().clamp(max=p.cap)


def _inside(tokens: Tokens, far_T: torch.Tensor) -> torch.Tensor:
    """Return False where a token is far away and the update would move it farther."""
    log_w_T, advantages_T = tokens.log_w_T.detach(), tokens.advantages_T
    onward_T = ((advantages_T > 0) & (log_w_T > 0)) | ((advantages_T < 0) & (log_w_T < 0))
    return ~(far_T & onward_T)


def _topk_divergence(tokens: Tokens, divergence: str) -> torch.Tensor:
    log_mu_TK, log_theta_TK = tokens.need("topk_logp_mu_TK"), tokens.need("topk_logp_theta_TK")
    absent_T = (tokens.need("topk_ids_TK") != tokens.need("sampled_ids_T")[:, None]).all(dim=1)
    supports = []
    for top_TK, own_T in (
        (log_mu_TK, tokens.log_mu_T),
        (log_theta_TK.detach(), tokens.log_theta_T.detach()),
    ):
        # The sampled token is a column of its own where the top K do not hold it.
        own_T = torch.where(absent_T, own_T.exp(), torch.zeros_like(own_T))
        named = torch.cat([top_TK.exp(), own_T[:, None]], dim=1)
        rest_T = 1 - named.sum(dim=1, keepdim=True)
        supports.append(torch.cat([named, rest_T], dim=1).clamp(min=0))
    mu, theta = supports
    if divergence == "tv":
        return (mu - theta).abs().sum(dim=1) / 2
    log_ratio = mu.clamp(min=MIN_REST).log() - theta.clamp(min=MIN_REST).log()
    return (mu * log_ratio).sum(dim=1)
