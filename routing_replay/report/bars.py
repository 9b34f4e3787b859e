"""Bars with intervals as an SVG file: one picture of a comparison."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, writing
from ..files import atomic_write

# Pixels: the bars, the room for labels, values and heading, and the height of a bar with its gap.
WIDTH, LEFT, RIGHT, TOP, ROW, BOTTOM = 420, 170, 110, 56, 28, 16
COLOR, MARKED, TEXT = "#8aa4c8", "#d6451c", "#1c1f23"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One value with its interval; `is_marked` draws it in the colour of what stands out."""

    label: str
    value: float
    low: float
    high: float
    is_marked: bool = False


def write_bars(path: str | os.PathLike[str], heading: str, bars: Sequence[Bar]) -> Path:
    """Write an SVG file, on a white ground for light and dark pages.

    Raises:
        DataError: The file cannot be written.
    """
    path = Path(path)
    with writing(path, "the picture", DataError), atomic_write(path) as partial:
        partial.write_text(render_bars(heading, bars), encoding="utf-8")
    return path


def render_bars(heading: str, bars: Sequence[Bar]) -> str:
    """Return the picture as SVG text; values below zero have no bar but their interval."""
    low = min([0.0, *(bar.low for bar in bars)])
    high = max([1e-12, *(bar.high for bar in bars)])
    width, height = LEFT + WIDTH + RIGHT, TOP + ROW * len(bars) + BOTTOM

    def x(value: float) -> float:
        return LEFT + WIDTH * (value - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="12" fill="{TEXT}">',
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        f'<text x="16" y="26" font-size="15" font-weight="600">{html.escape(heading)}</text>',
    ]
    for number, bar in enumerate(bars):
        y = TOP + ROW * number
        middle, color = y + ROW * 0.4, MARKED if bar.is_marked else COLOR
        label = html.escape(bar.label)
        parts += [
            f'<text x="{LEFT - 8}" y="{middle + 4:g}" text-anchor="end">{label}</text>',
            f'<rect x="{x(0):.1f}" y="{y:g}" width="{max(0.0, x(bar.value) - x(0)):.1f}" '
            f'height="{ROW * 0.8:g}" fill="{color}"/>',
            f'<path d="M{x(bar.low):.1f} {middle:g}H{x(bar.high):.1f}" stroke="{TEXT}"/>',
            f'<text x="{LEFT + WIDTH + 8}" y="{middle + 4:g}">{bar.value:.3g}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])
