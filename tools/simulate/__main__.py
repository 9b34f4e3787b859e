"""Predict the legs of a reinforcement-learning step: today's, and those of other designs.

    python -m tools.simulate tools/simulate/inputs/qwen3_235b_256x256.yaml
    python -m tools.simulate INPUTS.yaml --set job.servers=64 --picture steps.svg
    python -m tools.simulate INPUTS.yaml --check RUN_DIR
    python -m tools.simulate INPUTS.yaml --fit RUN_DIR

The file has a model, a job and rates; each rate says whether it was measured, computed, published
or assumed, and how. A leg is as firm as its weakest rate. Network, CPU and host memory are those of
the busiest process. `--check` compares with the seconds of a
finished run of the recipe and returns 1 if a leg is further off than --within; the sizes are then
the run's. `--fit` prints rates of a run, to put into a file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from routing_replay.errors import ConfigError, RoutingReplayError
from routing_replay.report.bars import Bar, write_bars

from . import check
from .designs import DESIGNS, TODAY
from .inputs import Inputs, read_inputs
from .legs import GIGA, Design, Leg, legs, limit_seconds, step_seconds


def table(inputs: Inputs, design: Design) -> Iterator[str]:
    """Yield the rows of one design's legs."""
    yield f"## {design.name}"
    yield ""
    yield "| leg | s | bound by | network, GB | CPU, s | host memory, GB | source |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for leg in legs(inputs, design):
        sizes = (leg.network_bytes / GIGA, leg.processor_s, leg.host_bytes / GIGA)
        cells = " | ".join(map(_or_blank, sizes))
        row = f"| {leg.name} | {leg.seconds:.4g} | {leg.bound} | {cells} "
        yield row + f"| {leg.source(inputs)} |"
    yield f"| **step** | **{step_seconds(inputs, design):.4g}** | | | | | |"
    yield ""


def _or_blank(value: float) -> str:
    return f"{value:.3g}" if value else ""


def summary(inputs: Inputs) -> Iterator[str]:
    """Yield one row for each design."""
    today = step_seconds(inputs, TODAY)
    yield "| design | seconds of a step | of the default | last answer to first pass, s |"
    yield "| --- | --- | --- | --- |"
    for design in DESIGNS:
        seconds = step_seconds(inputs, design)
        waiting = sum(leg.seconds for leg in legs(inputs, design) if is_waiting(leg))
        yield f"| {design.name} | {seconds:.4g} | {seconds / today:.2f} | {waiting:.3g} |"
    limit = limit_seconds(inputs)
    yield f"| limit | {limit:.4g} | {limit / today:.2f} | 0 |"


def is_waiting(leg: Leg) -> bool:
    """Whether all GPUs wait in a leg when nothing overlaps: between last answer and first pass."""
    return leg.clock == "rollout" and leg.name != "generation"


def heading(inputs: Inputs) -> str:
    """Describe what is simulated in one line."""
    m, j = inputs.model, inputs.job
    return (
        f"{m.name}: {j.samples} responses of {j.response_tokens:g} tokens, the longest "
        f"{j.longest_response_tokens}; {j.servers} servers, {j.trainer_gpus} trainer GPUs on "
        f"{j.trainer_nodes} nodes; capture {j.capture}, {m.route_bytes(j.capture)} bytes per token"
    )


def read_with(path: Path, changes: Sequence[str]) -> Inputs:
    """Read a file, with values replaced.

    Args:
        path: The file.
        changes: "section.key=value"; of a rate the value is replaced and becomes assumed.

    Raises:
        ConfigError: As `read_inputs`, or a change of another form.
    """
    if not changes:
        return read_inputs(path)
    content = yaml.safe_load(yaml.safe_dump(asdict(read_inputs(path))))
    for change in changes:
        name, _, text = change.partition("=")
        section, _, key = name.partition(".")
        if not key or not text or section not in content:
            raise ConfigError(
                "a change of the inputs has another form",
                expected="SECTION.KEY=VALUE with the section model, job or rates",
                got=change,
                where="--set",
                fix="For example --set job.servers=64",
            )
        value = yaml.safe_load(text)
        if section == "rates":
            value = {"value": value, "source": "assumed", "how": "--set"}
        content[section][key] = value
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / path.name
        changed.write_text(yaml.safe_dump(content), encoding="utf-8")
        return read_inputs(changed)


def print_check(inputs: Inputs, arguments: argparse.Namespace) -> int:
    """Print predicted and measured seconds; return 1 if one is too far off."""
    run = check.read_run(arguments.check)
    print(f"{len(run.steps)} steps of {arguments.check}, the {arguments.step} one of each clock")
    print("| clock | predicted, s | measured, s | predicted / measured |")
    print("| --- | --- | --- | --- |")
    is_off = False
    for one in check.compare(inputs, run, arguments.step):
        is_far = abs(one.ratio - 1) > arguments.within
        is_off |= is_far
        mark = f", not within {arguments.within:.0%}" if is_far else ""
        row = f"| {one.clock} | {one.predicted_s:.3g} | {one.measured_s:.3g} "
        print(row + f"| {one.ratio:.2f}{mark} |")
    return int(is_off)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        prog="python -m tools.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("inputs", type=Path, help="YAML file; examples in tools/simulate/inputs")
    made.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="replace a value"
    )
    made.add_argument("--rates", action="store_true", help="print each rate with its source")
    made.add_argument("--picture", type=Path, metavar="FILE.svg", help="seconds of each design")
    made.add_argument("--check", type=Path, metavar="RUN_DIR", help="compare with a finished run")
    made.add_argument("--fit", type=Path, metavar="RUN_DIR", help="print the rates of a run")
    made.add_argument(
        "--step", choices=check.STATISTICS, default="median", help="which of the run's steps"
    )
    made.add_argument("--within", type=float, default=0.2, help="largest deviation (default 0.2)")
    return made


def write_picture(inputs: Inputs, path: Path) -> None:
    """Draw the seconds of each design."""
    seconds = {design.name: step_seconds(inputs, design) for design in DESIGNS}
    seconds["limit"] = limit_seconds(inputs)
    bars = [
        Bar(label=name, value=value, low=value, high=value, is_marked=name == TODAY.name)
        for name, value in seconds.items()
    ]
    write_bars(path, f"Seconds of a step, {inputs.model.name}", bars)


def run(arguments: argparse.Namespace) -> int:
    """Print what was asked for; return the exit status."""
    inputs = read_with(arguments.inputs, arguments.set)
    if arguments.check:
        return print_check(inputs, arguments)
    if arguments.fit:
        rates = check.fitted(inputs, check.read_run(arguments.fit), arguments.step, arguments.fit)
        print(yaml.safe_dump({name: asdict(rate) for name, rate in rates.items()}, width=200))
        return 0
    print("\n".join([heading(inputs), "", *summary(inputs), ""]))
    for design in DESIGNS:
        print("\n".join(table(inputs, design)))
    if arguments.rates:
        print("| rate | value | source | how |\n| --- | --- | --- | --- |")
        for name, rate in vars(inputs.rates).items():
            print(f"| {name} | {rate.value:g} | {rate.source} | {rate.how} |")
    if arguments.picture:
        write_picture(inputs, arguments.picture)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; an error of the user is one line."""
    try:
        return run(make_parser().parse_args(argv))
    except RoutingReplayError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
