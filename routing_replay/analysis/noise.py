"""The noise floor: how far recomputations of one pass are apart, under the same routes.

A policy that cannot reproduce its own log-probs cannot match the engine's better than this. The
floor of k3 is the mean k3 between two recomputations: each takes the other for mu.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch

from ..errors import DataError
from .arms import AGAIN, ScoredArms
from .resampling import Estimate, Resampling, abs_difference, k3


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """Recomputations of a batch's log-probs.

    Args:
        num_passes: K, the first pass included.
        k3: Mean over the pairs of passes, nats per token.
        abs_difference: Mean |difference of log-probs| over the pairs.
        deviation: Standard deviation of a token's log-prob over the passes, mean over the tokens.
        largest: Largest standard deviation of a token.
        equal_share: Share of the tokens whose log-prob is bitwise equal in all passes.
        layers: By routed layer, the standard deviation of the live router's probability of the
            replayed experts, mean over the rows; empty if it was not measured.
    """

    num_passes: int
    k3: Estimate
    abs_difference: Estimate
    deviation: Estimate
    largest: float
    equal_share: float
    layers: dict[int, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """Return the floor for people."""
        lines = [
            f"noise floor of {self.num_passes} passes under the same routes, nats per token",
            "",
            f"  k3              {self.k3}",
            f"  |dlogp|         {self.abs_difference}",
            f"  deviation       {self.deviation}, at most {self.largest:.3e}",
            f"  bitwise equal   {self.equal_share:.2%} of the tokens in all passes",
        ]
        if self.layers:
            lines += ["", "  layer  deviation of the live mass on the replayed experts"]
            lines += [f"  {layer:5d}  {value:10.3e}" for layer, value in self.layers.items()]
        return "\n".join(lines)


def noise_floor(arms: ScoredArms, layers: tuple[int, ...] = ()) -> NoiseFloor:
    """Return the noise floor of a batch.

    Args:
        arms: With "again 1" and following.
        layers: Global indices of the routed layers, for the table by layer.

    Raises:
        DataError: The base arm was scored once only.
    """
    names = [arms.base, *arms.of_kind(AGAIN)]
    if len(names) < 2:
        raise DataError(
            "the noise needs recomputations",
            expected="arms 'again 1', 'again 2', ...",
            got=", ".join(arms.names),
            fix="torchrun -m tools.score_arms BATCH --checkpoint CHECKPOINT --again 4",
        )
    mask_N, resampling = arms.batch.mask_N, Resampling(arms.batch)
    logp_KN = torch.stack([arms[name].logp_N for name in names]).double()
    pairs = list(combinations(range(len(names)), 2))
    k3_N = sum(k3(logp_KN[i], logp_KN[j]) for i, j in pairs)
    apart_N = sum(abs_difference(logp_KN[i], logp_KN[j]) for i, j in pairs)
    assert isinstance(k3_N, torch.Tensor) and isinstance(apart_N, torch.Tensor)
    deviation_N = logp_KN.std(0).masked_fill(~mask_N, 0.0)
    is_equal_N = (logp_KN == logp_KN[0]).all(0) & mask_N
    return NoiseFloor(
        num_passes=len(names),
        k3=resampling.estimate(k3_N / len(pairs)),
        abs_difference=resampling.estimate(apart_N / len(pairs)),
        deviation=resampling.estimate(deviation_N),
        largest=float(deviation_N.max()) if deviation_N.numel() else 0.0,
        equal_share=float(is_equal_N.sum() / mask_N.sum().clamp(min=1)),
        layers=_by_layer(arms, names, layers),
    )


def _by_layer(arms: ScoredArms, names: list[str], layers: tuple[int, ...]) -> dict[int, float]:
    masses = [arms[name].live_mass_LR for name in names]
    known = [mass_LR for mass_LR in masses if mass_LR is not None]
    if len(known) < len(names):
        return {}
    deviation_L = torch.stack(known).std(0).nanmean(1)
    return dict(zip(layers, deviation_L.tolist(), strict=True))
