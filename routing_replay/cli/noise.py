"""`routing-replay noise`: how far recomputations of a batch's log-probs are apart."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..routes.parts import open_table

HELP = "the noise floor of a batch's log-probs"
DESCRIPTION = (
    "Reads the recomputations in BATCH/arms, which `torchrun -m tools.score_arms BATCH "
    "--checkpoint DIR --again K` scored under the same routes. No method brings the gap below "
    "this floor. Needs no engine."
)


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    verb.add_argument("batch", type=Path, help="folder with batch, routes and arms")


def run(parsed: argparse.Namespace) -> int:
    """Print the floor."""
    # Loaded here, because torch takes seconds that `--help` must not cost.
    from ..analysis.arms import ScoredArms
    from ..analysis.noise import noise_floor

    layers = open_table(parsed.batch / "routes.safetensors").shape.layers
    floor = noise_floor(ScoredArms(parsed.batch), layers)
    print(json.dumps(floor.as_dict()) if parsed.json else floor.text())
    return 0
