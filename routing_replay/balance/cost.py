"""Seconds of a step from its loads: four coefficients, fitted to measured steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from ..errors import DataError


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """What a microbatch costs, forward and backward; only ratios matter for a plan.

    Without a fit the unit is one token through one expert.

    Args:
        expert_s: Seconds for a token through one expert on the busiest rank of a layer.
        token_s: Seconds for a token through everything else, on the busiest data-parallel rank.
        square_s: Seconds for each squared token of a sequence: attention.
        microbatch_s: Seconds of a microbatch without a token: launches, pipeline messages.
    """

    expert_s: float = 1.0
    token_s: float = 0.0
    square_s: float = 0.0
    microbatch_s: float = 0.0

    @classmethod
    def of_shapes(
        cls, *, hidden: int, expert_ffn: int, attention_width: int, num_layers: int
    ) -> CostModel:
        """Return the ratios of the floating-point operations, in units of a token's expert.

        A gated expert multiplies three matrices hidden x expert_ffn; attention four of hidden x
        attention_width, and scores and values of a causal sequence (width x n^2 multiplications).

        Args:
            hidden: Hidden size.
            expert_ffn: Width of one expert.
            attention_width: Heads times head size.
            num_layers: Layers with attention.
        """
        expert = 3 * hidden * expert_ffn
        return cls(
            token_s=num_layers * 4 * hidden * attention_width / expert,
            square_s=num_layers * attention_width / expert,
        )

    @classmethod
    def fit(cls, features_N4: np.ndarray, seconds_N: Sequence[float] | np.ndarray) -> CostModel:
        """Return the non-negative coefficients that fit measured steps best in least squares.

        With four coefficients all sets of positive ones can be tried, so the result is exact.

        Args:
            features_N4: `Prediction.features` of the steps.
            seconds_N: What they took.

        Raises:
            DataError: No step, or numbers that are not finite.
        """
        features_N4, seconds_N = np.asarray(features_N4, float), np.asarray(seconds_N, float)
        if features_N4.shape != (len(seconds_N), 4) or not len(seconds_N):
            raise DataError(
                "the measured steps do not fit the cost model",
                expected="one row of 4 features for each measured step",
                got=f"{features_N4.shape} and {seconds_N.shape}",
            )
        if not (np.isfinite(features_N4).all() and np.isfinite(seconds_N).all()):
            raise DataError("the measured steps hold numbers that are not finite")
        scale_4 = np.maximum(features_N4.max(0), 1e-30)  # columns differ by many magnitudes
        best, best_error = np.zeros(4), float(seconds_N @ seconds_N)
        for size in range(1, 5):
            for columns in map(list, itertools.combinations(range(4), size)):
                part_N = features_N4[:, columns] / scale_4[columns]
                values = np.linalg.lstsq(part_N, seconds_N, rcond=None)[0]
                error = float(((part_N @ values - seconds_N) ** 2).sum())
                if (values >= 0).all() and error < best_error * (1 - 1e-9):
                    best, best_error = np.zeros(4), error
                    best[columns] = values / scale_4[columns]
        return cls(**dict(zip(_NAMES, best.tolist(), strict=True)))

    def seconds(self, features_4: np.ndarray) -> float:
        """Return the seconds of a step with these features."""
        return float(np.asarray(features_4) @ np.array(astuple(self)))

    def work(self, lengths_S: np.ndarray) -> np.ndarray:
        """Return the seconds of each sequence outside the experts; float64 [S]."""
        squares_S = np.square(lengths_S, dtype=np.float64)
        work_S: np.ndarray = self.token_s * lengths_S + self.square_s * squares_S
        return work_S


_NAMES = ("expert_s", "token_s", "square_s", "microbatch_s")
