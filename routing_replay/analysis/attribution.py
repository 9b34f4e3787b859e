"""Where the train-inference KL comes from: what each layer's routing costs the policy.

One rollout batch is scored again and again with the routes of other layers replayed:

    none        every layer routes live
    all         every layer replays
    without l   every layer but l replays           cost of l = KL(without l) - KL(all)
    only l      layer l alone replays               gain of l = KL(none) - KL(only l)
    first n     the first n routed layers replay    step of the n-th = KL(first n-1) - KL(first n)
    gates       every layer replays, with the engine's combine weights
    rollout     as gates (without captured combine weights: as all), on the checkpoint that sampled

All are KL(mu || pi), mean over the response tokens. Four parts add up exactly, by definition:

    KL(none) = numerics + staleness + gates + routing
    numerics  = KL(rollout)                 same checkpoint, routes and combine weights
    staleness = KL(gates) - KL(rollout)     newer checkpoint; 0 without `rollout`
    gates     = KL(all) - KL(gates)         other combine weights of the same experts; left out
                                            without captured ones, which makes KL(gates) = KL(all)
    routing   = KL(none) - KL(all)

The steps of `first n` add up to `routing` as well. The costs of `without l` need not: two layers
can repair or repeat each other's damage.

This module knows no engine: a callback scores a variant. `tools/attribute_kl.py` gives it Megatron.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, DataError, reading, unknown_name
from ..files import atomic_write
from ..routes.batch import RaggedBatch
from .resampling import NUM_RESAMPLES, Estimate

FAMILIES = ("without", "only", "first")
# Nats per token; a top-p of 0.99 leaves out about ten times as much of the entropy.
NOTABLE_EXCESS = 5e-3
# A layer whose own replay makes up this share of the KL replays wrong routes. Chance, and routes
# that newer weights would leave, make a few per cent of it.
HARMFUL_SHARE = 0.5
COLUMNS = ("k1", "k3", "excess", "count")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One pass over the batch.

    Args:
        name: As above.
        replayed: Layers that replay.
        has_gates: Whether they take the engine's combine weights.
        is_rollout_weights: Whether the checkpoint is the one that sampled.
    """

    name: str
    replayed: tuple[int, ...]
    has_gates: bool = False
    is_rollout_weights: bool = False


def plan(
    layers: Sequence[int],
    families: Sequence[str] = ("without",),
    has_rollout_weights: bool = False,
    has_gates: bool = False,
) -> list[Variant]:
    """Return the passes of an attribution: 2, one more for gates, for staleness, L for each family.

    Args:
        layers: The routed layers.
        families: Of `FAMILIES`.
        has_rollout_weights: Whether the checkpoint that sampled is at hand.
        has_gates: Whether the table holds combine weights.

    Raises:
        ConfigError: An unknown family.
    """
    for family in families:
        if family not in FAMILIES:
            raise unknown_name("family of an attribution", family, FAMILIES)
    layers = tuple(layers)
    variants = [Variant(name="none", replayed=()), Variant(name="all", replayed=layers)]
    if has_gates:
        variants.append(Variant(name="gates", replayed=layers, has_gates=True))
    if has_rollout_weights:
        variants.append(
            Variant(name="rollout", replayed=layers, has_gates=has_gates, is_rollout_weights=True)
        )
    if "without" in families:
        variants += [
            Variant(name=f"without {i}", replayed=tuple(x for x in layers if x != i))
            for i in layers
        ]
    if "only" in families:
        variants += [Variant(name=f"only {i}", replayed=(i,)) for i in layers]
    if "first" in families:
        # "first 0" is "none" and "first L" is "all".
        variants += [Variant(name=f"first {n}", replayed=layers[:n]) for n in range(1, len(layers))]
    # The weights change once at most: the rollout's come last.
    return sorted(variants, key=lambda variant: variant.is_rollout_weights)


def sequence_sums(
    logp_pi_N: torch.Tensor, entropy_pi_N: torch.Tensor, batch: RaggedBatch
) -> torch.Tensor:
    """Return for each sequence the sums over its response tokens: `COLUMNS`, float64 [S, 4].

    `excess` is log pi + entropy of pi: zero in expectation for tokens that were sampled from pi.
    """
    ignored_N = ~batch.mask_N
    log_rho_N = (logp_pi_N.double() - batch.logp_mu_N.double()).masked_fill(ignored_N, 0.0)
    k3_N = torch.expm1(log_rho_N) - log_rho_N
    excess_N = (logp_pi_N.double() + entropy_pi_N.double()).masked_fill(ignored_N, 0.0)
    return batch.sums(torch.stack([-log_rho_N, k3_N, excess_N, batch.mask_N.double()], -1))


class Progress:
    """The results so far, in a file from which a stopped attribution resumes.

    Args:
        path: JSON file; None keeps them in memory only.
        fingerprint: Of everything that determines the results.

    Raises:
        ConfigError: The file belongs to another batch, checkpoint, or settings.
    """

    def __init__(self, path: Path | None, fingerprint: Mapping[str, str]) -> None:
        self._path = path
        self._fingerprint = dict(fingerprint)
        self.sums: dict[str, np.ndarray] = {}
        if path is None or not path.exists():
            return
        with reading(path, "the progress", DataError, also=(KeyError, AttributeError)):
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.sums = {name: np.array(rows, float) for name, rows in stored["sums"].items()}
        for key, value in self._fingerprint.items():
            if stored["fingerprint"].get(key) != value:
                raise ConfigError(
                    f"the progress belongs to another {key}",
                    expected=value,
                    got=stored["fingerprint"].get(key),
                    where=path,
                    fix="Name another file, or remove this one to start again",
                )

    def stop_writing(self) -> None:
        """Keep further results in memory only: one of several ranks writes."""
        self._path = None

    def add(self, name: str, sums_S4: np.ndarray) -> None:
        """Keep one result, on disk if there is a file."""
        self.sums[name] = sums_S4
        if self._path is None:
            return
        content = {
            "fingerprint": self._fingerprint,
            "sums": {name: sums.tolist() for name, sums in self.sums.items()},
        }
        with atomic_write(self._path) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """The parts of the KL, and per layer what each family says of it.

    `excess` is the mean of log pi + entropy of pi in nats: 0 for tokens that were sampled from pi,
    above it for a truncated (top-p, top-k, min-p) or cooled mu. Engines that report log-probs from
    before the truncation, as SGLang does, hide it from every KL.
    """

    estimator: str
    num_sequences: int
    num_tokens: int
    kl: dict[str, Estimate]
    parts: dict[str, Estimate]
    excess: Estimate
    layers: dict[int, dict[str, Estimate]]

    @property
    def is_truncated(self) -> bool:
        """Whether mu sampled from less than pi's support, or at a lower temperature."""
        return self.excess.exceeds(NOTABLE_EXCESS)

    @property
    def harmed_layers(self) -> list[int]:
        """Layers that are far closer to the rollout when they route live: wrong routes."""
        limit = -HARMFUL_SHARE * self.kl["all"].value
        return [
            layer
            for layer, estimates in self.layers.items()
            if "leave_out" in estimates
            and estimates["leave_out"].high < 0
            and estimates["leave_out"].value < limit
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the content of `attribution.json`, which a run's report shows."""
        content = asdict(self)
        content["parts"] = [
            {"name": name, "kl": part.value, "interval": [part.low, part.high]}
            for name, part in self.parts.items()
        ]
        content["layers"] = [
            {"layer": layer}
            | {name: e.value for name, e in estimates.items()}
            | {f"{name}_interval": [e.low, e.high] for name, e in estimates.items()}
            for layer, estimates in self.layers.items()
        ]
        return content

    def text(self) -> str:
        """Return the human-readable report; a star marks what differs from zero."""
        lines = [
            f"KL(mu || pi) per response token ({self.estimator}), {self.num_sequences} sequences, "
            f"{self.num_tokens} tokens, 95 % intervals over sequences",
            "",
        ]
        lines += [f"  {name:12s} {part}" for name, part in self.parts.items()]
        lines += [f"  {'= total':12s} {self.kl['none']}   (live routing)"]
        if "rollout" not in self.kl:
            lines[2] += "   (staleness included, unless these weights sampled)"
        lines += [f"  {'excess':12s} {self.excess}   (0 for tokens sampled from pi)"]
        if self.is_truncated:
            lines += [
                "",
                f"  The sampled tokens are {self.excess.value:.3f} nats likelier than the policy's "
                "entropy says: mu was truncated",
                "  (top-p, top-k, min-p) or cooled, and the trainer does not apply it.",
            ]
        if self.harmed_layers:
            layers = ", ".join(map(str, self.harmed_layers))
            lines += ["", f"  Replay makes layer {layers} worse: its routes are not the rollout's."]
        families = list(dict.fromkeys(n for by_name in self.layers.values() for n in by_name))
        for family in families:
            lines += ["", f"  layer  {HEADINGS[family]}"]
            for layer, by_name in self.layers.items():
                star = "*" if by_name[family].is_clear else " "
                lines.append(f"  {layer:5d}  {by_name[family]} {star}")
        return "\n".join(lines)


HEADINGS = {
    "leave_out": "cost of its live routing: KL(without) - KL(all)",
    "alone": "gain of its replay alone: KL(none) - KL(only)",
    "step": "its step when layers are replayed one after another",
}


def attribute(
    variants: Sequence[Variant],
    score: Callable[[Variant], torch.Tensor],
    progress: Progress,
    on_result: Callable[[Variant, float], None] = lambda variant, kl: None,
) -> None:
    """Score the variants that `progress` does not hold yet.

    Args:
        variants: From `plan`.
        score: Scores a variant: `sequence_sums` of the whole batch. Where several ranks call this
            function, it is collective and returns the same on all.
        progress: Takes the results.
        on_result: Called after each with its KL (k3).
    """
    for variant in variants:
        if variant.name in progress.sums:
            continue
        sums_S4 = score(variant).cpu().numpy()
        progress.add(variant.name, sums_S4)
        # k3: the other estimator may be negative, which reads as an error in a progress bar.
        on_result(variant, float(sums_S4[:, 1].sum() / max(1.0, sums_S4[:, 3].sum())))


def summarize(
    layers: Sequence[int],
    sums: Mapping[str, np.ndarray],
    estimator: str = "k3",
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Attribution:
    """Return estimates with bootstrap intervals; all use the same resamples of sequences.

    Args:
        layers: The routed layers, as in `plan`.
        sums: `sequence_sums` by variant name.
        estimator: "k3" (never negative, less noise) or "k1" (unbiased, may be negative).
        num_resamples: Resamples of whole sequences: tokens of one sequence depend on each other.
        seed: Of the resampling; the same seed gives the same intervals.
    """
    column = COLUMNS.index(estimator)
    generator = np.random.default_rng(seed)
    num_sequences = len(sums["none"])
    weights_BS = generator.multinomial(
        num_sequences, np.full(num_sequences, 1 / num_sequences), num_resamples
    )
    counts_S = sums["none"][:, 3]
    # The first "resample" is the batch itself.
    weights_BS = np.concatenate([np.ones((1, num_sequences)), weights_BS])
    totals_B = np.maximum(weights_BS @ counts_S, 1.0)
    kl = {name: weights_BS @ rows[:, column] / totals_B for name, rows in sums.items()}
    # The policy that sampled, as well as the trainer can compute it.
    nearest = next(name for name in ("rollout", "gates", "all") if name in sums)
    excess_B = weights_BS @ sums[nearest][:, COLUMNS.index("excess")] / totals_B
    replayed = kl.get("gates", kl["all"])
    parts = {"numerics": kl[nearest], "staleness": replayed - kl[nearest]}
    if "gates" in kl:
        parts["gates"] = kl["all"] - replayed
    parts["routing"] = kl["none"] - kl["all"]
    return Attribution(
        estimator=estimator,
        num_sequences=num_sequences,
        num_tokens=int(counts_S.sum()),
        kl={name: Estimate.of(values_B) for name, values_B in kl.items()},
        parts={name: Estimate.of(values_B) for name, values_B in parts.items()},
        excess=Estimate.of(excess_B),
        layers=_by_layer(tuple(layers), kl),
    )


def _by_layer(
    layers: tuple[int, ...], kl: Mapping[str, np.ndarray]
) -> dict[int, dict[str, Estimate]]:
    by_layer: dict[int, dict[str, Estimate]] = {}
    for index, layer in enumerate(layers):
        estimates = {}
        if f"without {layer}" in kl:
            estimates["leave_out"] = Estimate.of(kl[f"without {layer}"] - kl["all"])
        if f"only {layer}" in kl:
            estimates["alone"] = Estimate.of(kl["none"] - kl[f"only {layer}"])
        before = kl["none"] if index == 0 else kl.get(f"first {index}")
        after = kl["all"] if index == len(layers) - 1 else kl.get(f"first {index + 1}")
        if before is not None and after is not None and len(layers) > 1:
            estimates["step"] = Estimate.of(before - after)
        by_layer[layer] = estimates
    return by_layer
