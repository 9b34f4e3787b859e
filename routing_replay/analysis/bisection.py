"""Where the train-inference gap comes from, one factor after another made equal.

    routes      KL(live) - KL(routes)
    weights     KL(routes) - KL(weights)
    staleness   KL(weights) - KL(checkpoint)
    KIND        KL(base) - KL(KIND SETTING), the base being the last of the four
    rest        KL(base); named where no named KIND explains it

All are KL(mu || pi) by k3, and mean |log pi - log mu|, over the response tokens. The sampling
support shows in neither: engines report log-probs from before top-p and top-k. It shows in
`excess`, the mean of log pi + entropy of pi, which is 0 for tokens that were sampled from pi.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import ConfigError
from .arms import KINDS, LADDER, ScoredArms
from .attribution import NOTABLE_EXCESS
from .resampling import Distance, Estimate, Resampling, abs_difference, k3

FACTORS = {"routes": "routes", "weights": "weights", "checkpoint": "staleness"}
# Nats per token; below it there is nothing to gain (docs/high_kl.md).
NOTABLE_KL = 1e-4
# A factor is named from this share on: less does not explain the gap. Of the live KL; for a KIND of
# what is left with everything replayed, because a setting acts on that alone.
NOTABLE_SHARE = 0.2
# One half of the layers explains a cost if it alone has this share of it.
HALF_SHARE = 2 / 3
# From here on the rest is no matter of precision or kernels (docs/high_kl.md, what is high).
NUMERICS_KL = 1e-2
# Log-probs of this KL belong to another model: nothing of the rest would mean anything.
FOREIGN_KL = 1.0
ADVICE = {
    "routes": "The engines choose other experts. Train with R3 (--routing-replay-mode R3).",
    "weights": "The engines weigh the same experts otherwise. Capture weights and replay them "
    "(--routing-replay-capture weights, --routing-replay-weights straight_through); compare the "
    "routers' precision and scaling.",
    "staleness": "The trained checkpoint is not the one that sampled. Send the weights before the "
    "rollout, flush the prefix cache, and check the weight versions (routing-replay inspect).",
    "support": "The tokens were sampled from less than the policy's support. Sample with top-p 1 "
    "and top-k off, or keep the sampling mask; give the trainer the rollout's temperature.",
    "precision": "The trainer's precision makes the gap: train in {setting}, or roll out in the "
    "trainer's.",
    "order": "The order of the experts' sums makes the gap: use the dispatcher {setting}.",
    "layout": "The parallel layout makes the gap: compare the layers' sums under {setting}.",
    "kernels": "The layers' kernels make the gap: use {setting}.",
    "rest": "What remains is the same weights, routes and combine weights computed otherwise: "
    "precision and kernels of the engines (docs/high_kl.md, numerics).",
    "large rest": "What remains with the same weights, routes and combine weights is more than "
    "numerics give: another temperature, experts loaded in another order, another attention or "
    "other tokens (docs/high_kl.md, numerics).",
}


@dataclass(frozen=True, kw_only=True)
class Factor:
    """What one factor adds to the gap.

    Args:
        name: Of `ADVICE`.
        setting: Of a KIND: what it was changed to.
        k3: In nats per token.
        abs_difference: The same of |dlogp|.
        is_named: Whether it explains a notable part of the gap.
    """

    name: str
    setting: str
    k3: Estimate
    abs_difference: Estimate
    is_named: bool

    @property
    def label(self) -> str:
        return f"{self.name} {self.setting}".strip()

    @property
    def advice(self) -> str:
        """What to change."""
        is_large = self.name == "rest" and self.k3.low > NUMERICS_KL
        return ADVICE["large rest" if is_large else self.name].format(setting=self.setting)


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """The factors of a batch's gap."""

    num_tokens: int
    live: Estimate
    live_abs_difference: Estimate
    factors: tuple[Factor, ...]
    excess: Estimate
    layers: tuple[int, ...]

    @property
    def named(self) -> list[str]:
        """What explains the gap; empty where it is small."""
        names = [factor.label for factor in self.factors if factor.is_named]
        return names + (["support"] if self.is_truncated else [])

    @property
    def is_truncated(self) -> bool:
        """Whether the tokens come from less than the policy's support."""
        return self.excess.exceeds(NOTABLE_EXCESS)

    def sentences(self) -> list[str]:
        """What to change, the largest factor first."""
        named = sorted((f for f in self.factors if f.is_named), key=lambda f: -f.k3.value)
        texts = [factor.advice for factor in named]
        if self.is_truncated:
            texts.append(ADVICE["support"])
        if self.layers:
            first, last = self.layers[0], self.layers[-1]
            where = f"layer {first}" if first == last else f"layers {first} to {last}"
            texts.append(f"Most of what live routing costs comes from {where}.")
        if texts:
            return texts
        return ["Nothing stands out: the gap is too small to gain from any of these."]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"named": self.named, "sentences": self.sentences()}

    def text(self) -> str:
        """Return the table and the closing sentences."""
        lines = [
            f"the gap of {self.num_tokens} tokens, by factor, with 95 % intervals over sequences",
            "",
            f"  {'':18s} {'k3 (nats per token)':36s} |dlogp|",
            f"  {'live routing':18s} {self.live}   {self.live_abs_difference}",
        ]
        for factor in self.factors:
            star = " *" if factor.is_named else ""
            lines.append(f"  {factor.label:18s} {factor.k3}   {factor.abs_difference}{star}")
        lines += [f"  {'excess':18s} {self.excess}   (0 for tokens sampled from pi)", ""]
        return "\n".join([*lines, *self.sentences()])


class _Gaps:
    """Distances of a batch's arms from mu, all over the same resamples."""

    def __init__(self, arms: ScoredArms, resampling: Resampling):
        self._arms, self._resampling = arms, resampling
        self.live, self.base = self.estimate(k3, "live"), self.estimate(k3, arms.base)

    def estimate(self, distance: Distance, name: str, other: str | None = None) -> Estimate:
        """Return the distance of an arm, or how much larger it is than another arm's."""
        means_B = self._means(distance, name)
        return Estimate.of(means_B if other is None else means_B - self._means(distance, other))

    def is_notable(self, name: str, effect: Estimate) -> bool:
        """Whether a factor's effect on k3 explains a notable part of the gap that it acts on."""
        whole = self.base if name in KINDS else self.live
        return effect.value >= max(NOTABLE_KL, NOTABLE_SHARE * whole.value) and effect.low > 0

    def factor(self, name: str, first: str, second: str | None, setting: str = "") -> Factor:
        """Return what the step from one arm to another takes away."""
        effect = self.estimate(k3, first, second)
        return Factor(
            name=name,
            setting=setting,
            k3=effect,
            abs_difference=self.estimate(abs_difference, first, second),
            is_named=self.is_notable(name, effect),
        )

    def excess(self, name: str) -> Estimate:
        """Return the mean of log pi + entropy of an arm."""
        scores = self._arms[name]
        return self._resampling.estimate(scores.logp_N.double() + scores.entropy_N.double())

    def _means(self, distance: Distance, name: str) -> np.ndarray:
        logp_mu_N = self._arms.batch.logp_mu_N
        return self._resampling.means(distance(self._arms[name].logp_N, logp_mu_N))


def bisect(
    arms: ScoredArms, layers: Sequence[int] = (), *, seed: int = 0, num_resamples: int = 1000
) -> Bisection:
    """Return the factors of a batch's gap.

    Args:
        arms: With "live" and "routes" at least.
        layers: All routed layers, for the arms "live in A-B".
        seed: Of the resampling.
        num_resamples: Of whole sequences.

    Raises:
        DataError: Arms are missing.
        ConfigError: The checkpoint is not one of the model that sampled.
    """
    base = arms.base
    require_same_model(arms)
    gaps = _Gaps(arms, Resampling(arms.batch, num_resamples, seed))
    steps = pairwise([name for name in LADDER if name in arms])
    factors = [gaps.factor(FACTORS[second], first, second) for first, second in steps]
    for kind in KINDS:
        names = arms.of_kind(kind)
        factors += [gaps.factor(kind, base, n, n.removeprefix(kind).strip()) for n in names]
    named = [factor for factor in factors if factor.is_named]
    explaining = [factor for factor in named if factor.name in KINDS]
    closest = max(explaining, key=lambda f: f.k3.value).label if explaining else base
    rest = gaps.factor("rest", base, None)
    # What a named setting explains is no rest.
    rest = replace(rest, is_named=gaps.is_notable("rest", gaps.estimate(k3, closest)))
    culprits, _ = halve(tuple(layers), lambda part: layers_cost(arms, part))
    costs_much = any(factor.name == "routes" for factor in named)
    return Bisection(
        num_tokens=int(arms.batch.mask_N.sum()),
        live=gaps.live,
        live_abs_difference=gaps.estimate(abs_difference, "live"),
        factors=(*factors, rest),
        excess=gaps.excess(base),
        layers=culprits if costs_much and len(culprits) < len(layers) else (),
    )


def require_same_model(arms: ScoredArms) -> None:
    """Raise if no arm is anywhere near the rollout.

    Raises:
        ConfigError: The checkpoint is not one of the model that sampled.
    """
    kl = _mean_k3(arms, arms.base)
    if not kl <= FOREIGN_KL:  # nan is foreign, too
        raise ConfigError(
            "the checkpoint is not one of the model that sampled the batch",
            expected=f"a k3 of at most {FOREIGN_KL:g} nats per token with everything replayed",
            got=f"{kl:.3g}",
            fix="Name the checkpoint that the server had (--rollout-checkpoint), of the same "
            "vocabulary",
        )


def halve(
    layers: tuple[int, ...], cost: Callable[[tuple[int, ...]], float | None]
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Search for the layers that make up a cost, by halves.

    Args:
        layers: To search.
        cost: Cost of some layers alone; None if it is not known yet.

    Returns:
        The smallest part found so far, and the part whose cost is needed next; None at the end:
        a single layer, or a cost that no half explains alone.
    """
    while len(layers) > 1:
        whole = cost(layers)
        if whole is None:
            return layers, layers
        halves = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        costs = [cost(half) for half in halves]
        for half, value in zip(halves, costs, strict=True):
            if value is None:
                return layers, half
        explaining = [
            half
            for half, value in zip(halves, costs, strict=True)
            if value is not None and value >= HALF_SHARE * whole > 0
        ]
        if len(explaining) != 1:
            return layers, None
        (layers,) = explaining
    return layers, None


def arm_of_layers(part: Sequence[int]) -> str:
    """Return the name of the arm in which some layers route live and the others replay."""
    return f"live in {part[0]}-{part[-1]}"


def layers_cost(arms: ScoredArms, part: tuple[int, ...]) -> float | None:
    """Return KL(part live) - KL(routes); None if that arm was not scored."""
    name = arm_of_layers(part)
    if name not in arms or "routes" not in arms:
        return None
    return _mean_k3(arms, name) - _mean_k3(arms, "routes")


def _mean_k3(arms: ScoredArms, name: str) -> float:
    batch = arms.batch
    return float(k3(arms[name].logp_N, batch.logp_mu_N)[batch.mask_N].mean())
