"""Inputs made safe for arithmetic, and sums over sequences that ranks may share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ObjectiveError
from .inputs import LossInputs

# exp(20) = 4.9e8: far beyond any threshold in use, and its square is still finite in float32.
MAX_LOG_RATIO = 20.0


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks whose losses are added: each of their losses depends on each rank's part."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


@dataclass(frozen=True)
class Tokens:
    """LossInputs with every uncounted token made harmless: log-ratios 0, advantage 0.

    Replacing before the exponential, not after it, is what keeps nan out of the gradient: the
    derivative of where(mask, exp(x), 0) at x = inf is 0 * inf.
    """

    inputs: LossInputs

    @cached_property
    def finite_T(self) -> torch.Tensor:
        inputs = self.inputs
        finite_T = torch.ones_like(inputs.mask_T)
        for name in ("logp_theta_T", "logp_old_T", "logp_mu_T", "advantages_T"):
            values_T = getattr(inputs, name)
            finite_T = finite_T & torch.isfinite(values_T)
        return finite_T

    @cached_property
    def counted_T(self) -> torch.Tensor:
        """In the loss and finite."""
        return self.inputs.mask_T & self.finite_T

    def safe(self, values_T: torch.Tensor) -> torch.Tensor:
        """Return the values where counted, zero elsewhere; no gradient reaches the rest."""
        return torch.where(self.counted_T, values_T, torch.zeros_like(values_T))

    @cached_property
    def log_theta_T(self) -> torch.Tensor:
        """log pi_theta, with gradient."""
        return self.safe(self.inputs.logp_theta_T)

    @cached_property
    def log_mu_T(self) -> torch.Tensor:
        return self.safe(self.inputs.logp_mu_T)

    @cached_property
    def log_old_T(self) -> torch.Tensor:
        return self.safe(self.inputs.logp_old_T)

    @cached_property
    def log_m_T(self) -> torch.Tensor:
        """log(pi_old / mu): the discrepancy of the engines. No gradient."""
        return (self.log_old_T - self.log_mu_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    @cached_property
    def log_r_T(self) -> torch.Tensor:
        """log(pi_theta / pi_old): staleness. With gradient."""
        return (self.log_theta_T - self.log_old_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    @cached_property
    def log_w_T(self) -> torch.Tensor:
        """log(pi_theta / mu) = log m + log r. With gradient."""
        return (self.log_theta_T - self.log_mu_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    @cached_property
    def advantages_T(self) -> torch.Tensor:
        return self.safe(self.inputs.advantages_T)

    @cached_property
    def lengths_S(self) -> torch.Tensor:
        """Tokens in the loss of each whole sequence, at least 1: empty ones divide safely."""
        lengths_S = self.inputs.lengths_S
        if lengths_S is None:
            lengths_S = self.sum_S(self.inputs.mask_T.to(self.inputs.logp_theta_T.dtype))
        return lengths_S.to(self.inputs.logp_theta_T.dtype).clamp(min=1)

    def sum_S(self, values_T: torch.Tensor) -> torch.Tensor:
        """Return the sum per sequence, over context-parallel ranks too. Differentiable."""
        zeros_S = values_T.new_zeros(self.inputs.num_sequences)
        sums_S = zeros_S.index_add(0, self.inputs.sequence_T, values_T)
        group = self.inputs.context_group
        return sums_S if group is None else _SumOverRanks.apply(sums_S, group)

    def mean_S(self, values_T: torch.Tensor) -> torch.Tensor:
        """Return the mean per sequence, 0 if empty; uncounted values must be 0."""
        return self.sum_S(values_T) / self.lengths_S

    def spread(self, values_S: torch.Tensor) -> torch.Tensor:
        """Return each token's sequence value."""
        return values_S[self.inputs.sequence_T]

    def need(self, name: str) -> torch.Tensor:
        """Return an optional input that the chosen objective requires."""
        values = getattr(self.inputs, name)
        if values is None:
            raise ObjectiveError(
                f"the objective needs {name}",
                got="None",
                fix="Pass it in LossInputs, or choose another objective",
            )
        return values
