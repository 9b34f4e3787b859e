"""Charts as HTML text: vector lines that stretch with the page, heat maps as tiny inline images."""

from __future__ import annotations

import base64
import html
import json
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .run import mean

# A chart is at most about this many points wide on any screen; longer runs are averaged.
MAX_POINTS = 400
NUM_TICKS = 4
# An automatic scale is logarithmic from two decades on: on a linear one the rest is a flat line.
AUTO_LOG_SPAN = 100.0
# Full colour of a heat map, as in page.css, and the colour of a missing value.
HUE, GREY = (214, 69, 28), (128, 128, 128)
# So few points are marked, so that a lone one is seen.
MAX_DOTS = 12


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve. `color` counts the runs (0..7); `dashed` marks the pass without replay."""

    label: str
    steps: Sequence[int]
    values: Sequence[float | None]
    color: int = 0
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A heat map: rows are layers, columns are steps; maps of one scale share `bounds`."""

    label: str
    rows: Sequence[int]
    steps: Sequence[int]
    values: Sequence[Sequence[float | None]]
    bounds: tuple[float, float] = (0.0, 1.0)
    is_log: bool = False


def shared_bounds(values: Iterable[float | None], is_log: bool) -> tuple[float, float]:
    """Return the ends of a heat map's scale: 0 or the least positive value, and the largest."""
    kept = [v for v in values if v is not None]
    # A share that is zero everywhere must look empty, not full.
    high = max([1e-9, *kept])
    if not is_log:
        return 0.0, high
    return min([high / 10, *(v for v in kept if v > 0)]), high


def line_chart(title: str, caption: str, lines: Sequence[Line], scale: str = "linear") -> str:
    """Return a figure of one or several curves over the steps; "" if no curve has a value.

    Args:
        title: Heading of the figure.
        caption: One or two sentences below it.
        lines: The curves.
        scale: "linear", "log", or "auto": log where the values span `AUTO_LOG_SPAN`. Values below 0
            have no logarithm: with one of them the scale is linear.
    """
    lines = [_shortened(line) for line in lines if mean(line.values) is not None]
    if not lines:
        return ""
    axis = Scale.over([v for line in lines for v in line.values if v is not None], scale)
    first = min(line.steps[0] for line in lines)
    last = max(max(line.steps[-1] for line in lines), first + 1)
    paths = "".join(_path(line, axis, first, last) for line in lines)
    grid = "".join(
        f'<path class="grid" d="M0 {100 - axis.position(tick):.2f}H100"/>' for tick in axis.ticks
    )
    svg = (
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(_in_words(title, lines))}">{grid}{paths}</svg>'
    )
    data = {
        "lines": [
            {"label": line.label, "steps": list(line.steps), "values": _rounded(line.values)}
            for line in lines
        ],
        "first": first,
        "last": last,
    }
    caption += " Logarithmic scale." if axis.is_log else ""
    ticks = [(axis.label(tick), axis.position(tick)) for tick in axis.ticks]
    plot = _plot(svg, ticks, first, last)
    return _figure(title, caption, _legend(lines), plot, data)


def heat_map(title: str, caption: str, grid: Grid) -> str:
    """Return a figure with one cell per layer and step; "" if no cell has a value."""
    grid = shortened_grid(grid)
    if not any(v is not None for row in grid.values for v in row):
        return ""
    low, high = grid.bounds
    scale = Scale(low=low, high=high, is_log=grid.is_log, ticks=())
    levels = [
        [None if v is None else round(254 * scale.position(v) / 100) for v in row]
        for row in grid.values
    ]
    image = f'<img class="heat" alt="{html.escape(title)}" src="{_png(levels)}">'
    legend = (
        f'<div class="legend"><span>{short(scale.low)}</span><span class="ramp"></span>'
        f"<span>{short(scale.high)}</span></div>"
    )
    # Layer 0 on top, as in an image; labels for at most about eight rows.
    stride = max(1, math.ceil(len(grid.rows) / 8))
    labels = [
        (f"layer {row}", 100 - 100 * (i + 0.5) / len(grid.rows))
        for i, row in enumerate(grid.rows)
        if i % stride == 0
    ]
    data = {
        "rows": list(grid.rows),
        "steps": list(grid.steps),
        "grid": [_rounded(row) for row in grid.values],
        "label": grid.label,
    }
    plot = _plot(image, labels, grid.steps[0], grid.steps[-1])
    caption += " Logarithmic scale." if grid.is_log else ""
    return _figure(title, caption, legend, plot, data)


def bar_chart(title: str, caption: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Return horizontal bars with intervals; a row is (label, value, low, high)."""
    low = min(0.0, *(row[2] for row in rows))
    high = max(1e-12, *(row[3] for row in rows))

    def position(value: float) -> float:
        return 100 * (value - low) / (high - low)

    bars = []
    for label, value, lower, upper in rows:
        start, stop = sorted((position(0.0), position(value)))
        bars.append(
            f'<div class="bar"><span class="name">{html.escape(label)}</span>'
            f'<span class="track"><i class="fill" style="left:{start:.2f}%;'
            f'width:{stop - start:.2f}%"></i><i class="whisker" style="left:{position(lower):.2f}%;'
            f'width:{position(upper) - position(lower):.2f}%"></i></span>'
            f'<span class="value">{short(value)}</span></div>'
        )
    return _figure(title, caption, "", f'<div class="bars">{"".join(bars)}</div>', None)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An axis from `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], kind: str) -> Scale:
        low, high = min(values), max(values)
        positive = [value for value in values if value > 0]
        is_wide = bool(positive) and high >= AUTO_LOG_SPAN * min(positive)
        if low >= 0 and positive and (kind == "log" or kind == "auto" and is_wide):
            low = min(positive)  # a value of 0 is drawn at the bottom
            low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
            high = high if high > low else 10 * low
            decades = round(math.log10(high / low))
            stride = max(1, math.ceil(decades / NUM_TICKS))
            ticks = tuple(low * 10.0**i for i in range(0, decades + 1, stride))
            return cls(low=low, high=high, is_log=True, ticks=ticks)
        if high == low:
            low, high = low - abs(low) / 2, high + (abs(high) / 2 or 1.0)
        step = _nice((high - low) / NUM_TICKS)
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        count = round((high - low) / step)
        ticks = tuple(low + i * step for i in range(count + 1))
        return cls(low=low, high=high, is_log=False, ticks=ticks)

    def label(self, tick: float) -> str:
        """Return enough digits to tell neighbouring ticks apart."""
        if self.is_log or len(self.ticks) < 2:
            return short(tick)
        step = self.ticks[1] - self.ticks[0]
        if max(abs(self.low), abs(self.high)) < 1e-3 or step >= 1e3:
            return short(tick)
        decimals = next(d for d in range(17) if abs(round(step, d) - step) < 1e-6 * step)
        return f"{tick:.{decimals}f}"

    def position(self, value: float) -> float:
        """Return percent of the height from below."""
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return min(100.0, max(0.0, 100 * (value - low) / (high - low)))


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * 0.999)


def _path(line: Line, scale: Scale, first: int, last: int) -> str:
    commands, is_down = [], False
    for step, value in zip(line.steps, line.values, strict=True):
        if value is None:
            is_down = False
            continue
        x, y = 100 * (step - first) / (last - first), 100 - scale.position(value)
        # "h0" makes a lone point visible: its round cap is a dot.
        commands.append(f"L{x:.2f} {y:.2f}" if is_down else f"M{x:.2f} {y:.2f}h0")
        is_down = True
    kind = "line dashed" if line.dashed else "line"
    color, dots = f"series-{line.color % 8}", ""
    if len(commands) <= MAX_DOTS:
        places = "".join(f"M{command[1:].removesuffix('h0')}h0" for command in commands)
        dots = f'<path class="dots {color}" d="{places}"/>'
    return f'<path class="{kind} {color}" d="{"".join(commands)}"/>{dots}'


def _shortened(line: Line, max_points: int = MAX_POINTS) -> Line:
    factor = math.ceil(len(line.steps) / max_points)
    if factor == 1:
        return line
    starts = range(0, len(line.steps), factor)
    return Line(
        label=line.label,
        steps=[line.steps[i] for i in starts],
        values=[mean(line.values[i : i + factor]) for i in starts],
        color=line.color,
        dashed=line.dashed,
    )


def shortened_grid(grid: Grid, max_points: int = MAX_POINTS) -> Grid:
    """Return the grid with neighbouring steps averaged into at most `max_points` columns."""
    lines = [
        _shortened(Line(label="", steps=grid.steps, values=row), max_points) for row in grid.values
    ]
    return Grid(
        label=grid.label,
        rows=grid.rows,
        steps=lines[0].steps if lines else grid.steps,
        values=[line.values for line in lines],
        bounds=grid.bounds,
        is_log=grid.is_log,
    )


def _png(levels: Sequence[Sequence[int | None]]) -> str:
    """Return a data URI: one pixel per cell, one hue whose opacity is the level; None is grey.

    Opacity instead of a colour ramp: the page shines through, so low is quiet on light and dark.
    """
    palette = bytes(HUE) * 255 + bytes(GREY)
    opacity = bytes(range(255)) + bytes([70])
    rows = b"".join(b"\0" + bytes(255 if v is None else v for v in row) for row in levels)
    header = struct.pack(">IIBBBBB", len(levels[0]), len(levels), 8, 3, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    image = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"PLTE", palette)
    image += chunk(b"tRNS", opacity) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(image).decode()


def _plot(content: str, ticks: Sequence[tuple[str, float]], first: int, last: int) -> str:
    labels = "".join(
        f'<span style="bottom:{height:.2f}%">{html.escape(label)}</span>' for label, height in ticks
    )
    return (
        f'<div class="plot"><div class="y">{labels}</div><div class="area">{content}'
        f'<i class="cursor"></i></div><div class="x"><span>step {first}</span>'
        f"<span>{last}</span></div></div>"
    )


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) == 1:
        return ""
    items = "".join(
        f'<span><svg viewBox="0 0 24 8"><path class="line{" dashed" if line.dashed else ""} '
        f'series-{line.color % 8}" d="M1 4H23"/></svg>{html.escape(line.label)}</span>'
        for line in lines
    )
    return f'<div class="legend">{items}</div>'


def _figure(title: str, caption: str, legend: str, plot: str, data: dict[str, Any] | None) -> str:
    embedded = ""
    if data is not None:
        # "</" would end the script element, wherever it stands.
        text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
        embedded = f'<script type="application/json">{text}</script>'
    return (
        f"<figure><figcaption><h3>{html.escape(title)}</h3><p>{html.escape(caption)}</p>"
        f'</figcaption>{legend}{plot}<output class="readout"></output>{embedded}</figure>'
    )


def _in_words(title: str, lines: Sequence[Line]) -> str:
    parts = []
    for line in lines:
        kept = [v for v in line.values if v is not None]
        parts.append(f"{line.label} from {short(kept[0])} to {short(kept[-1])}")
    return f"{title}: {'; '.join(parts)}"


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if v is None else float(f"{v:.4g}") for v in values]


def short(value: float) -> str:
    """Return a number in about six characters, for axes."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
