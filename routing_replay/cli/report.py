"""`routing-replay report`: one HTML page from one or several runs."""

from __future__ import annotations

import argparse
import json

HELP = "one HTML page from one or several runs"
DESCRIPTION = (
    "A self-contained page (no network): curves, layers over steps, receipts, "
    "configuration, warnings in words. Several runs are compared."
)


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    verb.add_argument("runs", nargs="+", metavar="RUN", help="directory with metrics.jsonl")
    verb.add_argument("-o", "--output", default="report.html", metavar="FILE")
    verb.add_argument("--title", default="")
    verb.add_argument(
        "--picture", metavar="FILE.svg", help="a heat map of the first run as a file of its own"
    )
    verb.add_argument(
        "--picture-metric", default="exact_match", help="its metric (default: %(default)s)"
    )


def run(parsed: argparse.Namespace) -> int:
    """Write the page and print the findings of each run."""
    from ..report.findings import diagnose, sentence
    from ..report.page import write_report
    from ..report.picture import write_picture
    from ..report.run import read_run

    path = write_report(parsed.runs, parsed.output, parsed.title)
    if parsed.picture:
        write_picture(parsed.runs[0], parsed.picture, parsed.picture_metric)
    findings = {str(folder): diagnose(read_run(folder)) for folder in parsed.runs}
    if parsed.json:
        by_run = {folder: [f.as_dict() for f in of_run] for folder, of_run in findings.items()}
        print(json.dumps({"report": str(path), "findings": by_run}))
        return 0
    for folder, of_run in findings.items():
        for finding in of_run:
            print(f"{finding.level:7s} {folder}: {sentence(finding)}")
    print(path)
    return 0
