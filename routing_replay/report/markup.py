"""Pieces of HTML that the sections share."""

from __future__ import annotations

from collections.abc import Sequence


def cards(figures: Sequence[str]) -> str:
    """Return figures side by side, or "" if none has content."""
    figures = [figure for figure in figures if figure]
    return f'<div class="cards">{"".join(figures)}</div>' if figures else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a table of cells that are escaped already."""
    header = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join(
        f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return (
        f'<div class="card scroll"><table class="{kind}"><thead><tr>{header}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def folded(label: str, content: str) -> str:
    """Return content behind a label that opens it."""
    return f'<details class="card"><summary>{label}</summary>{content}</details>'


def number(value: float | None, percent: bool = False) -> str:
    """Return four digits, or three in percent; a dash for no value."""
    if value is None:
        return "–"
    return f"{100 * value:.3g} %" if percent else f"{value:.4g}"
