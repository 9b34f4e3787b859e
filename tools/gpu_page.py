"""Write the page of measurements of `python -m tools.gpu` from its JSON files.

    python -m tools.gpu_page gpu1.json gpu2.json --output docs/measurements/2026-12-gpu.md

The page has every command that ran, how it ended, and its figures: nothing is left out or rounded
away. A dry run makes a page that says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SPREAD = {"median", "low", "high"}
LIMITS = """## What these figures do not establish

TP, EP, PP and DP above 1 on NCCL, DeepEP, Transformer Engine, FP8 grouped GEMMs and whole SGLang
servers did not run. One GPU, one run: another machine, driver or version of torch may differ.
"""


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of one or more runs as markdown."""
    results = [result for record in records for result in record["results"]]
    lines = ["# One GPU", ""]
    if any(record["is_dry"] for record in records):
        lines += ["**DRY RUN on a CPU: no figure on this page means anything.**", ""]
    lines += [
        f"Run on {', '.join(sorted({record['date'] for record in records}))}.",
        *_machines(results),
    ]
    lines += ["", "| part | command | ended | seconds |", "| --- | --- | --- | --- |"]
    for result in results:
        ended = "well" if result["returncode"] == 0 else f"**failed ({result['returncode']})**"
        name = f"{result['name']}: `{result['command']}`"
        lines.append(f"| {result['part']} | {name} | {ended} | {result['seconds']:.0f} |")
    for result in results:
        lines += ["", f"## {result['name']}", "", *_body(result)]
    return "\n".join([*lines, "", LIMITS])


def _machines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [r["figures"]["machine"] for r in results if r["figures"]]
    texts = {f"{m['device']}, torch {m['torch']}, Python {m['python']}." for m in found}
    return sorted(texts)


def _body(result: Mapping[str, Any]) -> list[str]:
    if result["figures"]:
        return table(result["figures"]["figures"])
    return ["```", *result["output"].splitlines()[-5:], "```"]


def table(figures: Mapping[str, Any]) -> list[str]:
    """Return figures as the lines of a markdown table: one row for each path to some values."""
    rows = dict[str, dict[str, str]]()
    for path, value in _leaves(figures, ()):
        rows.setdefault(" / ".join(path[:-1]), {})[path[-1]] = _text(value)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    head = ["what", *columns]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    return lines + [
        f"| {' | '.join([name, *(row.get(column, '') for column in columns)])} |"
        for name, row in rows.items()
    ]


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and set(value) != SPREAD:
        for name, inner in value.items():
            yield from _leaves(inner, (*path, str(name)))
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        for item in value:
            # What is no figure of a row names it.
            name = ", ".join(str(v) for v in item.values() if isinstance(v, str | int))
            figures = {k: v for k, v in item.items() if not isinstance(v, str | int)}
            yield from _leaves(figures, (*path, name))
    else:
        yield (path or ("value",)), value


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page, or print it."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("record", type=Path, nargs="+", help="JSON of python -m tools.gpu")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="printed if left out")
    parsed = parser.parse_args(argv)
    text = page([json.loads(path.read_text(encoding="utf-8")) for path in parsed.record])
    if parsed.output is None:
        sys.stdout.write(text)
    else:
        parsed.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
