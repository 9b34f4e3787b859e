"""What stands out in a run, in words. Quiet for a healthy run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .run import Run, first_known, flatten

GRADIENT_NAMES = ("grad_norm", "train/grad_norm", "actor/grad_norm")
ENTROPY_NAMES = ("entropy", "train/entropy", "policy/entropy", "actor/entropy")

# The R3 paper (2510.11370) and its follow-up report k3 = 1e-3 for live bf16 engines, up to 4e-3.
HIGH_KL_K3 = 1e-2
# The same paper: F(2) below 2e-3 in healthy live runs, above 0.1 at the collapse.
MANY_EXTREMES, TOO_MANY_EXTREMES = 1e-2, 1e-1
# Half of the gap gone is what the papers report as the least useful effect of replay.
USEFUL_REPLAY_RATIO = 2.0
# A dense model, which has no routes, shows 6.4e-4 there: much less is nothing to improve.
NEGLIGIBLE_KL_K3 = 1e-4
# About 10 % of a layer's routers differ between two bf16 engines (same paper): twice that stands
# out, and so does a layer that differs three times as often as the median layer.
MANY_DIFFER, NOTABLE_DIFFER, OUTLIER_FACTOR = 0.2, 0.02, 3.0
# A margin at which bf16 noise of the router's logits (2^-8 of their size, about 4) decides.
SMALL_MARGIN = 2.0**-6
# An exact-set rate of unrelated routes is near zero; of related ones it never falls this low.
UNRELATED_EXACT_MATCH = 0.05
# Two engines disagree on near ties: where the sets differ, the replayed experts hold almost as much
# of the live router's mass (measured here: 0.002 to 0.03 nats less). Routes of other tokens or with
# other expert numbers are no near misses (0.2 to 0.7).
NO_NEAR_MISS = 0.1
# A router KL this many times the median layer's means another precision or other weights.
OUTLIER_ROUTER_KL = 5.0
# Over tokens sampled from mu the mean of pi / mu is 1. It is k3 - k1 + 1: two metrics suffice. A
# top-p of 0.99 already leaves out about this much mass; a healthy run's noise is far smaller.
TRUNCATED_MASS = 5e-3
# Effective share of the samples under which most of a batch's gradient is lost to few tokens.
LOW_ESS = 0.5
ENTROPY_COLLAPSE = 0.2
# Norms of one run stay within a factor of a few; a spike of 20 times the median is another regime.
OUTLIER_GRADIENT = 20.0
# Balanced training leaves hardly any expert without a token in 16,384; ours, from two healthy runs.
MANY_DEAD = 0.1
# One expert of 8 gets an eighth when the load is even: a quarter of all is twice that or more.
HIGH_LOAD = 0.25
SHOWN_LAYERS = 4
MODE = re.compile(r"(^|\.|routing_replay_)mode$")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence about a run. `severity` is "bad", "warn" or "note"."""

    severity: str
    text: str


def findings_of(run: Run) -> list[Finding]:
    """All findings of a run, the worst first."""
    found = [
        *_policy_findings(run),
        *_layer_findings(run),
        *_load_findings(run),
        *_coverage_findings(run),
        *_training_findings(run),
        *(Finding(severity="note", text=note) for note in run.notes),
    ]
    return sorted(found, key=lambda finding: ("bad", "warn", "note").index(finding.severity))


def _policy_findings(run: Run) -> list[Finding]:
    found = []
    replayed, live = run.recent("train_infer/kl_k3"), run.recent("train_infer/kl_k3_live")
    if replayed is not None and replayed > HIGH_KL_K3:
        text = (
            f"The train-inference KL (k3) is {replayed:.2g}, above {HIGH_KL_K3:g}: "
            "see docs/high_kl.md."
        )
        found.append(Finding(severity="bad", text=text))
    replays = not any(MODE.search(k) and v == "disabled" for k, v in flatten(run.config).items())
    if replays and replayed is not None and live is not None and live > NEGLIGIBLE_KL_K3:
        if replayed >= live:
            text = (
                f"Replay raises the KL (k3 {live:.2g} live, {replayed:.2g} replayed): the routes "
                "that are replayed are not the ones that the rollout took."
            )
            found.append(Finding(severity="bad", text=text))
        elif live < USEFUL_REPLAY_RATIO * replayed:
            text = (
                f"Replay lowers the KL only {live / replayed:.1f}x (k3 {live:.2g} live, "
                f"{replayed:.2g} replayed): most of the gap is not routing but numerics, staleness "
                "or sampling; tools/attribute_kl.py tells."
            )
            found.append(Finding(severity="warn", text=text))
    found += _support_findings(run, replayed)
    extreme = run.recent("train_infer/extreme_tau2")
    if extreme is not None and extreme > MANY_EXTREMES:
        severity = "bad" if extreme > TOO_MANY_EXTREMES else "warn"
        text = f"{_percent(extreme)} of tokens have probabilities a factor 2 apart."
        found.append(Finding(severity=severity, text=text))
    for name, label in (("train_infer", "discrepancy m"), ("staleness", "staleness r")):
        ess = run.recent(f"{name}/ess")
        if ess is not None and ess < LOW_ESS:
            text = f"The weights of the {label} leave {_percent(ess)} of the samples effective."
            found.append(Finding(severity="warn", text=text))
    broken = max((v or 0 for v in run.series.get("train_infer/nonfinite_tokens", [])), default=0)
    if broken:
        text = f"Up to {broken:.0f} tokens of a step have no finite log-prob."
        found.append(Finding(severity="bad", text=text))
    return found


def _support_findings(run: Run, k3: float | None) -> list[Finding]:
    k1 = run.recent("train_infer/kl_k1")
    if k1 is None or k3 is None or k1 - k3 < TRUNCATED_MASS:
        return []
    text = (
        f"The mean of pi / mu is {1 + k3 - k1:.3f} instead of 1: the engine's log-probs are of a "
        "truncated distribution (top-p, top-k, min-p) that the trainer does not apply."
    )
    return [Finding(severity="bad", text=text)]


def _layer_findings(run: Run) -> list[Finding]:
    matches = run.recent_by_layer("routing_replay/exact_match")
    differ = {layer: 1 - match for layer, match in matches.items()}
    if not differ:
        return []
    median = _median(differ)
    found = []
    standing_out = [
        i
        for i, share in differ.items()
        if share > MANY_DIFFER or share > max(NOTABLE_DIFFER, OUTLIER_FACTOR * median)
    ]
    wrong = [i for i in standing_out if _is_unrelated(run, i, differ[i])]
    if wrong:  # what follows the first wrong layer is its consequence
        standing_out = [i for i in standing_out if i <= wrong[0]]
    standing_out.sort(key=lambda i: -differ[i])
    for i in standing_out[:SHOWN_LAYERS]:
        text = f"Layer {i} differs on {_percent(differ[i])} of tokens (the median layer on "
        text += f"{_percent(median)}); {_cause(run, i, i in wrong)}."
        found.append(Finding(severity="bad" if i in wrong else "warn", text=text))
    if len(standing_out) > SHOWN_LAYERS:
        text = f"{len(standing_out) - SHOWN_LAYERS} further layers differ as clearly."
        found.append(Finding(severity="warn", text=text))
    return found


def _is_unrelated(run: Run, layer: int, differ: float) -> bool:
    bias = run.recent_by_layer("routing_replay/replay_bias").get(layer, 0.0)
    return 1 - differ < UNRELATED_EXACT_MATCH or bias / differ > NO_NEAR_MISS


def _cause(run: Run, layer: int, is_unrelated: bool) -> str:
    if is_unrelated:
        return (
            "its routes are of other tokens, of another layer, or number the experts otherwise: "
            "`routing-replay diff` says which"
        )
    margin = run.recent_by_layer("routing_replay/margin").get(layer)
    if margin is not None and margin < SMALL_MARGIN:
        return f"its router's margin is small ({margin:.2g}), so rounding decides"
    for name, words in (("router_kl", "router KL"), ("router_kl_bound", "router KL, at least")):
        kls = run.recent_by_layer(f"routing_replay/{name}")
        if layer in kls and kls[layer] > OUTLIER_ROUTER_KL * _median(kls):
            return (
                f"its router itself differs ({words} {kls[layer]:.2g} nats, the median layer "
                f"{_median(kls):.2g}): compare this layer's precision and weights"
            )
    shown = "" if margin is None else f" ({margin:.2g})"
    return f"its router's margin is not small{shown}: compare what flows into this layer"


def _coverage_findings(run: Run) -> list[Finding]:
    found = []
    coverage = run.recent("routing_replay/coverage")
    if coverage is not None and coverage == 0:
        text = "Nothing was replayed: the server or a gateway dropped the routes (see doctor)."
        found.append(Finding(severity="bad", text=text))
    return found


def _load_findings(run: Run) -> list[Finding]:
    dead = run.recent_by_layer("routing_replay/dead_experts")
    loads = run.recent_by_layer("routing_replay/max_load")
    uneven = [i for i in dead if dead[i] > MANY_DEAD or loads.get(i, 0.0) > HIGH_LOAD]
    uneven.sort(key=lambda i: (-dead[i], -loads.get(i, 0.0)))
    findings = []
    for i in uneven[:SHOWN_LAYERS]:
        text = f"The busiest expert of layer {i} takes {_percent(loads.get(i, 0.0))} of its load"
        if dead[i] > MANY_DEAD:
            text += f"; {_percent(dead[i])} of the layer's experts receive no token"
        findings.append(Finding(severity="warn", text=text + "."))
    if len(uneven) > SHOWN_LAYERS:
        text = f"{len(uneven) - SHOWN_LAYERS} further layers use their experts unevenly."
        findings.append(Finding(severity="warn", text=text))
    return findings


def _training_findings(run: Run) -> list[Finding]:
    return [*_gradient_findings(run), *_entropy_findings(run)]


def _gradient_findings(run: Run) -> list[Finding]:
    name = first_known(run, GRADIENT_NAMES)
    norms = {
        step: norm
        for step, norm in zip(run.steps, run.series.get(name or "", ()), strict=False)
        if norm is not None
    }
    outliers = [i for i in norms if norms[i] > OUTLIER_GRADIENT * _median(norms) > 0]
    if not outliers:
        return []
    worst = max(outliers, key=lambda i: norms[i])
    text = (
        f"The gradient norm of step {worst} is {norms[worst]:.3g}, the median {_median(norms):.2g}"
    )
    if len(outliers) > 1:
        text += f"; {len(outliers)} steps are outliers"
    return [Finding(severity="warn", text=text + ".")]


def _entropy_findings(run: Run) -> list[Finding]:
    name = first_known(run, ENTROPY_NAMES)
    before, after = (run.earliest(name), run.recent(name)) if name else (None, None)
    if before and after is not None and after < ENTROPY_COLLAPSE * before:
        text = f"The entropy fell from {before:.2g} to {after:.2g}."
        return [Finding(severity="warn", text=text)]
    return []


def _median(by_layer: Mapping[int, float]) -> float:
    """The lower median: a layer's value, also of an even number of layers."""
    return sorted(by_layer.values())[(len(by_layer) - 1) // 2]


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
