"""Predictions beside a finished run of the recipe, and rates from one."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes.minirl.job.journal import read
from routing_replay.errors import DataError, reading

from .inputs import Inputs, Rate
from .legs import AFTER_SAMPLING, PASSES, Design, legs

# Which of a run's steps counts. On a shared machine the fastest is the least disturbed one.
STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "median": statistics.median,
    "fastest": min,
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A clock of the recipe's metrics.

    Args:
        clock: Its name in `time/CLOCK_s`, or "step" for all of them.
        predicted_s, measured_s: Seconds of a step.
    """

    clock: str
    predicted_s: float
    measured_s: float

    @property
    def ratio(self) -> float:
        return self.predicted_s / self.measured_s if self.measured_s else float("inf")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Args:
        config: Its config.json.
        steps: The records of its steps, from 1.
    """

    config: Mapping[str, Any]
    steps: list[dict[str, Any]]

    def seconds(self, clock: str, statistic: str) -> float:
        """Return the seconds of a clock, over the steps that have it."""
        values = [step[f"time/{clock}_s"] for step in self.steps if f"time/{clock}_s" in step]
        return STATISTICS[statistic](values) if values else 0.0


def read_run(folder: Path) -> Run:
    """Return a run of the recipe from its folder.

    Raises:
        DataError: There is no such run, or it has no finished step with times.
    """
    path = folder / "config.json"
    fix = "Name the folder of a run of recipes.minirl (--run-dir)"
    with reading(path, "the run's configuration", DataError, fix=fix):
        config = json.loads(path.read_text(encoding="utf-8"))
    steps = [record for record in read(folder / "metrics.jsonl") if record["step"] > 0]
    if not any("time/update_s" in step for step in steps):
        raise DataError(
            "the run has no step to compare with",
            expected="records with time/update_s",
            got=f"{len(steps)} records of steps",
            where=folder / "metrics.jsonl",
            fix="Let the run finish a step",
        )
    return Run(config=config, steps=steps)


def of_run(inputs: Inputs, run: Run) -> Inputs:
    """Return the inputs with the sizes of a run; prompts, model and rates stay."""
    c = run.config
    lengths = [step["rollout/response_length"] for step in run.steps]
    job = replace(
        inputs.job,
        samples=c["prompts_per_step"] * c["samples_per_prompt"],
        response_tokens=statistics.mean(lengths),
        longest_response_tokens=c["max_new_tokens"],
        servers=max(1, len(c["rollout_url"])),
        trainer_gpus=c["nnodes"] * c["nproc"],
        trainer_nodes=c["nnodes"],
        is_packed=c["microbatch_tokens"] > 0,
        recompute=c["recompute"],
        live_every=c["measure_live_every"],
        stores_answers=c["store_answers"],
        checkpoint_every=0,  # no clock of a step holds it
    )
    return replace(inputs, job=job)


def design_of(run: Run) -> Design:
    """Return how the run took its steps."""
    c = run.config
    return Design(
        name="the run's",
        has_buckets=c.get("publish") == "buckets",
        ahead=c.get("ahead", 0),
    )


def compare(inputs: Inputs, run: Run, statistic: str) -> list[Comparison]:
    """Return predicted and measured seconds of each clock, and of all of them.

    One step ahead the clock "rollout" is how long a step waits for the rollout, and "sampling" the
    rollout itself, which is no part of the step's sum.
    """
    predicted = _predicted(inputs, run)
    measured = {clock: run.seconds(clock, statistic) for clock in predicted}
    made = [
        Comparison(clock=clock, predicted_s=value, measured_s=measured[clock])
        for clock, value in predicted.items()
    ]
    summed = [one for one in made if one.clock != "sampling"]
    return [
        *made,
        Comparison(
            clock="step",
            predicted_s=sum(one.predicted_s for one in summed),
            measured_s=sum(one.measured_s for one in summed),
        ),
    ]


def _predicted(inputs: Inputs, run: Run) -> dict[str, float]:
    """Return the seconds of each clock."""
    design = design_of(run)
    steps = legs(of_run(inputs, run), design)
    seconds: dict[str, float] = {}
    for leg in steps:
        seconds[leg.clock] = seconds.get(leg.clock, 0.0) + leg.seconds
    if design.ahead:
        after = sum(leg.seconds for leg in steps if leg.name in AFTER_SAMPLING)
        training = sum(seconds.get(clock, 0.0) for clock in PASSES)
        sampling = seconds["rollout"] - after
        seconds["rollout"] = after + max(0.0, sampling - training)
        if design.ahead == 1:  # the clock of one that shares the servers with others is longer
            seconds["sampling"] = sampling
    return seconds


def fitted(inputs: Inputs, run: Run, statistic: str, folder: Path) -> dict[str, Rate]:
    """Return the rates of engines and disk with which the prediction is a run's own seconds.

    A leg's seconds fall in proportion to its rate, so one division finds each.

    Raises:
        DataError: The run published in buckets or ran ahead: its clocks are not these legs.
    """
    whole, design = of_run(inputs, run), design_of(run)
    if design.has_buckets or design.ahead:
        raise DataError(
            "rates are fitted to runs of the default design",
            expected="a run with --publish disk and --ahead 0",
            got=f"publish {run.config.get('publish')}, ahead {run.config.get('ahead')}",
            where=folder,
        )
    today = legs(whole, design)
    sampling = [leg for leg in today if leg.clock == "rollout"]
    beside = sum(leg.seconds for leg in sampling if leg.name != "generation")
    generation = max(1e-9, run.seconds("rollout", statistic) - beside)
    clocks = ("old_log-probs", "live_log-probs", "update")
    computed = sum(leg.seconds for leg in today if leg.clock in clocks)
    passes = sum(run.seconds(clock, statistic) for clock in clocks)
    published = whole.model.parameters * whole.job.weight_bytes / 1e9
    # Written once, read once: both at the same rate.
    disk = 2 * published / max(1e-9, run.seconds("weights", statistic))
    values = {
        "server_tokens_per_s": whole.job.sampled_tokens / whole.job.servers / generation,
        "trainer_tflops": whole.rates.trainer_tflops.value * computed / max(1e-9, passes),
        "disk_write_gb_per_s": disk,
        "disk_read_gb_per_s": disk,
    }
    how = f"python -m tools.simulate INPUTS --fit {folder.name}"
    return {
        name: Rate(value=float(f"{value:.4g}"), source="measured", how=how)
        for name, value in values.items()
    }
