"""Tables over seeds: means with intervals, differences paired by seed, and one picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from scipy import stats

from .results import Result

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds and its Student-t interval; without width (nan) for a single seed."""

    mean: float
    half_width: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Reduce one value of each seed."""
        count = len(values)
        mean = sum(values) / count if count else math.nan
        if count < 2:
            return cls(mean=mean, half_width=math.nan, count=count)
        variance = sum((v - mean) ** 2 for v in values) / (count - 1)
        quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1))
        return cls(mean=mean, half_width=quantile * math.sqrt(variance / count), count=count)

    def __str__(self) -> str:
        width = "" if math.isnan(self.half_width) else f" ± {self.half_width:.2g}"
        return f"{self.mean:.3g}{width} ({self.count})"


def last(metric: str) -> Callable[[Result], float]:
    """Return a function that takes a metric's last value."""
    return lambda run: _or_nan(run.values(metric)[-1:])


def mean(metric: str) -> Callable[[Result], float]:
    """Return a function that takes a metric's mean over the steps."""
    return lambda run: _or_nan(run.values(metric))


def largest(metric: str) -> Callable[[Result], float]:
    """Return a function that takes a metric's maximum over the steps."""
    return lambda run: max(run.values(metric), default=math.nan)


# Columns of the table, by heading.
COLUMNS: dict[str, Callable[[Result], float]] = {
    "held-out reward, after": last("eval/reward"),
    "k3 as trained": mean("train_infer/kl_k3"),
    "k3 live": mean("train_infer/kl_k3_live"),
    "ESS of w": mean("off_policy/ess"),
    "extreme tokens": mean("off_policy/extreme_tau2"),
    "entropy, after": last("entropy"),
    "largest gradient norm": largest("grad_norm"),
    "live mass": mean("routing_replay/live_mass"),
}


def summary(results: Sequence[Result]) -> str:
    """Return a Markdown table: one row per cell, mean ± interval (seeds)."""
    rows = [["cell", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for cell, runs in by_cell(results).items():
        values = ([column(run) for run in runs.values()] for column in COLUMNS.values())
        rows.append([cell, *(str(Interval.of([v for v in row if v == v])) for row in values)])
    return _markdown(rows)


def differences(results: Sequence[Result], baseline: str, heading: str) -> str:
    """Return a Markdown table: each cell minus the baseline cell, paired by seed.

    Raises:
        KeyError: No such cell or column.
    """
    cells, column = by_cell(results), COLUMNS[heading]
    reference = cells[baseline]
    rows = [["cell", f"{heading}, minus {baseline}"], ["---"] * 2]
    for cell, runs in cells.items():
        shared = sorted(runs.keys() & reference.keys())
        pairs = [column(runs[seed]) - column(reference[seed]) for seed in shared]
        if cell != baseline:
            rows.append([cell, str(Interval.of([v for v in pairs if v == v]))])
    return _markdown(rows)


def by_cell(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
    """Return the runs of each cell by seed."""
    cells: dict[str, dict[int, Result]] = {}
    for run in results:
        cells.setdefault(run.cell, {})[run.seed] = run
    return cells


def picture(results: Sequence[Result], heading: str) -> str:
    """Return an SVG: one line per cell with each seed's dot, the mean and its interval."""
    column = COLUMNS[heading]
    cells = {
        cell: [v for v in map(column, runs.values()) if v == v]
        for cell, runs in by_cell(results).items()
    }
    values = [v for row in cells.values() for v in row]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    span = (high - low) or 1.0
    left, width, row_height = 260, 420, 22
    height = row_height * (len(cells) + 2)

    def x(value: float) -> float:
        clamped = min(max((value - low) / span, -0.05), 1.05)
        return left + width * clamped

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 60} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<text x="{left}" y="14">{escape(heading)}: {low:.3g} to {high:.3g}</text>',
    ]
    for number, (cell, row) in enumerate(cells.items()):
        y, interval = row_height * (number + 1.7), Interval.of(row)
        parts.append(f'<text x="4" y="{y + 4}">{escape(cell)}</text>')
        if not math.isnan(interval.half_width):
            ends = x(interval.mean - interval.half_width), x(interval.mean + interval.half_width)
            parts.append(f'<path d="M{ends[0]:.1f} {y}H{ends[1]:.1f}" stroke="#888"/>')
        if row:
            parts.append(f'<path d="M{x(interval.mean):.1f} {y - 7}v14" stroke="#d6451c"/>')
        parts += [f'<circle cx="{x(v):.1f}" cy="{y}" r="3" fill="#345"/>' for v in row]
    return "\n".join([*parts, "</svg>\n"])


def _or_nan(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
