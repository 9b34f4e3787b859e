"""What `--objective help` prints: the methods' docstrings and parameters, as text."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .parameters import Parameters, described
from .registry import SECTIONS, Preset, presets, table

Entry = dict[str, Any]  # as `registry.table` and `parameters.described` return them


def help_text() -> str:
    """Return every objective with its equation, source, use, pitfalls and parameters."""
    lines = []
    for entry in table():
        lines += [f"{entry['name']}: {entry['summary']}"]
        lines += [f"    {name.lower()}: {entry[name.lower()]}" for name in SECTIONS]
        lines += [
            f"    {p['name']} = {p['default']}  ({p['help']}{_source(p)})"
            for p in own_parameters(entry)
        ]
    for preset in presets():
        lines += [f"{preset.name}: {preset.summary}", f"    is: {preset_text(preset)}"]
        lines += [
            f"    {name}: {getattr(preset, name)}" for name in ("reference", "use", "pitfalls")
        ]
    lines += ["Every objective also has:"]
    lines += [f"    {p['name']} = {p['default']}  ({p['help']})" for p in described(Parameters)]
    return "\n".join(lines) + "\n"


def preset_text(preset: Preset) -> str:
    """Return a preset as its method and parameters."""
    parameters = ", ".join(f"{name}={value}" for name, value in preset.parameters.items())
    return f"{preset.method} with {parameters}"


def own_parameters(entry: Entry) -> list[Entry]:
    """Return the method's own parameters, and the shared ones whose default it changes."""
    shared = {f.name: f.default for f in fields(Parameters)}
    return [
        p
        for p in entry["parameters"]
        if p["name"] not in shared
        or p["default"] != shared[p["name"]]
        or p["name"] in ("aggregation", "advantage")
    ]


def _source(parameter: Entry) -> str:
    return f"; {parameter['source']}" if parameter["source"] else ""
