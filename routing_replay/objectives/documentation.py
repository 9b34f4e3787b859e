"""docs/objectives.md and the help of the command line, from the docstrings and the parameters'
fields.
"""

from __future__ import annotations

import inspect
from dataclasses import fields

from . import kl
from .advantages import ADVANTAGES
from .aggregation import AGGREGATIONS
from .parameters import CORRECTIONS, Parameters, described
from .registry import SECTIONS, table

_INTRODUCTION = """\
# Objectives

Written by `tools/generate_objectives_doc.py` from the docstrings in `routing_replay/objectives/`; a
test checks that it is current.

    from routing_replay import objectives

    objective = objectives.get("minirl", cap=5.0)
    outputs = objective(objectives.LossInputs(...))
    outputs.loss.backward()

mu is the inference engine's policy, pi_old the trainer's at the rollout's weights, pi_theta the
trainer's current one. Per token m = pi_old / mu (discrepancy), r = pi_theta / pi_old (staleness), w
= pi_theta / mu = m * r. A is the advantage, sg[] stops the gradient, |y| is the length of a
response. Every objective is maximised; the loss is its negative. Log-ratios are bounded at +-20.

A step's loss is the sum of its microbatches' losses over all ranks: denominators count the whole
step. A token that is masked, clipped or dropped stays in the denominators.
"""


def markdown() -> str:
    """The whole of docs/objectives.md."""
    entries = table()
    parts = [
        _INTRODUCTION,
        "## Overview\n",
        _rows(["name", "what it is", "reference"], [_overview_row(entry) for entry in entries]),
        "## Methods\n",
        *(_method(entry) for entry in entries),
        "## Parameters that every objective has\n",
        _parameter_rows(described(Parameters)),
        *(_choices(title, choices) for title, choices in _CHOICES.items()),
        "## KL terms\n",
        inspect.getdoc(kl).partition("\n\n")[2] + "\n",
    ]
    return "\n".join(parts).rstrip() + "\n"


def help_text() -> str:
    """The same facts for a terminal: what `--objective help` prints."""
    lines = []
    for entry in table():
        lines += [f"{entry['name']}: {entry['summary']}"]
        lines += [f"    {name.lower()}: {entry[name.lower()]}" for name in SECTIONS]
        lines += [
            f"    {p['name']} = {p['default']}  ({p['help']}{_source(p)})"
            for p in _own_parameters(entry)
        ]
    lines += ["Every objective also has:"]
    lines += [f"    {p['name']} = {p['default']}  ({p['help']})" for p in described(Parameters)]
    return "\n".join(lines) + "\n"


_CHOICES = {
    "Advantages (`advantage`)": ADVANTAGES,
    "Aggregation (`aggregation`)": AGGREGATIONS,
    "Corrections (`correction`)": CORRECTIONS,
}


def _overview_row(entry):
    name = entry["name"]
    return [f"[`{name}`](#{name})", entry["summary"], entry["reference"]]


def _method(entry):
    text = [f"### {entry['name']}\n", entry["summary"] + "\n", f"    {entry['equation']}\n"]
    for key in ("reference", "use", "pitfalls"):
        text.append(f"- {key.capitalize()}: {entry[key]}")
    return "\n".join([*text, "", _parameter_rows(_own_parameters(entry))])


def _own_parameters(entry):
    """The method's own, and those shared ones whose default the method changes."""
    shared = {f.name: f.default for f in fields(Parameters)}
    return [
        p
        for p in entry["parameters"]
        if p["name"] not in shared
        or p["default"] != shared[p["name"]]
        or p["name"] in ("aggregation", "advantage")
    ]


def _parameter_rows(parameters):
    rows = [[f"`{p['name']}`", f"`{p['default']}`", p["help"], p["source"]] for p in parameters]
    return _rows(["parameter", "default", "meaning", "default from"], rows)


def _choices(title, choices):
    rows = [[f"`{name}`", meaning] for name, meaning in choices.items()]
    return f"## {title}\n\n" + _rows(["name", "meaning"], rows)


def _source(parameter):
    return f"; {parameter['source']}" if parameter["source"] else ""


def _rows(header, rows):
    # A bar would end the cell.
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
