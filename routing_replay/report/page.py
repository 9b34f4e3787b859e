"""One self-contained HTML page from one or several runs: no network, readable without scripts."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

from ..errors import DataError, writing
from ..files import atomic_write
from . import sections
from .layers import layers
from .run import Run, read_run


def write_report(
    run_directories: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str], title: str = ""
) -> Path:
    """Write one page that shows the runs, side by side where there are several.

    Args:
        run_directories: Each holds metrics.jsonl, and where it exists config.json and
            attribution.json.
        path: The HTML file, written atomically.
        title: Heading of the page; made from the runs' names if empty.

    Returns:
        The path.

    Raises:
        DataError: No run, a run without metrics, or a page that cannot be written.
    """
    if not run_directories:
        raise DataError("a report needs at least one run directory", got="none")
    runs = [read_run(directory) for directory in run_directories]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):  # same folder name in different places
        runs = [read_run(directory, name=str(directory)) for directory in run_directories]
    page = render(runs, title)
    path = Path(path)
    with writing(path, "the report", DataError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_text(page, encoding="utf-8")
    return path


def render(runs: Sequence[Run], title: str = "") -> str:
    """Return the page as text."""
    parts = (
        ("In numbers", sections.summary(runs)),
        ("What stands out", sections.findings(runs)),
        ("Training", sections.training(runs)),
        ("Train-inference gap", sections.policy(runs)),
        ("Layers", layers(runs)),
        ("Attribution", sections.attribution(runs)),
        ("Receipts", sections.receipts(runs)),
        ("Configuration", sections.configuration(runs)),
        ("All other metrics", sections.all_metrics(runs)),
    )
    body = "".join(f"<section><h2>{name}</h2>{text}</section>" for name, text in parts if text)
    title = title or f"Routing replay: {', '.join(run.name for run in runs)}"
    steps = "; ".join(
        f"{run.name}: steps {run.steps[0]} to {run.steps[-1]}"
        + (f" ({len(run.steps)} of them)" if len(run.steps) <= run.steps[-1] - run.steps[0] else "")
        for run in runs
    )
    return Template(_asset("page.html")).substitute(
        title=html.escape(title),
        subtitle=html.escape(steps),
        style=_asset("page.css"),
        script=_asset("page.js"),
        body=body,
    )


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
