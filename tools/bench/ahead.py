"""The recipe one step ahead beside one step after the other: seconds of all steps, and the reward.

    python -m tools.bench.ahead [--steps 24] [--rounds 3] [--recipe FLAGS ...]

Both start a server and a trainer of their own, from the same tiny model, and take turns; each round
has a seed of its own. Rollouts take most of a step here, because the server runs few requests at a
time. On a machine that other work fills, nothing can overlap: look at the load.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.minirl import journal

from .paired import finish, parse, parser, ratios, spread

ROOT = Path(__file__).parents[2]
RECIPE = """
prompts_per_step: 32
samples_per_prompt: 8
minibatch_size: 64
microbatch_size: 64
measure_live_every: 0
checkpoint_every: 0
server_arguments: ["--max-total-tokens", "65536", "--max-running-requests", "24"]
"""
SUMMED = ("time_s", "time/sampling_s", "time/rollout_s", "time/weights_s", "time/update_s")


def train(folder: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Return the sums of a run's times, and its rewards on held-out prompts."""
    command = [sys.executable, "-m", "recipes.minirl", "--run-dir", str(folder), *flags]
    with open(folder.with_suffix(".log"), "wb") as log:
        subprocess.run(command, check=True, cwd=ROOT, stdout=log, stderr=log)
    records = journal.read(folder / "metrics.jsonl")
    rewards = [r["eval/reward"] for r in records if "eval/reward" in r]
    sums = {name: sum(r[name] for r in records[1:]) for name in SUMMED}
    # The last step ends with an evaluation, which is no part of training.
    sums["time_s"] -= sum(r.get("time/evaluation_s", 0.0) for r in records[1:])
    return sums | {"rewards": rewards, "load": os.getloadavg()[0]}


def compared(arguments: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of both variants, round by round."""
    runs: dict[str, list[dict[str, Any]]] = {"0": [], "1": []}
    cache = Path(arguments.cache_dir).absolute()
    config = folder / "recipe.yaml"
    config.write_text(RECIPE)
    for number in range(arguments.rounds):
        for ahead in ("0", "1") if number % 2 == 0 else ("1", "0"):
            flags = [
                "--config",
                str(config),
                "--steps",
                str(arguments.steps),
                "--seed",
                str(number),
            ]
            flags += ["--cache-dir", str(cache), *arguments.recipe, "--ahead", ahead]
            run = train(folder / f"ahead_{ahead}_round_{number}", flags)
            runs[ahead].append(run)
            print(f"round {number}, --ahead {ahead}: {run}", flush=True)
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=24)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--cache-dir", default="runs/cache", help="where the tiny models are kept")
    made.add_argument("--recipe", nargs=argparse.REMAINDER, default=[], help="flags of the recipe")
    arguments = parse(made, argv, {"steps": 2, "rounds": 1})
    with tempfile.TemporaryDirectory() as folder:
        runs = compared(arguments, Path(folder))
    seconds = {ahead: [run["time_s"] for run in of] for ahead, of in runs.items()}
    share = spread([run["time/sampling_s"] / run["time_s"] for run in runs["0"]])
    print(f"rollout's share of a step, one after the other: {share}")
    print(f"seconds, one step ahead over one after the other: {ratios(seconds, '0')['1']}")
    finish("ahead", arguments, {"runs": runs, "share": share, "ratio": ratios(seconds, "0")["1"]})


if __name__ == "__main__":
    main()
