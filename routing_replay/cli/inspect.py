"""`routing-replay inspect`: what is in a routes file."""

from __future__ import annotations

import argparse
import json

from ..routes.parts import open_table

HELP = "what is in a routes file"
DESCRIPTION = (
    "Shapes, coverage, origins, weight versions, load per expert and layer, bytes. "
    "Reads through memory maps: the file may be larger than memory."
)


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    verb.add_argument("file", help="a routes file (.safetensors)")
    verb.add_argument(
        "--no-verify", action="store_true", help="skip the checksums (half the reading)"
    )


def run(parsed: argparse.Namespace) -> int:
    """Print the inspection of a table."""
    # Loaded here, because torch takes seconds that `--help` must not cost.
    from ..analysis.inspection import inspect_table

    inspection = inspect_table(open_table(parsed.file, verify=not parsed.no_verify))
    print(json.dumps(inspection.as_dict()) if parsed.json else inspection.text())
    return 0
