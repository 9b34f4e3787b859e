"""The sections of a report, each from runs to HTML; "" where a run has nothing to show."""

from __future__ import annotations

import html
from collections.abc import Sequence

from .charts import Line, bar_chart, line_chart
from .findings import ENTROPY_NAMES, GRADIENT_NAMES, diagnose, sentence
from .markup import cards, folded, number, table
from .run import Run, first_known, flatten

REWARD_NAMES = ("reward", "reward/mean", "train/reward", "rollout/reward", "reward_mean")
EVALUATION_NAMES = ("eval/reward", "reward/eval", "heldout/reward", "eval_reward", "reward_eval")
LENGTH_NAMES = ("response_length", "response/length", "rollout/response_length", "response_tokens")
TIME_NAMES = ("time_s", "step_time_s", "time/step_s")
LIVE_SUFFIX = "_live"
FINDING_WORDS = {"error": "problem", "warning": "look at", "note": "note", "ok": "healthy"}

# title, caption, metrics (name, what the legend adds), scale
POLICY_CHARTS = (
    (
        "Train-inference KL (k3)",
        "Between the engine that sampled and the trainer, per response token, in nats. "
        "Dashed: the trainer's own live routes.",
        (("train_infer/kl_k3", ""), ("train_infer/kl_k3_live", "live")),
        "log",
    ),
    (
        "Train-inference KL (k1)",
        "The plain estimator of the same quantity: unbiased, may be negative.",
        (("train_infer/kl_k1", ""), ("train_infer/kl_k1_live", "live")),
        "linear",
    ),
    (
        "Discrepancy m and staleness r",
        "k3 of pi_old against mu (engines) and of pi_theta against pi_old (updates; dashed).",
        (("train_infer/kl_k3", "m"), ("staleness/kl_k3", "r, staleness")),
        "log",
    ),
    (
        "Extreme tokens",
        "Share of tokens whose probabilities differ by more than a factor of 2.",
        (("train_infer/extreme_tau2", ""), ("train_infer/extreme_tau2_live", "live")),
        "linear",
    ),
    (
        "Largest |dlogp|",
        "The worst token of each step: max |log pi_old - log mu|.",
        (("train_infer/logp_abs_diff_max", ""), ("train_infer/logp_abs_diff_max_live", "live")),
        "log",
    ),
    (
        "Effective sample share",
        "Of the importance weights m; 1 where the engines agree.",
        (("train_infer/ess", ""), ("train_infer/ess_live", "live")),
        "linear",
    ),
)

RECEIPT_WORDS = ("coverage", "fallback_fraction", "receipt", "expected", "replayed_rows")


def summary(runs: Sequence[Run]) -> str:
    """Return one row per run: where it started, where it is now."""
    head = ["run", "steps", "reward, first to last quarter", "entropy"]
    head += ["KL k3 replayed", "KL k3 live", "live / replayed", "tokens with a differing layer"]
    head += ["router rows replayed", "s per step"]
    rows = []
    for run in runs:
        reward = first_known(run, REWARD_NAMES)
        replayed = run.recent(run.named("train_infer/kl_k3"))
        live = run.recent(run.named("train_infer/kl_k3" + LIVE_SUFFIX))
        ratio = f"{live / replayed:.1f}x" if live is not None and replayed else "–"
        rose = f"{number(run.earliest(reward))} → {number(run.recent(reward))}" if reward else "–"
        entropy, time = first_known(run, ENTROPY_NAMES), first_known(run, TIME_NAMES)
        rows.append(
            [
                html.escape(run.name),
                str(len(run.steps)),
                rose,
                number(run.recent(entropy)) if entropy else "–",
                number(replayed),
                number(live),
                ratio,
                number(run.recent(run.named("routing_replay/any_layer_differs")), percent=True),
                number(run.recent("routing_replay/coverage"), percent=True),
                number(run.recent(time)) if time else "–",
            ]
        )
    note = '<p class="quiet">Means of the last quarter of each run\'s steps.</p>'
    return table(head, rows) + note


def findings(runs: Sequence[Run]) -> str:
    """Return the findings in words, run by run."""
    items = []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        rows = [(finding.level, sentence(finding)) for finding in diagnose(run)]
        for level, text in rows or [("ok", "nothing stands out.")]:
            text = html.escape(prefix + text)
            items.append(
                f'<li class="{level}"><b>{FINDING_WORDS[level]}</b><span>{text}</span></li>'
            )
    return f'<ul class="card findings">{"".join(items)}</ul>'


def training(runs: Sequence[Run]) -> str:
    """Return charts of reward, entropy, gradient norm, length and time."""
    groups = (
        ("Reward", "Mean over the step's responses.", REWARD_NAMES, "linear"),
        ("Reward on held-out prompts", "Where it was evaluated.", EVALUATION_NAMES, "linear"),
        ("Entropy", "Of the policy, per response token, in nats.", ENTROPY_NAMES, "auto"),
        ("Gradient norm", "Before clipping.", GRADIENT_NAMES, "auto"),
        ("Response length", "Mean number of tokens.", LENGTH_NAMES, "linear"),
        ("Time per step", "Seconds, rollouts included.", TIME_NAMES, "auto"),
    )
    figures = []
    for title, caption, names, scale in groups:
        lines = []
        for color, run in enumerate(runs):
            name = first_known(run, names)
            if name:
                lines.append(_line(run, name, run.name, color))
        figures.append(line_chart(title, caption, lines, scale))
    return cards(figures)


def policy(runs: Sequence[Run]) -> str:
    """Return charts of the gap between the policies; every second curve of a run is dashed."""
    figures = []
    for title, caption, metrics, scale in POLICY_CHARTS:
        lines = []
        for color, run in enumerate(runs):
            for is_second, (name, adds) in enumerate(metrics):
                parts = [run.name] if len(runs) > 1 else []
                label = ", ".join([*parts, *([adds] if adds else [])]) or "replayed"
                shown = run.named(name)
                if shown != name:
                    label += f", {shown.removeprefix(name + '_').replace('_', ' ')}"
                if shown in run.series:
                    lines.append(_line(run, shown, label, color, dashed=bool(is_second)))
        figures.append(line_chart(title, caption, lines, scale))
    return cards(figures)


def attribution(runs: Sequence[Run]) -> str:
    """Return what each layer's routing costs, where tools/attribute_kl.py was run."""
    figures = []
    for run in runs:
        content = run.attribution or {}
        heading = f" ({run.name})" if len(runs) > 1 else ""
        parts = [(p["name"], p["kl"], *p["interval"]) for p in content.get("parts", ())]
        if parts:
            caption = "The KL (k3) and its parts; lines are 95 % intervals over sequences."
            figures.append(bar_chart("Where the KL comes from" + heading, caption, parts))
        costs = [
            (f"layer {row['layer']}", row["leave_out"], *row["leave_out_interval"])
            for row in content.get("layers", ())
            if "leave_out" in row
        ]
        if costs:
            caption = "KL (k3) with every layer replayed but this one, minus all replayed."
            figures.append(bar_chart("Cost of each layer's routing" + heading, caption, costs))
    return cards(figures)


def receipts(runs: Sequence[Run]) -> str:
    """Return how many rows were replayed: the proof that replay took place."""
    rows = []
    for run in runs:
        for name, values in run.series.items():
            if any(word in name for word in RECEIPT_WORDS):
                kept = [v for v in values if v is not None]
                if kept:
                    row = [run.name, name, *map(number, (kept[0], kept[-1], min(kept), max(kept)))]
                    rows.append([html.escape(cell) for cell in row])
    return table(["run", "metric", "first", "last", "least", "most"], rows) if rows else ""


def configuration(runs: Sequence[Run]) -> str:
    """Return all settings; those that differ between the runs are marked and come first."""
    flat = [flatten(run.config) for run in runs]
    names = sorted({name for settings in flat for name in settings})

    def differs(name: str) -> bool:
        return len({settings.get(name) for settings in flat}) > 1

    names.sort(key=lambda name: not differs(name))
    rows = []
    for name in names:
        opened, closed = ('<span class="differs">', "</span>") if differs(name) else ("", "")
        cells = [opened + html.escape(settings.get(name, "–")) + closed for settings in flat]
        rows.append([html.escape(name), *cells])
    if not rows:
        return ""
    content = table(["setting", *(html.escape(run.name) for run in runs)], rows, "settings")
    count = sum(map(differs, names))
    label = f"{len(names)} settings" + (f", {count} differ" if count else "")
    return folded(label, content)


def all_metrics(runs: Sequence[Run]) -> str:
    """Return every metric's first and last quarter; of one with layers, of their mean."""
    names = sorted({n for run in runs for n in run.series if run.recent(n) is not None})
    rows = []
    for name in names:
        cells = [f"{number(r.earliest(name))} → {number(r.recent(name))}" for r in runs]
        rows.append([html.escape(name), *cells])
    content = table(["metric, first → last quarter", *(html.escape(r.name) for r in runs)], rows)
    label = f"{len(names)} metrics"
    return folded(label, content)


def _line(run: Run, name: str, label: str, color: int, dashed: bool = False) -> Line:
    points = list(zip(run.steps, run.series[name], strict=True))
    if name in EVALUATION_NAMES:  # measured now and then: connect what there is
        points = [point for point in points if point[1] is not None]
    steps, values = [step for step, _ in points], [value for _, value in points]
    return Line(label=label, steps=steps, values=values, color=color, dashed=dashed)
