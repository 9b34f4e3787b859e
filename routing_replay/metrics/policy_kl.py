"""Divergence of two policies, from the log-probs of sampled tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..errors import ObjectiveError
from .typed import Mean, Metric, Sum, masked_max, masked_mean

# The R3 paper (2510.11370) counts tokens whose probabilities differ by more than these factors.
EXTREME_TAUS = (2, 5)
# exp(2 * 300) is finite in float64, exp(2 * 355) is not. Only sums of ratios need it.
MAX_LOG_RATIO = 300.0


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Which sequence each token belongs to.

    Args:
        index_T: int64, in [0, count).
        count: Sequences here, empty ones included.
        context_group: Process group (context parallelism) whose ranks hold other tokens of the
            same sequences, with the same numbers; None if they are whole.
    """

    index_T: torch.Tensor
    count: int
    context_group: dist.ProcessGroup | None = None


def policy_metrics(
    logp_p_T: torch.Tensor,
    logp_q_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    prefix: str = "train_infer",
    suffix: str = "",
    sequences: Sequences | None = None,
) -> dict[str, Metric]:
    """Estimate KL(q || p) and related quantities from tokens that were sampled from q.

    With rho = p / q of the sampled token:

    - `kl_k1`: mean of -log rho; unbiased, may be negative. MiniRL's train-inference KL for
      p = pi_old, q = mu.
    - `kl_k3`: mean of rho - 1 - log rho; unbiased, never negative. The R3 paper's estimator.
    - `logp_abs_diff_mean`, `logp_abs_diff_max`: of |log rho|.
    - `extreme_tau2`, `extreme_tau5`: share of tokens with max(rho, 1 / rho) above tau.
    - `chi2`: mean of rho^2 - 1, the chi-squared divergence of p from q.
    - `ess`: sum of rho / sum of rho^2, the effective share of the samples; it merges exactly over
      ranks. The usual (sum rho)^2 / (n * sum rho^2) is this times the mean of rho, 1 on average.
    - `nonfinite_tokens`: tokens in the mask without a finite log-prob. No other metric counts them.
    - `perplexity_ratio`, with `sequences`: mean over the sequences of (perplexity under p) /
      (perplexity under q) = exp(mean over its tokens of -log rho). Empty ones do not count.

    Args:
        logp_p_T: Log-probs under the policy that is compared, natural logarithm.
        logp_q_T: Log-probs under the policy that sampled.
        mask_T: bool; response tokens. Others may hold anything.
        prefix: Before the slash of the names.
        suffix: After the names: `_live` for the pass without replay.
        sequences: Needed for `perplexity_ratio`; collective over their context group.

    Returns:
        Metrics by name, detached, in float64.
    """
    log_rho_T, counted_T = _log_ratio(logp_p_T, logp_q_T, mask_T)
    distance_T = log_rho_T.abs()
    bounded_T = log_rho_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    rho_T = bounded_T.exp()
    metrics: dict[str, Metric] = {
        "kl_k1": masked_mean(-log_rho_T, counted_T),
        # expm1: for close policies rho - 1 in float would lose the digits that matter.
        "kl_k3": masked_mean(torch.expm1(bounded_T) - log_rho_T, counted_T),
        "logp_abs_diff_mean": masked_mean(distance_T, counted_T),
        "logp_abs_diff_max": masked_max(distance_T, counted_T),
        "chi2": masked_mean(torch.expm1(2 * bounded_T), counted_T),
        "ess": Mean(
            total=torch.where(counted_T, rho_T, 0.0).sum(),
            count=torch.where(counted_T, rho_T**2, 0.0).sum(),
        ),
        "nonfinite_tokens": Sum(total=(mask_T.bool() & ~counted_T).sum().double()),
    }
    for tau in EXTREME_TAUS:
        extreme_T = (distance_T > math.log(tau)).double()
        metrics[f"extreme_tau{tau}"] = masked_mean(extreme_T, counted_T)
    if sequences is not None:
        metrics["perplexity_ratio"] = _perplexity_ratio(log_rho_T, counted_T, sequences)
    return {f"{prefix}/{name}{suffix}": metric for name, metric in metrics.items()}


def update_metrics(
    logp_theta_T: torch.Tensor,
    logp_old_T: torch.Tensor,
    logp_mu_T: torch.Tensor | None,
    mask_T: torch.Tensor,
    *,
    suffix: str = "",
    sequences: Sequences | None = None,
) -> dict[str, Metric]:
    """Return `policy_metrics` of r and w during an update; m is measured before it.

    `staleness/` is r = pi_theta / pi_old, `off_policy/` is w = pi_theta / mu. With
    m = pi_old / mu, log w = log m + log r token by token. The samples are mu's, so under a large
    discrepancy `staleness/` is not exactly an estimate of KL(pi_old || pi_theta). Without a mu of
    the same policy (BuPO's inner layer) there is no `off_policy/`.
    """
    metrics: dict[str, Metric] = {}
    for prefix, logp_q_T in (("staleness", logp_old_T), ("off_policy", logp_mu_T)):
        if logp_q_T is None:
            continue
        metrics |= policy_metrics(
            logp_theta_T, logp_q_T, mask_T, prefix=prefix, suffix=suffix, sequences=sequences
        )
    return metrics


def _perplexity_ratio(
    log_rho_T: torch.Tensor, counted_T: torch.Tensor, sequences: Sequences
) -> Mean:
    """Return exp(mean of -log rho) over the sequences.

    Ranks of a context group all count the same sequences, which leaves a mean as it is.
    """
    columns_T2 = torch.stack([-log_rho_T, counted_T.double()], -1)
    sums_S2 = log_rho_T.new_zeros(sequences.count, 2).index_add(0, sequences.index_T, columns_T2)
    if sequences.context_group is not None:
        dist.all_reduce(sums_S2, group=sequences.context_group)
    total_S, length_S = sums_S2.unbind(-1)
    return masked_mean((total_S / length_S.clamp(min=1)).exp(), length_S > 0)


def _log_ratio(
    logp_p_T: torch.Tensor, logp_q_T: torch.Tensor, mask_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log(p / q) in float64, 0 where not counted, and the counted tokens.

    A token counts if it is in the mask and its log-ratio is finite.
    """
    if not logp_p_T.shape == logp_q_T.shape == mask_T.shape:
        raise ObjectiveError(
            "log-probs and mask are of different shapes",
            got=f"{tuple(logp_p_T.shape)}, {tuple(logp_q_T.shape)}, {tuple(mask_T.shape)}",
        )
    log_rho_T = logp_p_T.detach().double() - logp_q_T.detach().double()
    counted_T = mask_T.bool() & torch.isfinite(log_rho_T)
    return torch.where(counted_T, log_rho_T, 0.0), counted_T
