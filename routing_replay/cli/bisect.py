"""`routing-replay bisect`: where the train-inference gap of a scored batch comes from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..routes.parts import open_table

HELP = "where the train-inference gap of a batch comes from"
DESCRIPTION = (
    "Reads BATCH/arms, which `torchrun -m tools.score_arms BATCH --checkpoint DIR` scored, and "
    "prints k3 and |dlogp| factor by factor with intervals, what to change, and the certificate. "
    "Needs no engine."
)
ROUTES, LIVE_ROUTES = "routes.safetensors", "live_routes.safetensors"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    verb.add_argument("batch", type=Path, help="folder with batch, routes and arms")
    verb.add_argument("--picture", metavar="FILE.svg", help="the factors as bars")


def run(parsed: argparse.Namespace) -> int:
    """Print table, sentences and certificate; 1 if something is named."""
    # Loaded here, because torch takes seconds that `--help` must not cost.
    from ..analysis.arms import ScoredArms
    from ..analysis.bisection import bisect
    from ..analysis.certificate import certify
    from ..report.bars import Bar, write_bars

    arms = ScoredArms(parsed.batch)
    table = open_table(parsed.batch / ROUTES)
    result = bisect(arms, table.shape.layers)
    live_path = parsed.batch / LIVE_ROUTES
    live = open_table(live_path) if live_path.exists() else None
    certificate = certify(arms, table, live)
    if parsed.json:
        print(json.dumps({"factors": result.as_dict(), "certificate": certificate.as_dict()}))
    else:
        print(f"{result.text()}\n\n{certificate.text()}")
    if parsed.picture:
        bars = [
            Bar(
                label=factor.label,
                value=factor.k3.value,
                low=factor.k3.low,
                high=factor.k3.high,
                is_marked=factor.is_named,
            )
            for factor in result.factors
        ]
        write_bars(parsed.picture, "k3 by factor, nats per token", bars)
    return int(bool(result.named))
