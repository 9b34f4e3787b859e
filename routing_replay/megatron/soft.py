"""Soft replay: a replayed expert stays only where the live router finds it plausible.

p is the live router's distribution, A its own experts, R the replayed ones of a token. An expert
of R that is in A stays. Another one stays if all of these hold, each only where it is set:

    ratio     p(e) >= ratio ** (decay ** age) * min of p over A
    mass      sum of p over R >= mass * sum of p over A
    margin    log(min of p over A) - log(max of p outside A) <= margin

The slots of the others are filled with the likeliest experts of A that are not in R's rest.

Source: the ratio is prime-rl's (pull request 2703). Mass, margin, and letting the ratio grow with
the age of the weights that routed the token are ours; PR2 (arXiv 2606.00395) names the staleness
of replayed routes as the problem, and solves it by predicting routes instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..config import ReplayConfig
from ..errors import ReplayError
from ..metrics.typed import LayerMean, Metric
from ..routes.step_routes import StepRoutes


@dataclass(frozen=True, kw_only=True)
class SoftRule:
    """Thresholds of soft replay; see the module.

    Args:
        ratio: In 0..1; 0 keeps any expert.
        mass: In 0..1; 0 keeps any set.
        margin: Nats, above 0; inf never distrusts a token.
        decay: In (0, 1]; 1 ignores the age.
        weight_version: Of the weights that are trained now, from which ages count.
    """

    ratio: float
    mass: float
    margin: float
    decay: float
    weight_version: int

    @classmethod
    def of(
        cls, config: ReplayConfig, table: StepRoutes, weight_version: int | None
    ) -> SoftRule | None:
        """Return the rule of a configuration; None if it keeps everything.

        Args:
            config: Replay settings.
            table: The routes; its newest version is the current one if none is named.
            weight_version: Of the trained weights.
        """
        if not config.is_soft:
            return None
        newest = table.newest_version
        return cls(
            ratio=config.soft_ratio,
            mass=config.soft_mass,
            margin=config.soft_margin or float("inf"),
            decay=config.soft_decay,
            weight_version=newest if weight_version is None else weight_version,
        )

    def ratio_of(self, table: StepRoutes, rows_T: np.ndarray) -> np.ndarray | None:
        """Return each token's ratio, float32 [T]; None if the age does not matter.

        Raises:
            ReplayError: The age of a replayed row is unknown or negative.
        """
        if self.decay == 1 or not len(rows_T) or not table.num_rows:
            return None
        versions_T = table.versions(rows_T)
        age_T = self.weight_version - versions_T
        is_unknown_T = (versions_T < 0) | (age_T < 0)
        if (is_unknown_T & (rows_T >= 0)).any():
            token = int(np.flatnonzero(is_unknown_T & (rows_T >= 0))[0])
            raise ReplayError(
                "soft_decay needs the age of the weights that routed each row",
                expected=f"a weight version in 0..{self.weight_version}",
                got=int(versions_T[token]),
                where=f"row {rows_T[token]}, {table.where}",
                fix="Send weight_version with each update of the server's weights, and name the "
                "trained one: replaying(table, weight_version=...)",
            )
        ratio_T: np.ndarray = self.ratio ** (self.decay ** age_T.clip(min=0))
        return ratio_T.astype(np.float32)


def keep_plausible(
    probs_TE: torch.Tensor,
    replayed_TK: torch.Tensor,
    live_TK: torch.Tensor,
    rule: SoftRule,
    ratio_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts that tokens take, and which of the replayed ones stayed.

    Args:
        probs_TE: The live router's distribution over all experts.
        replayed_TK: int64, distinct in each row.
        live_TK: int64, the live router's own choice, distinct in each row.
        rule: The thresholds.
        ratio_T: The ratio of each token; None takes the rule's.

    Returns:
        int64 [T, K] without duplicates, and bool [T, K]. A kept expert stays in its slot.
    """
    live_p_TK = probs_TE.gather(1, live_TK)
    live_TK = live_TK.gather(1, live_p_TK.argsort(dim=1, descending=True, stable=True))
    is_same_TKK = replayed_TK.unsqueeze(-1) == live_TK.unsqueeze(-2)
    is_live_TK = is_same_TKK.any(-1)
    replayed_p_TK, weakest_T1 = probs_TE.gather(1, replayed_TK), live_p_TK.amin(1, keepdim=True)
    ratio = rule.ratio if ratio_T is None else ratio_T[:, None]
    is_plausible_TK = replayed_p_TK >= ratio * weakest_T1
    if rule.mass:
        share_T1 = replayed_p_TK.sum(1, keepdim=True) / live_p_TK.sum(1, keepdim=True)
        is_plausible_TK &= share_T1 >= rule.mass
    if rule.margin < float("inf"):
        best_out_T1 = probs_TE.scatter(1, live_TK, 0.0).amax(1, keepdim=True)
        is_plausible_TK &= weakest_T1.log() - best_out_T1.log() <= rule.margin
    is_kept_TK = is_live_TK | is_plausible_TK
    # Live experts that are still free, likeliest first, one for each dropped slot in turn.
    is_taken_TK = (is_same_TKK & is_kept_TK.unsqueeze(-1)).any(-2)
    free_TK = live_TK.gather(1, is_taken_TK.byte().argsort(dim=1, stable=True))
    number_TK = ((~is_kept_TK).cumsum(1) - 1).clamp(min=0)
    return torch.where(is_kept_TK, replayed_TK, free_TK.gather(1, number_TK)), is_kept_TK


class ReplaceRate:
    """Share of replayed slots that were filled live, by layer, summed on the device.

    Args:
        layers: All routed layers of the model.
        top_k: Slots of a token.
        device: Where the routers run.
    """

    def __init__(self, layers: tuple[int, ...], top_k: int, device: torch.device):
        self._layers, self._top_k = layers, top_k
        self._sums_2L = torch.zeros(2, len(layers), dtype=torch.float64, device=device)

    def add(self, layer: int, is_kept_TK: torch.Tensor, is_counted_T: torch.Tensor) -> None:
        """Add one router call; tokens that are not counted are padding, prompts, or live."""
        index = self._layers.index(layer)
        self._sums_2L[0, index] += (~is_kept_TK & is_counted_T[:, None]).sum()
        self._sums_2L[1, index] += is_counted_T.sum() * self._top_k

    def metrics(self) -> dict[str, Metric]:
        """Return `routing_replay/replace_rate` with its layers; not collective."""
        total_L, count_L = self._sums_2L
        rate = LayerMean(layers=self._layers, total_L=total_L, count_L=count_L)
        return {"routing_replay/replace_rate": rate}
