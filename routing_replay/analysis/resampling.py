"""Means over tokens with intervals from a bootstrap over whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..routes.batch import RaggedBatch

NUM_RESAMPLES = 1000
# Two-sided 95 %: what the intervals of reports usually mean.
COVERAGE = 0.95
# Half an interval is 1.96 standard errors. A verdict that is pronounced on every batch needs 3.5
# of them: by chance one healthy batch in 4,000 has that, and one in 40 has 1.96.
VERDICT_HALVES = 3.5 / 1.96


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value (nats per response token) with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def exceeds(self, limit: float) -> bool:
        """Return whether the value is above a limit by more than chance gives in many batches."""
        return self.value - VERDICT_HALVES * (self.value - self.low) > limit

    def __str__(self) -> str:
        return f"{self.value:10.3e} [{self.low:10.3e}, {self.high:10.3e}]"

    @classmethod
    def of(cls, values_B: np.ndarray) -> Estimate:
        """Return the estimate of resampled values; the first is that of the batch itself."""
        tail = (1 - COVERAGE) / 2
        low, high = np.quantile(values_B[1:], [tail, 1 - tail])
        return cls(value=float(values_B[0]), low=float(low), high=float(high))


class Resampling:
    """The same resamples of sequences for everything, so that differences are paired.

    Args:
        batch: Its sampled tokens count.
        num_resamples: Besides the batch itself, which comes first.
        seed: The same seed gives the same intervals.
    """

    def __init__(self, batch: RaggedBatch, num_resamples: int = NUM_RESAMPLES, seed: int = 0):
        self._batch = batch
        size = len(batch.lengths_S)
        drawn_BS = np.random.default_rng(seed).multinomial(
            size, np.full(size, 1 / size), num_resamples
        )
        # Tokens of one sequence depend on each other: whole sequences are drawn.
        self._weights_BS = np.concatenate([np.ones((1, size)), drawn_BS])
        counts_S = batch.num_sampled_S.double().numpy()
        self._totals_B = np.maximum(self._weights_BS @ counts_S, 1.0)

    def means(self, values_N: torch.Tensor) -> np.ndarray:
        """Return the mean over the tokens that count, [1 + resamples]."""
        sums_S = self._batch.sums(values_N.double().masked_fill(~self._batch.mask_N, 0.0)).numpy()
        means_B: np.ndarray = self._weights_BS @ sums_S / self._totals_B
        return means_B

    def estimate(self, values_N: torch.Tensor) -> Estimate:
        """Return the mean with its interval."""
        return Estimate.of(self.means(values_N))


def k3(logp_pi_N: torch.Tensor, logp_mu_N: torch.Tensor) -> torch.Tensor:
    """Return the estimator k3 of KL(mu || pi) of each token; float64."""
    log_rho_N = logp_pi_N.double() - logp_mu_N.double()
    return torch.expm1(log_rho_N) - log_rho_N


def abs_difference(logp_pi_N: torch.Tensor, logp_mu_N: torch.Tensor) -> torch.Tensor:
    """Return |log pi - log mu| of each token; float64."""
    return (logp_pi_N.double() - logp_mu_N.double()).abs()


Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
