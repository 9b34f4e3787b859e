"""Runs as a report reads them: metrics.jsonl and config.json of a run directory."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError, reading
from ..metrics.version_lag import lag_suffix, nearest_lag

# The share of a run's last steps that "now" means in the summary and in the findings.
RECENT_SHARE = 0.25
# How metrics.jsonl named the layers before a metric held them.
OLD_LAYER_NAME = re.compile(r"^routing_replay/.*_layer_\d+$")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run's metrics by name, aligned to its steps.

    Args:
        name: What the report calls it.
        steps: Ascending.
        series: Metric name to one value per step, None where it is missing or not finite. Of a
            metric of the layers: their mean.
        layers: Metric name to the same for each of its layers (global, 0-based, ascending).
        config: Content of config.json, {} if there is none.
        attribution: Content of attribution.json (tools/attribute_kl.py), or None.
        notes: What was wrong with the files, in words.
    """

    name: str
    steps: tuple[int, ...]
    series: Mapping[str, Sequence[float | None]]
    layers: Mapping[str, Mapping[int, Sequence[float | None]]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    attribution: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def recent(self, name: str, layer: int | None = None) -> float | None:
        """Return the mean over the last quarter of a metric's values; None if there is none."""
        values = self._known(name, layer)
        return mean(values[max(len(values) - _quarter(values), 0) :])

    def earliest(self, name: str) -> float | None:
        """Return the mean over the first quarter of a metric's values."""
        values = self._known(name)
        return mean(values[: _quarter(values)])

    def recent_by_layer(self, name: str) -> dict[int, float]:
        """Return `recent` of every layer that has a value."""
        recent = {layer: self.recent(name, layer) for layer in self.layers.get(name, ())}
        return {layer: value for layer, value in recent.items() if value is not None}

    def named(self, name: str) -> str:
        """Return the name of a comparison with the rollout at the version lag of the last steps."""
        # Comparisons of routes are named by the step's largest lag.
        lag = "rollout/version_lag" + "_max" * name.startswith("routing_replay/")
        recent = self.recent(lag) or self.recent("rollout/version_lag") or 0
        return name + lag_suffix(nearest_lag(self.series, name, recent))

    def _known(self, name: str, layer: int | None = None) -> list[float]:
        values = self.series.get(name, ()) if layer is None else self.layers[name][layer]
        return [value for value in values if value is not None]


def _quarter(values: Sequence[float]) -> int:
    return max(1, round(len(values) * RECENT_SHARE))


def mean(values: Sequence[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept) if kept else None


def read_run(directory: str | os.PathLike[str], name: str | None = None) -> Run:
    """Read a run directory.

    A step that occurs twice (a resumed run) counts as written last. A line cut short by a crash is
    left out and noted; a broken line elsewhere is an error.

    Raises:
        DataError: No metrics.jsonl, no step in it, or a broken line.
    """
    directory = Path(directory)
    rows, notes = _read_rows(directory / "metrics.jsonl")
    steps = tuple(sorted(rows))
    names = sorted({name for row in rows.values() for name in row if name != "step"})
    config = _read_json(directory / "config.json")
    if config is None:
        notes.append("The run has no config.json.")
    return Run(
        name=name or directory.resolve().name,
        steps=steps,
        series={name: [_overall(rows[step].get(name)) for step in steps] for name in names},
        layers=_layers(rows, names),
        config=config or {},
        attribution=_read_json(directory / "attribution.json"),
        notes=tuple(notes),
    )


def _read_rows(path: Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    rows: dict[int, dict[str, Any]] = {}
    notes: list[str] = []
    repeated = 0
    with reading(path, "a run's metrics.jsonl (one JSON object per step)", DataError):
        lines = path.read_text(encoding="utf-8").split("\n")
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
        _refuse_old_names(row, f"{path}, line {number}")
        repeated += step in rows
        rows[step] = row  # after a resume the later line of a step is the one that counts
    if not rows:
        raise DataError("the metrics hold no step yet", where=path, fix="Wait for the first step")
    if repeated:
        notes.append(f"{repeated} steps were written twice (a resumed run); the later ones count.")
    return rows, notes


def _refuse_old_names(row: Mapping[str, Any], where: str) -> None:
    name = next((name for name in row if OLD_LAYER_NAME.search(name)), None)
    if name is not None:
        raise DataError(
            "the metrics are of an older version, with one name per layer",
            expected='one object per metric: {"mean": 0.9, "layers": {"0": 0.8}}',
            got=name,
            where=where,
            fix="Read this run with the version that wrote it",
        )


def _overall(value: object) -> float | None:
    """Return a metric's value; of one with layers their mean."""
    return _number(value.get("mean") if isinstance(value, dict) else value)


def _layers(
    rows: Mapping[int, dict[str, Any]], names: Sequence[str]
) -> dict[str, dict[int, list[float | None]]]:
    """Return the series of each layer of the metrics that have layers."""
    by_metric: dict[str, dict[int, list[float | None]]] = {}
    for name in names:
        cells = [_cells(rows[step].get(name)) for step in sorted(rows)]
        layers = sorted({int(layer) for cell in cells for layer in cell})
        if layers:
            by_metric[name] = {i: [_number(cell.get(str(i))) for cell in cells] for i in layers}
    return by_metric


def _cells(value: object) -> dict[str, Any]:
    return value.get("layers", {}) if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    with reading(path, "a file of the run", DataError):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise DataError(
            "a file of the run is malformed",
            expected="a JSON object",
            got=type(content).__name__,
            where=path,
        )
    return content


def first_known(run: Run, names: Sequence[str]) -> str | None:
    """Return the first of several names of one quantity that the run has."""
    return next((name for name in names if name in run.series), None)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as `a.b: text`."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value)
    return flat
