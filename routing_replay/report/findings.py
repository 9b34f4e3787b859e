"""What stands out in a run, in words. Nothing for a healthy run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ..findings import Finding, Level
from ..metrics.version_lag import lag_suffix, lags_of
from .run import Run, first_known, flatten

GRADIENT_NAMES = ("grad_norm", "train/grad_norm", "actor/grad_norm")
ENTROPY_NAMES = ("entropy", "train/entropy", "policy/entropy", "actor/entropy")

# The R3 paper (2510.11370) and its follow-up report k3 = 1e-3 for live bf16 engines, up to 4e-3.
HIGH_KL_K3 = 1e-2
# The same paper: F(2) below 2e-3 in healthy live runs, above 0.1 at the collapse.
MANY_EXTREMES, TOO_MANY_EXTREMES = 1e-2, 1e-1
# The papers report half of the gap as the least useful effect of replay.
USEFUL_REPLAY_RATIO = 2.0
# A dense model, which has no routes, shows 6.4e-4 there: much less leaves nothing to improve.
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
# Norms of one run stay within a factor of a few; 20 times the median is another regime. Ours.
OUTLIER_GRADIENT = 20.0
# Balanced training leaves hardly any expert without a token in 16,384. Ours.
MANY_DEAD = 0.1
# With 8 experts an even load is an eighth: a quarter is twice that, and more with more experts.
HIGH_LOAD = 0.25
SHOWN_LAYERS = 4
MODE = re.compile(r"(^|\.|routing_replay_)mode$")
PREFIX = "routing_replay/"


def diagnose(run: Run) -> list[Finding]:
    """Return all findings of a run, the worst first."""
    findings = [
        *_gap(run),
        *_truncated_support(run),
        *_extremes(run),
        *_sample_shares(run),
        *_nonfinite(run),
        *_layers(run),
        *_load(run),
        *_coverage(run),
        *_gradient(run),
        *_entropy(run),
        *(Finding(level="note", name="files", what=note) for note in run.notes),
    ]
    return sorted(findings, key=lambda finding: finding.rank)


def sentence(finding: Finding) -> str:
    """Return a finding as text for the page and the terminal."""
    parts = (finding.what, finding.cause, finding.fix)
    return ". ".join(part.rstrip(".") for part in parts if part) + "."


def _gap(run: Run) -> Iterator[Finding]:
    replayed, live = run.recent("train_infer/kl_k3"), run.recent("train_infer/kl_k3_live")
    if replayed is not None and replayed > HIGH_KL_K3:
        what = f"The train-inference KL (k3) is {replayed:.2g}, above {HIGH_KL_K3:g}"
        yield Finding(level="error", name="high-kl", what=what, fix="See docs/high_kl.md")
    is_off = any(MODE.search(k) and v == "disabled" for k, v in flatten(run.config).items())
    if is_off or replayed is None or live is None or live <= NEGLIGIBLE_KL_K3:
        return
    figures = f"k3 {live:.2g} live, {replayed:.2g} replayed"
    if replayed >= live:
        what = f"Replay raises the KL ({figures})"
        cause = "The replayed routes are not the ones that the rollout took"
        yield Finding(level="error", name="replay-harms", what=what, cause=cause)
    elif live < USEFUL_REPLAY_RATIO * replayed:
        yield Finding(
            level="warning",
            name="replay-is-weak",
            what=f"Replay lowers the KL only {live / replayed:.1f}x ({figures})",
            cause="Most of the gap is not routing but numerics, staleness or sampling",
            fix="tools/attribute_kl.py tells them apart",
        )


def _truncated_support(run: Run) -> Iterator[Finding]:
    k1, k3 = run.recent("train_infer/kl_k1"), run.recent("train_infer/kl_k3")
    if k1 is not None and k3 is not None and k1 - k3 >= TRUNCATED_MASS:
        yield Finding(
            level="error",
            name="truncated-sampling",
            what=f"The mean of pi / mu is {1 + k3 - k1:.3f} instead of 1",
            cause="The engine's log-probs are of a truncated distribution (top-p, top-k, min-p) "
            "that the trainer does not apply",
        )


def _extremes(run: Run) -> Iterator[Finding]:
    extreme = run.recent("train_infer/extreme_tau2")
    if extreme is not None and extreme > MANY_EXTREMES:
        level: Level = "error" if extreme > TOO_MANY_EXTREMES else "warning"
        what = f"{_percent(extreme)} of tokens have probabilities a factor 2 apart"
        yield Finding(level=level, name="extreme-tokens", what=what)


def _sample_shares(run: Run) -> Iterator[Finding]:
    for name, label in (("train_infer", "discrepancy m"), ("staleness", "staleness r")):
        ess = run.recent(f"{name}/ess")
        if ess is not None and ess < LOW_ESS:
            what = f"The weights of the {label} leave {_percent(ess)} of the samples effective"
            yield Finding(level="warning", name="low-ess", what=what)


def _nonfinite(run: Run) -> Iterator[Finding]:
    name = "train_infer/nonfinite_tokens"
    names = [name + lag_suffix(lag) for lag in lags_of(run.series, name)]
    counts = [count for name in names for count in run.series.get(name, ())]
    largest = max((count or 0 for count in counts), default=0)
    if largest:
        what = f"Up to {largest:.0f} tokens of a step have no finite log-prob"
        yield Finding(level="error", name="nonfinite-tokens", what=what)


def _layers(run: Run) -> Iterator[Finding]:
    matches = run.recent_by_layer(PREFIX + "exact_match")
    differ = {layer: 1 - match for layer, match in matches.items()}
    if not differ:
        return
    median = _median(differ)
    limit = min(MANY_DIFFER, max(NOTABLE_DIFFER, OUTLIER_FACTOR * median))
    outliers = [i for i, share in differ.items() if share > limit]
    wrong = [i for i in outliers if _is_unrelated(run, i, differ[i])]
    if wrong:  # what follows the first wrong layer is its consequence
        outliers = [i for i in outliers if i <= wrong[0]]
    outliers.sort(key=lambda i: -differ[i])
    for i in outliers[:SHOWN_LAYERS]:
        what = f"Layer {i} differs on {_percent(differ[i])} of tokens (the median layer on "
        what += f"{_percent(median)}); {_cause(run, i, i in wrong)}"
        level: Level = "error" if i in wrong else "warning"
        yield Finding(level=level, name="layer-differs", what=what, where=f"layer {i}")
    yield from _further(len(outliers) - SHOWN_LAYERS, "layer-differs", "differ as clearly")


def _is_unrelated(run: Run, layer: int, differ: float) -> bool:
    bias = run.recent_by_layer(PREFIX + "replay_bias").get(layer, 0.0)
    return 1 - differ < UNRELATED_EXACT_MATCH or bias / differ > NO_NEAR_MISS


def _cause(run: Run, layer: int, is_unrelated: bool) -> str:
    if is_unrelated:
        return (
            "its routes are of other tokens, of another layer, or number the experts otherwise: "
            "`routing-replay diff` says which"
        )
    margin = run.recent_by_layer(PREFIX + "margin").get(layer)
    if margin is not None and margin < SMALL_MARGIN:
        return f"its router's margin is small ({margin:.2g}), so rounding decides"
    for name, words in (("router_kl", "router KL"), ("router_kl_bound", "router KL, at least")):
        kls = run.recent_by_layer(PREFIX + name)
        if layer in kls and kls[layer] > OUTLIER_ROUTER_KL * _median(kls):
            return (
                f"its router itself differs ({words} {kls[layer]:.2g} nats, the median layer "
                f"{_median(kls):.2g}): compare this layer's precision and weights"
            )
    shown = "" if margin is None else f" ({margin:.2g})"
    return f"its router's margin is not small{shown}: compare what flows into this layer"


def _load(run: Run) -> Iterator[Finding]:
    dead = run.recent_by_layer(PREFIX + "dead_experts")
    loads = run.recent_by_layer(PREFIX + "max_load")
    uneven = [i for i in dead if dead[i] > MANY_DEAD or loads.get(i, 0.0) > HIGH_LOAD]
    uneven.sort(key=lambda i: (-dead[i], -loads.get(i, 0.0)))
    for i in uneven[:SHOWN_LAYERS]:
        what = f"The busiest expert of layer {i} takes {_percent(loads.get(i, 0.0))} of its load"
        if dead[i] > MANY_DEAD:
            what = f"{_percent(dead[i])} of the experts of layer {i} receive no token. {what}"
        yield Finding(level="warning", name="uneven-load", what=what, where=f"layer {i}")
    yield from _further(len(uneven) - SHOWN_LAYERS, "uneven-load", "use their experts unevenly")


def _further(count: int, name: str, words: str) -> Iterator[Finding]:
    if count > 0:
        yield Finding(level="warning", name=name, what=f"{count} further layers {words}")


def _coverage(run: Run) -> Iterator[Finding]:
    if run.recent(PREFIX + "coverage") == 0:
        yield Finding(
            level="error",
            name="nothing-replayed",
            what="Nothing was replayed: the server or a gateway dropped the routes",
            fix="Run `routing-replay doctor --url URL`",
        )


def _gradient(run: Run) -> Iterator[Finding]:
    name = first_known(run, GRADIENT_NAMES)
    if name is None:
        return
    pairs = zip(run.steps, run.series[name], strict=True)
    norms = {step: norm for step, norm in pairs if norm is not None}
    outliers = [i for i in norms if norms[i] > OUTLIER_GRADIENT * _median(norms) > 0]
    if not outliers:
        return
    worst = max(outliers, key=lambda i: norms[i])
    what = (
        f"The gradient norm of step {worst} is {norms[worst]:.4g}, the median {_median(norms):.2g}"
    )
    if len(outliers) > 1:
        what += f"; {len(outliers)} steps are such outliers"
    yield Finding(level="warning", name="gradient-outlier", what=what, where=f"step {worst}")


def _entropy(run: Run) -> Iterator[Finding]:
    name = first_known(run, ENTROPY_NAMES)
    before, after = (run.earliest(name), run.recent(name)) if name else (None, None)
    if before and after is not None and after < ENTROPY_COLLAPSE * before:
        what = f"The entropy fell from {before:.2g} to {after:.2g}"
        yield Finding(level="warning", name="entropy-collapse", what=what)


def _median(values: Mapping[int, float]) -> float:
    """Return the lower median, which is the value of some layer or step."""
    return sorted(values.values())[(len(values) - 1) // 2]


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
