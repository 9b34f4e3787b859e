"""Clipped surrogates on a masked set of tokens: IcePop, KPop, M2PO, Clip-Cov, KL-Cov."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .divergence import bernoulli_kl
from .inputs import StepTokens
from .parameters import aggregation, parameter
from .ppo import Clipped
from .registry import objective
from .surrogate import Surrogate, clipped, trust_region
from .tokens import Tokens

_COV = "Entropy Mechanism (2505.22617)"


@dataclass(frozen=True, kw_only=True)
class IcePop(Clipped):
    has_m: ClassVar[bool] = True
    m_low: float = parameter(0.5, "lowest m that is kept", source="Ring-1T (2510.18855)", above=0)
    m_high: float = parameter(5.0, "highest m that is kept", source="Ring-1T (2510.18855)", above=0)


@dataclass(frozen=True, kw_only=True)
class KPop(Clipped):
    has_m: ClassVar[bool] = True
    phi: float = parameter(
        0.75, "largest divergence either way", source="2606.15079, mathematics", above=0
    )
    weighted: bool = parameter(
        True, "kept tokens are weighted by m", source="ours: as IcePop, whose mask it replaces"
    )


@dataclass(frozen=True, kw_only=True)
class M2PO(Clipped):
    needs: ClassVar[frozenset[str]] = frozenset({"keep_T"})
    aggregation: str = aggregation("token-mean", "AReaL")
    threshold: float = parameter(
        0.04, "largest mean of (log m)^2 over the kept tokens", source="M2PO (2510.01161)", above=0
    )

    @property
    def needs_mu(self) -> bool:
        """True: the mask is of log m."""
        return True

    def choose(self, step: StepTokens) -> dict[str, torch.Tensor]:
        keep_T = second_moment_mask(step.logp_old_T, step.logp_mu_T, step.mask_T, self.threshold)
        return {"keep_T": keep_T}


@dataclass(frozen=True, kw_only=True)
class ClipCov(Clipped):
    needs: ClassVar[frozenset[str]] = frozenset({"keep_T"})
    chooses_by_theta: ClassVar[bool] = True
    aggregation: str = aggregation("token-mean", _COV)
    fraction: float = parameter(2e-4, "share of tokens that is dropped", source=_COV, above=0)
    cov_low: float = parameter(1.0, "lowest covariance that may be dropped", source=_COV)
    cov_high: float = parameter(5.0, "highest covariance that may be dropped", source=_COV)

    def choose(self, step: StepTokens) -> dict[str, torch.Tensor]:
        counted_T = step.counted_T
        covariance_T = token_covariance(step.need("logp_theta_T"), step.advantages_T, counted_T)
        # exp() of uncounted tokens may be inf or nan; they are excluded below.
        r_T = (step.need("logp_theta_T") - step.logp_old_T).exp()
        inside_T = trust_region(step.advantages_T, r_T, self.eps_low, self.eps_high)
        eligible_T = (covariance_T > self.cov_low) & (covariance_T < self.cov_high)
        eligible_T = eligible_T & inside_T & counted_T
        # Each token is drawn by itself, because an exact number would need a count on the host.
        chance = self.fraction * counted_T.sum() / eligible_T.sum().clamp(min=1)
        return {"keep_T": ~(eligible_T & (step.need("uniform_T") < chance))}


@dataclass(frozen=True, kw_only=True)
class KLCov(Clipped):
    needs: ClassVar[frozenset[str]] = frozenset({"penalised_T"})
    chooses_by_theta: ClassVar[bool] = True
    aggregation: str = aggregation("token-mean", _COV)
    fraction: float = parameter(2e-4, "share of tokens that is penalised", source=_COV, above=0)
    beta: float = parameter(
        0.1, "weight of |log r| there", source=f"{_COV}, its yaml (1.0 in its code)", least=0
    )

    def choose(self, step: StepTokens) -> dict[str, torch.Tensor]:
        counted_T = step.counted_T
        covariance_T = token_covariance(step.need("logp_theta_T"), step.advantages_T, counted_T)
        return {"penalised_T": _highest(covariance_T, counted_T, self.fraction)}


@objective(IcePop)
def icepop(tokens: Tokens, p: IcePop) -> Surrogate:
    """GRPO weighted by the engines' discrepancy, without the tokens where that is large.

    Equation: M(m) * min(r * A, clip(r) * A), mean over each response; M(m) = m in [m_low, m_high],
        else 0.
    Reference: IcePop, Ring-1T (2510.18855); Ling-2.6 (2606.15079) equation 5.
    Use: MoE models without replay; masks 0.1 to 0.2 % of the tokens there.
    Pitfalls: Masks ever fewer tokens while the engines drift apart (its authors, on KPop). GLM-5
        has m_low = 1 / m_high.
    """
    m_T = tokens.log_m_T.exp()
    return _masked(tokens, p, (m_T >= p.m_low) & (m_T <= p.m_high), m_T)


@objective(KPop)
def kpop(tokens: Tokens, p: KPop) -> Surrogate:
    """IcePop with a mask by the binary KL between the engines, both ways.

    Equation: as icepop, M = m where D(pi_old, mu) <= phi and D(mu, pi_old) <= phi, else 0;
        D = KL of "this token or another".
    Reference: Ling-2.6 (2606.15079) section 3.2.3.
    Use: Where IcePop's mask no longer reacts.
    Pitfalls: phi depends on the domain: 0.1 to 2.0 were tried, 2.0 for logic. Masks many more
        tokens.
    """
    there_T = bernoulli_kl(tokens.log_old_T, tokens.log_mu_T)
    back_T = bernoulli_kl(tokens.log_mu_T, tokens.log_old_T)
    m_T = tokens.log_m_T.exp()
    weight_T = m_T if p.weighted else torch.ones_like(m_T)
    return _masked(tokens, p, (there_T <= p.phi) & (back_T <= p.phi), weight_T)


@objective(M2PO)
def m2po(tokens: Tokens, p: M2PO) -> Surrogate:
    """PPO without the tokens that make the second moment of log m too large.

    Equation: M * r * A, mean over all tokens; the tokens with the largest (log mu - log pi_old)^2
        are dropped until the mean of the rest is below the threshold.
    Reference: M2PO (2510.01161); AReaL.
    Use: Very stale data.
    Pitfalls: The mask is of the whole step: pass keep_T, from `Parameters.choose`; without it the
        mask is of the microbatch. eps_* have no effect.
    """
    r_T = tokens.log_r_T.exp()
    kept_T = _chosen(tokens, p, "keep_T")
    return Surrogate(
        value_T=torch.where(kept_T, r_T, 0.0) * tokens.advantages_T,
        kept_T=kept_T,
        weight_T=r_T.detach(),
    )


@objective(ClipCov)
def clip_cov(tokens: Tokens, p: ClipCov) -> Surrogate:
    """PPO's clip, with a few tokens of high covariance dropped at random.

    Equation: min(r * A, clip(r) * A); `fraction` of all tokens, drawn from those unclipped with
        covariance in (cov_low, cov_high), contribute nothing. Covariance: (log pi_theta - mean) *
        (A - mean).
    Reference: Entropy Mechanism (2505.22617), Clip-Cov.
    Use: Against collapsing entropy.
    Pitfalls: The draw is over the whole step and equal on all ranks: pass keep_T, from
        `Parameters.choose`; without it the draw is over the microbatch, with uniform_T. The number
        dropped is `fraction` in expectation, not exactly.
    """
    surrogate = clipped(tokens, tokens.log_r_T.exp(), p.eps_low, p.eps_high)
    kept_T = _chosen(tokens, p, "keep_T")
    return Surrogate(
        value_T=torch.where(kept_T, surrogate.value_T, torch.zeros_like(surrogate.value_T)),
        kept_T=surrogate.kept_T & kept_T,
        weight_T=surrogate.weight_T,
    )


@objective(KLCov)
def kl_cov(tokens: Tokens, p: KLCov) -> Surrogate:
    """The unclipped surrogate, with a penalty on the tokens of highest covariance.

    Equation: r * A, and r * A - beta * |log r| for the `fraction` of tokens with the highest
        covariance.
    Reference: Entropy Mechanism (2505.22617), KL-Cov.
    Use: Against collapsing entropy, more smoothly than clip_cov.
    Pitfalls: eps_* have no effect. The choice is over the whole step: pass penalised_T, from
        `Parameters.choose`; without it the choice is over the microbatch.
    """
    r_T = tokens.log_r_T.exp()
    penalised_T = _chosen(tokens, p, "penalised_T")
    penalty_T = torch.where(penalised_T, tokens.log_r_T.abs(), torch.zeros_like(r_T))
    return Surrogate(
        value_T=r_T * tokens.advantages_T - p.beta * penalty_T,
        kept_T=torch.ones_like(tokens.inputs.mask_T),
        weight_T=r_T.detach(),
    )


def second_moment_mask(
    logp_old_T: torch.Tensor, logp_mu_T: torch.Tensor, mask_T: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Return M2PO's mask: the most tokens of least (log mu - log pi_old)^2 with a mean below
    `threshold`.

    Args:
        logp_old_T, logp_mu_T: Over the whole step, all ranks: the mask depends on all tokens.
        mask_T: bool; tokens in the loss.
        threshold: In squared nats.

    Returns:
        bool per token, false outside the mask.

    Source: M2PO (2510.01161), as AReaL computes it.
    """
    squared_T = torch.where(mask_T, (logp_mu_T - logp_old_T).double() ** 2, torch.inf)
    squared_T = squared_T.nan_to_num(nan=torch.inf, posinf=torch.inf)
    sorted_T, order_T = squared_T.sort()
    counts_T = torch.arange(1, len(sorted_T) + 1, device=sorted_T.device)
    # Means of ever larger values rise, so the tokens below the threshold are a prefix.
    below_T = sorted_T.cumsum(0) / counts_T < threshold
    return torch.zeros_like(mask_T).scatter(0, order_T, below_T)


def _masked(tokens: Tokens, p: Clipped, kept_T: torch.Tensor, weight_T: torch.Tensor) -> Surrogate:
    surrogate = clipped(tokens, tokens.log_r_T.exp(), p.eps_low, p.eps_high)
    weight_T = torch.where(kept_T, weight_T, torch.zeros_like(weight_T))
    return Surrogate(
        value_T=weight_T * surrogate.value_T,
        kept_T=surrogate.kept_T & kept_T,
        weight_T=weight_T * surrogate.weight_T,
    )


def _chosen(tokens: Tokens, p: Clipped, name: str) -> torch.Tensor:
    """Return the caller's choice over the step, else one over this microbatch."""
    chosen_T: torch.Tensor | None = getattr(tokens.inputs, name)
    if chosen_T is not None:
        return chosen_T
    uniform_T = tokens.inputs.uniform_T
    step = StepTokens(
        logp_theta_T=tokens.log_theta_T.detach(),
        logp_old_T=tokens.log_old_T,
        logp_mu_T=tokens.log_mu_T,
        advantages_T=tokens.advantages_T,
        mask_T=tokens.counted_T,
        uniform_T=torch.rand_like(tokens.log_old_T) if uniform_T is None else uniform_T,
    )
    return p.choose(step)[name]


def token_covariance(
    logp_T: torch.Tensor, advantages_T: torch.Tensor, mask_T: torch.Tensor
) -> torch.Tensor:
    """Return (log pi - mean) * (A - mean), means over the mask; 0 outside it (2505.22617)."""
    count = mask_T.sum().clamp(min=1)
    centred = []
    for values_T in (logp_T, advantages_T):
        values_T = torch.where(mask_T, values_T, torch.zeros_like(values_T))
        centred.append(values_T - values_T.sum() / count)
    return torch.where(mask_T, centred[0] * centred[1], torch.zeros_like(centred[0]))


def _highest(values_T: torch.Tensor, counted_T: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return the `fraction` of the counted tokens with the highest values, at least one.

    The number stays on the device: no host sync.
    """
    order_T = torch.where(counted_T, values_T, -torch.inf).argsort(descending=True)
    number = (fraction * counted_T.sum()).long().clamp(min=1)
    first_T = torch.arange(len(order_T), device=order_T.device) < number
    return torch.zeros_like(counted_T).scatter(0, order_T, first_T) & counted_T
