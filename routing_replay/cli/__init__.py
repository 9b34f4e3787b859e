"""`routing-replay VERB`: doctor, inspect, diff, bisect, noise, report, convert.

Exit codes: 0 fine, 1 a problem was found (an error finding, a damaged or foreign file), 2 usage.
Each verb is one module: its help, its flags, and `run`, which imports what it needs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ..errors import RoutingReplayError
from . import bisect, convert, diff, doctor, inspect, noise, report

VERBS = (doctor, inspect, diff, bisect, noise, report, convert)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    parser = build_parser()
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has printed its message, or the help
        return int(stop.code or 0)
    try:
        exit_code: int = parsed.run(parsed)
    except RoutingReplayError as error:
        if parsed.json:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        print(f"routing-replay: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as `| head`, has closed the pipe
        sys.stderr.close()
        return 0
    return exit_code


def build_parser() -> argparse.ArgumentParser:
    """Return the command line, each verb with its own --help."""
    parser = argparse.ArgumentParser(
        prog="routing-replay",
        description="Check, inspect, compare, report and convert MoE routes.",
        epilog="Exit codes: 0 fine, 1 a problem was found, 2 wrong usage.",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for module in VERBS:
        name = module.__name__.rpartition(".")[2]
        verb = verbs.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_arguments(verb)
        verb.add_argument("--json", action="store_true", help="print one JSON object")
        verb.set_defaults(run=module.run)
    return parser
