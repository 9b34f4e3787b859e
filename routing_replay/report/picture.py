"""One heat map of a run as an SVG file, for a README or a slide; it needs no library."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from ..errors import DataError, unknown_name, writing
from ..files import atomic_write
from .charts import GREY, HUE, Grid, Scale, short, shortened_grid
from .layers import LAYER_MAPS
from .run import read_run

# Pixels: the plot, and the room around it for the heading, the layers and the steps.
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 240, 64, 60, 24, 40
# Columns of cells; longer runs are averaged. Levels of colour that an eye tells apart.
MAX_COLUMNS, LEVELS = 120, 64
MAX_LABELS = 12
RAMP_WIDTH = 110


def write_picture(
    run_directory: str | os.PathLike[str], path: str | os.PathLike[str], metric: str = "exact_match"
) -> Path:
    """Write the heat map of one metric of the layers, layers down and steps across.

    Args:
        run_directory: Folder with metrics.jsonl.
        path: The SVG file, written atomically.
        metric: One of `layers.LAYER_MAPS`, without the prefix `routing_replay/`.

    Returns:
        The path.

    Raises:
        ConfigError: The metric has no heat map.
        DataError: No run, a run without this metric, or a file that cannot be written.
    """
    maps = {layer_map.metric: layer_map for layer_map in LAYER_MAPS}
    if metric not in maps:
        raise unknown_name("metric with a heat map", metric, maps)
    run = read_run(run_directory)
    grid = maps[metric].grid(run)
    if not any(value is not None for row in grid.values for value in row):
        raise DataError(
            "the run has no values of this metric",
            expected=f"routing_replay/{metric} with its layers",
            where=run_directory,
        )
    path = Path(path)
    with writing(path, "the picture", DataError), atomic_write(path) as partial:
        partial.write_text(render(maps[metric].caption, grid), encoding="utf-8")
    return path


def render(caption: str, grid: Grid) -> str:
    """Return the picture as SVG text, on a white ground for light and dark pages."""
    # Rectangles instead of an embedded image: some sites strip data URIs from SVG files.
    grid = shortened_grid(grid, MAX_COLUMNS)
    scale = Scale(low=grid.bounds[0], high=grid.bounds[1], is_log=grid.is_log, ticks=())
    width, height = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="12" fill="#5b636d">',
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        _text(16, 24, grid.label, 'font-size="15" font-weight="600" fill="#1c1f23"'),
        _text(16, 44, caption),
        *_legend(scale),
        *_cells(grid, scale),
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" '
        'stroke="#e1e3e6"/>',
        *_labels(grid),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _cells(grid: Grid, scale: Scale) -> Iterator[str]:
    """Yield rectangles, one for neighbouring cells of one colour."""
    row_height, column_width = HEIGHT / len(grid.values), WIDTH / len(grid.steps)
    for row, values in enumerate(grid.values):
        colors = [_color(value, scale) for value in values]
        column = 0
        for color, cells in groupby(colors):
            count = len(list(cells))
            yield (
                f'<rect x="{LEFT + column * column_width:.1f}" y="{TOP + row * row_height:.1f}" '
                # A little wider and higher than the cell: no white seams between neighbours.
                f'width="{count * column_width + 0.3:.1f}" height="{row_height + 0.3:.1f}" '
                f'fill="{color}"/>'
            )
            column += count


def _color(value: float | None, scale: Scale) -> str:
    if value is None:
        return "#{:02x}{:02x}{:02x}".format(*(255 - (255 - channel) // 3 for channel in GREY))
    level = round(LEVELS * scale.position(value) / 100) / LEVELS
    return "#{:02x}{:02x}{:02x}".format(*(round(255 - level * (255 - c)) for c in HUE))


def _legend(scale: Scale) -> Iterator[str]:
    right = LEFT + WIDTH
    left = right - RAMP_WIDTH - 44
    hue = "rgb({}, {}, {})".format(*HUE)
    yield (
        f'<linearGradient id="ramp"><stop offset="0" stop-color="#ffffff"/>'
        f'<stop offset="1" stop-color="{hue}"/></linearGradient>'
    )
    yield (
        f'<rect x="{left}" y="15" width="{RAMP_WIDTH}" height="10" fill="url(#ramp)" '
        'stroke="#e1e3e6"/>'
    )
    yield _text(left - 6, 24, short(scale.low), 'text-anchor="end"')
    yield _text(left + RAMP_WIDTH + 6, 24, short(scale.high))


def _labels(grid: Grid) -> Iterator[str]:
    row_height = HEIGHT / len(grid.rows)
    stride = -(-len(grid.rows) // MAX_LABELS)
    for row in range(0, len(grid.rows), stride):
        y = TOP + (row + 0.5) * row_height + 4
        yield _text(LEFT - 8, y, f"layer {grid.rows[row]}", 'text-anchor="end"')
    yield _text(LEFT, TOP + HEIGHT + 20, f"step {grid.steps[0]}")
    yield _text(LEFT + WIDTH, TOP + HEIGHT + 20, str(grid.steps[-1]), 'text-anchor="end"')


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {attributes}>{html.escape(text)}</text>'
