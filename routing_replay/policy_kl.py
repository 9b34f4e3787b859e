"""How far two policies are apart, from the log-probs of sampled tokens."""

from __future__ import annotations

import math

import torch

from .errors import ObjectiveError
from .metrics import Mean, Metric, Sum, masked_max, masked_mean

# The R3 paper (2510.11370) counts tokens whose probabilities differ by more than these factors.
EXTREME_TAUS = (2, 5)
# exp(2 * 300) is finite in float64, exp(2 * 355) is not. Only sums of ratios need it.
MAX_LOG_RATIO = 300.0


def policy_metrics(
    logp_p_T: torch.Tensor,
    logp_q_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    prefix: str = "train_infer",
    suffix: str = "",
) -> dict[str, Metric]:
    """Estimates of KL(q || p) and of its companions; the tokens were sampled from q, the second
    policy.

    With rho = p / q of the sampled token:

    - `kl_k1`: mean of -log rho; unbiased, may be negative. MiniRL's train-inference KL for
      p = pi_old, q = mu.
    - `kl_k3`: mean of rho - 1 - log rho; unbiased, never negative. The R3 paper's estimator.
    - `logp_abs_diff_mean`, `logp_abs_diff_max`: of |log rho|.
    - `extreme_tau2`, `extreme_tau5`: share of tokens with max(rho, 1 / rho) above tau.
    - `chi2`: mean of rho^2 - 1, the chi-squared divergence of p from q.
    - `ess`: sum of rho / sum of rho^2, the effective share of the samples; 1 where the policies
      are equal. The usual (sum rho)^2 / (n * sum rho^2) is this times the mean of rho, which is 1
      in expectation; without that factor it is a ratio of sums and so merges exactly over
      microbatches and ranks.
    - `nonfinite_tokens`: tokens in the mask that a policy gave no finite log-prob; in none of the
      above.

    Estimators that look at sampled tokens stay flat while a reward degrades: watch the extremes
    too.

    Args:
        logp_p_T: Log-probs under the policy that is compared, natural logarithm.
        logp_q_T: Log-probs under the policy that sampled.
        mask_T: bool; response tokens. Others may hold anything.
        prefix: Before the slash of the names.
        suffix: After the names, as `_live` for the pass without replay.

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
    return {f"{prefix}/{name}{suffix}": metric for name, metric in metrics.items()}


def decomposed_metrics(
    logp_theta_T: torch.Tensor,
    logp_old_T: torch.Tensor,
    logp_mu_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    suffix: str = "",
) -> dict[str, Metric]:
    """`policy_metrics` of m, r and w: log w = log m + log r, token by token.

    `train_infer/` is m = pi_old / mu (discrepancy), `staleness/` is r = pi_theta / pi_old,
    `off_policy/` is w = pi_theta / mu. The samples are mu's, so under a large discrepancy
    `staleness/` is not exactly an estimate of KL(pi_old || pi_theta).
    """
    pairs = {
        "train_infer": (logp_old_T, logp_mu_T),
        "staleness": (logp_theta_T, logp_old_T),
        "off_policy": (logp_theta_T, logp_mu_T),
    }
    metrics: dict[str, Metric] = {}
    for prefix, (logp_p_T, logp_q_T) in pairs.items():
        metrics |= policy_metrics(logp_p_T, logp_q_T, mask_T, prefix=prefix, suffix=suffix)
    return metrics


def perplexity_ratio(
    logp_p_T: torch.Tensor,
    logp_q_T: torch.Tensor,
    mask_T: torch.Tensor,
    sequence_T: torch.Tensor,
    num_sequences: int,
) -> Mean:
    """Mean over sequences of (perplexity under p) / (perplexity under q); empty sequences do not
    count.

    Of one sequence it is exp(mean over its tokens of -log rho): `kl_k1` of the sequence,
    exponentiated. It needs whole sequences, so under context parallelism it has to be computed
    after gathering.

    Args:
        logp_p_T, logp_q_T, mask_T: As in `policy_metrics`.
        sequence_T: int64; the token's sequence, in [0, num_sequences).
        num_sequences: Sequences here, empty ones included.
    """
    log_rho_T, counted_T = _log_ratio(logp_p_T, logp_q_T, mask_T)
    zeros_S = log_rho_T.new_zeros(num_sequences)
    sums_S = zeros_S.index_add(0, sequence_T, -log_rho_T)
    lengths_S = zeros_S.index_add(0, sequence_T, counted_T.double())
    return masked_mean((sums_S / lengths_S.clamp(min=1)).exp(), lengths_S > 0)


def _log_ratio(logp_p_T, logp_q_T, mask_T):
    """log(p / q) in float64, 0 where not counted; and what counts: in the mask and finite."""
    if not logp_p_T.shape == logp_q_T.shape == mask_T.shape:
        raise ObjectiveError(
            "log-probs and mask are of different shapes",
            got=f"{tuple(logp_p_T.shape)}, {tuple(logp_q_T.shape)}, {tuple(mask_T.shape)}",
        )
    log_rho_T = logp_p_T.detach().double() - logp_q_T.detach().double()
    counted_T = mask_T.bool() & torch.isfinite(log_rho_T)
    return torch.where(counted_T, log_rho_T, 0.0), counted_T
