"""Runs as a report reads them: metrics.jsonl and config.json of a run directory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from ..metrics.sinks import LAYER_SUFFIX

# The share of a run's last steps that "now" means in the summary and in the findings.
RECENT_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run's metrics by name, aligned to its steps.

    Args:
        name: What the report calls it.
        steps: Ascending.
        series: Metric name to one value per step, None where it is missing or not finite.
        config: Content of config.json, {} if there is none.
        attribution: Content of attribution.json (tools/attribute_kl.py), or None.
        notes: What was wrong with the files, in words.
    """

    name: str
    steps: tuple[int, ...]
    series: dict[str, list[float | None]]
    config: dict = field(default_factory=dict)
    attribution: dict | None = None
    notes: tuple[str, ...] = ()

    def recent(self, name: str) -> float | None:
        """Mean of a metric over the last quarter of its values; None if there is none."""
        values = [value for value in self.series.get(name, []) if value is not None]
        start = len(values) - max(1, round(len(values) * RECENT_SHARE))
        return mean(values[max(start, 0) :])

    def earliest(self, name: str) -> float | None:
        """Mean of a metric over the first quarter of its values."""
        values = [value for value in self.series.get(name, []) if value is not None]
        return mean(values[: max(1, round(len(values) * RECENT_SHARE))])

    def layers(self, metric: str) -> list[int]:
        """Layers that have the metric `{metric}_layer_{i}`."""
        found = (LAYER_SUFFIX.search(n) for n in self.series if n.startswith(f"{metric}_layer_"))
        return sorted(int(match.group(1)) for match in found if match)


def mean(values: Sequence[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept) if kept else None


def read_run(directory: str | os.PathLike, name: str | None = None) -> Run:
    """Read a run directory.

    A step that occurs twice (a resumed run) counts as written last. A line cut short by a crash is
    left out and noted; a broken line elsewhere is an error.

    Raises:
        DataError: No metrics.jsonl, no step in it, or a broken line.
    """
    directory = Path(directory)
    rows, notes = _read_rows(directory / "metrics.jsonl")
    steps = tuple(sorted(rows))
    names = sorted({key for row in rows.values() for key in row if key != "step"})
    series = {key: [rows[step].get(key) for step in steps] for key in names}
    config = _read_json(directory / "config.json")
    if config is None:
        notes.append("The run has no config.json.")
    return Run(
        name=name or directory.resolve().name,
        steps=steps,
        series=series,
        config=config or {},
        attribution=_read_json(directory / "attribution.json"),
        notes=tuple(notes),
    )


def _read_rows(path: Path) -> tuple[dict[int, dict], list[str]]:
    rows: dict[int, dict] = {}
    notes: list[str] = []
    repeated = 0
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "not a run directory: its metrics cannot be read",
            expected="metrics.jsonl, one JSON object per step",
            got=error,
            where=path,
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # no newline after it: the writer was killed
                notes.append("The last line of metrics.jsonl was cut short and is left out.")
                break
            raise DataError(
                "a line of the metrics cannot be read",
                expected='a JSON object with an integer "step"',
                got=line.strip()[:80],
                where=f"{path}, line {number}",
            ) from error
        repeated += step in rows
        rows[step] = {key: _number(value) for key, value in row.items()}
    if not rows:
        raise DataError("the metrics hold no step yet", where=path, fix="Wait for the first step")
    if repeated:
        notes.append(f"{repeated} steps were written twice (a resumed run); the later ones count.")
    return rows, notes


def _number(value) -> float | None:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _read_json(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError("a file of the run cannot be read", got=error, where=path) from error
    if not isinstance(content, dict):
        raise DataError(
            "a file of the run", expected="a JSON object", got=type(content), where=path
        )
    return content


def first_known(run: Run, names: Sequence[str]) -> str | None:
    """The first of several names of one quantity that the run has."""
    return next((name for name in names if name in run.series), None)


def flatten(config: dict, prefix: str = "") -> dict[str, str]:
    """Nested settings as `a.b: text`."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value)
    return flat
