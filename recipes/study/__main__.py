"""The study: `python -m recipes.study run` runs or resumes it, `tables` makes its tables."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from routing_replay.errors import RoutingReplayError
from routing_replay.files import atomic_write

from . import tables
from .cells import Cell, main_cells, pilot, presets
from .results import FOLDER, StudyError, code_version, file_name, load, of_run

# Steps of a run; tiny_cpu has 24.
STEPS = 24


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except RoutingReplayError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Run what has no result yet; a run that was interrupted goes on from its checkpoint."""
    arguments.results.mkdir(parents=True, exist_ok=True)
    if any(arguments.results.glob("*-seed*.json")):
        _require_same_code(arguments.results)
    todo = [
        (cell, seed)
        for cell in _cells(arguments)
        for seed in cell.seeds
        if not (arguments.results / file_name(cell.name, seed)).exists()
    ]
    if arguments.dry_run:
        for cell, seed in todo:
            print(" ".join(command(cell, seed, arguments)))
        return
    failed = []
    with (
        ThreadPoolExecutor(arguments.jobs) as pool,
        tqdm(total=len(todo), unit="run", dynamic_ncols=True) as bar,
    ):
        for name, error in pool.map(lambda run: _run_one(run[0], run[1], arguments), todo):
            bar.update()
            if error:
                failed.append(f"{name}: {error}")
    if failed:
        raise StudyError(
            f"{len(failed)} of {len(todo)} runs failed",
            got="; ".join(failed),
            fix="Run the same command again: finished runs are kept, the others resumed",
        )


def command(cell: Cell, seed: int, arguments: argparse.Namespace) -> list[str]:
    """Return the command of one run."""
    folder = run_folder(cell, seed, arguments)
    flags = [*cell.flags, "--seed", str(seed), "--steps", str(arguments.steps)]
    resume = ["--resume"] if (folder / "config.json").exists() else flags
    return [sys.executable, "-m", "recipes.minirl", "--run-dir", str(folder), *resume]


def run_folder(cell: Cell, seed: int, arguments: argparse.Namespace) -> Path:
    """Return the folder of a run."""
    folder: Path = arguments.runs / f"{cell.name}-seed{seed}"
    return folder


def make_tables(arguments: argparse.Namespace) -> None:
    """Print the tables of the kept results; write the picture."""
    results = load(arguments.results, arguments.cells)
    print(tables.summary(results))
    if arguments.baseline:
        names = tables.by_cell(results)
        if arguments.baseline not in names:
            raise StudyError("no such cell", expected=", ".join(names), got=arguments.baseline)
        print(tables.differences(results, arguments.baseline, arguments.column))
    if arguments.picture:
        with atomic_write(arguments.picture) as path:
            path.write_text(tables.picture(results, arguments.column))


def _run_one(cell: Cell, seed: int, arguments: argparse.Namespace) -> tuple[str, str]:
    """Run one cell with one seed; return its name, and what went wrong."""
    folder = run_folder(cell, seed, arguments)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    with open(log, "ab") as output:
        words = command(cell, seed, arguments)
        status = subprocess.run(words, stdout=output, stderr=output, check=False).returncode
    if status:
        return folder.name, f"status {status}, see {log}"
    of_run(folder, cell.name, seed, cell.flags).save(arguments.results)
    return folder.name, ""


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    rate, minibatches, precision = arguments.regime
    cells = [*pilot(), *main_cells((rate, int(minibatches), precision)), *presets()]
    chosen = [cell for cell in cells if fnmatch(cell.name, arguments.cells)]
    if not chosen:
        names = ", ".join(cell.name for cell in cells)
        raise StudyError("no cell has such a name", expected=names, got=arguments.cells)
    return chosen


def _require_same_code(folder: Path) -> None:
    kept = load(folder)[0].code
    if kept != code_version():
        raise StudyError(
            "the kept results come from another version of the code",
            expected=kept,
            got=code_version(),
            where=folder,
            fix="Go on with the sources of these results, or name another folder with --results",
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.study", description=__doc__)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="run or resume the cells that have no result yet")
    runs.add_argument("--runs", type=Path, default=Path("runs/study"), help="folders of the runs")
    runs.add_argument("--steps", type=int, default=STEPS, help="training steps of each run")
    runs.add_argument("--jobs", type=int, default=1, help="runs side by side")
    runs.add_argument(
        "--regime",
        nargs=3,
        metavar=("RATE", "N", "PRECISION"),
        default=("1e-3", "8", "fp8-grid"),
        help="of the main cells: learning rate, mini-batches per step, rollout weights",
    )
    runs.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    runs.set_defaults(command=run)
    made = commands.add_parser("tables", help="tables and a picture from the kept results")
    made.add_argument("--baseline", default="", help="cell of the differences paired by seed")
    made.add_argument("--column", default=next(iter(tables.COLUMNS)), choices=tables.COLUMNS)
    made.add_argument("--picture", type=Path, help="SVG file to write")
    made.set_defaults(command=make_tables)
    for each in (runs, made):
        each.add_argument("--cells", default="*", help="only cells that match, as 'pilot-*'")
        each.add_argument("--results", type=Path, default=FOLDER, help="folder of the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
