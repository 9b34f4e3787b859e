"""Plans beside those of a kept solver: scipy's mixed-integer programming (HiGHS).

    python -m tools.bench.plan_solver [--limit 30]

gives the solver the same two problems with a time limit: which rank holds which expert of a layer,
and which sequences share a microbatch. Printed are the busiest rank's load over the mean, and the
processor time, for ours, for the solver, for longest-first placement, and for natural order,
sequences sorted by length and first-fit-decreasing; the solver also gives a bound that nothing can
go below. scipy comes with SGLang.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from routing_replay.balance import Budget, Placement, PlanLayout, PlanOptions, plan
from routing_replay.balance.loads import StepLoads
from routing_replay.balance.placement import swapped

from .paired import finish, parse, parser
from .plan import Step, peak_in_order, synthetic

QUICK = {"layers": 1, "experts": 8, "ranks": 2, "sequences": 8, "limit": 1.0}


def optimize() -> Any:
    """Return scipy's module; it carries no types."""
    return importlib.import_module("scipy.optimize")


def sparse() -> Any:
    """Return scipy's module; it carries no types."""
    return importlib.import_module("scipy.sparse")


def place_by_solver(loads_E: np.ndarray, num_ranks: int, limit_s: float) -> tuple[float, float]:
    """Return the smallest load of the busiest rank that the solver finds, and its bound."""

    num_experts = len(loads_E)
    # Variables: x[e, r], whether rank r holds expert e; t, the busiest rank's load.
    num_x = num_experts * num_ranks
    once = np.zeros((num_experts, num_x + 1))
    full, busiest = np.zeros((num_ranks, num_x + 1)), np.zeros((num_ranks, num_x + 1))
    for expert in range(num_experts):
        once[expert, expert * num_ranks : (expert + 1) * num_ranks] = 1
    for rank in range(num_ranks):
        full[rank, rank:num_x:num_ranks] = 1
        busiest[rank, rank:num_x:num_ranks] = loads_E
        busiest[rank, num_x] = -1
    result = optimize().milp(
        np.append(np.zeros(num_x), 1.0),
        integrality=np.append(np.ones(num_x), 0),
        bounds=_bounds(num_x, 1, float(loads_E.sum())),
        constraints=[
            optimize().LinearConstraint(once, 1, 1),
            optimize().LinearConstraint(full, num_experts // num_ranks, num_experts // num_ranks),
            optimize().LinearConstraint(busiest, -np.inf, 0),
        ],
        options={"time_limit": limit_s},
    )
    return _found(result)


def pack_by_solver(loads_RSL: np.ndarray, num_cells: int, limit_s: float) -> tuple[float, float]:
    """Return the smallest sum of the busiest ranks' loads that the solver finds, and its bound."""

    num_ranks, num_sequences, num_layers = loads_RSL.shape
    # Variables: x[s, c], whether cell c holds sequence s; t[c, l], its busiest rank's load.
    num_x, num_t = num_sequences * num_cells, num_cells * num_layers
    once = sparse().lil_matrix((num_sequences, num_x + num_t))
    for sequence in range(num_sequences):
        once[sequence, sequence * num_cells : (sequence + 1) * num_cells] = 1
    # Every data-parallel rank needs a sequence in every microbatch.
    filled = sparse().lil_matrix((num_cells, num_x + num_t))
    for cell in range(num_cells):
        filled[cell, cell:num_x:num_cells] = 1
    busiest = sparse().lil_matrix((num_t * num_ranks, num_x + num_t))
    rows = (
        (c, la, r) for c in range(num_cells) for la in range(num_layers) for r in range(num_ranks)
    )
    for row, (cell, layer, rank) in enumerate(rows):
        busiest[row, cell:num_x:num_cells] = loads_RSL[rank, :, layer]
        busiest[row, num_x + cell * num_layers + layer] = -1
    result = optimize().milp(
        np.append(np.zeros(num_x), np.ones(num_t)),
        integrality=np.append(np.ones(num_x), np.zeros(num_t)),
        bounds=_bounds(num_x, num_t, float(loads_RSL.sum())),
        constraints=[
            optimize().LinearConstraint(once.tocsr(), 1, 1),
            optimize().LinearConstraint(filled.tocsr(), num_ranks, np.inf),
            optimize().LinearConstraint(busiest.tocsr(), -np.inf, 0),
        ],
        options={"time_limit": limit_s},
    )
    return _found(result)


def _bounds(num_x: int, num_t: int, most: float) -> Any:
    return optimize().Bounds(0, np.append(np.ones(num_x), np.full(num_t, most)))


def _found(result: Any) -> tuple[float, float]:
    """Objective and bound; without a solution in time the objective is not a number."""
    found = float("nan") if result.x is None else float(result.fun)
    return found, float(result.mip_dual_bound)


def place_longest_first(loads_E: np.ndarray, num_ranks: int) -> float:
    """Return the busiest rank's load if each expert, heaviest first, takes the lightest rank."""
    loads_R, room_R = np.zeros(num_ranks), np.full(num_ranks, len(loads_E) // num_ranks)
    for load in -np.sort(-loads_E):
        rank = int(np.where(room_R > 0, loads_R, np.inf).argmin())
        loads_R[rank] += load
        room_R[rank] -= 1
    return float(loads_R.max())


def placements(step: Step, num_ranks: int, limit_s: float) -> dict[str, dict[str, float]]:
    """Place each layer's experts for the whole step; peak over mean and seconds of all layers."""
    loads_LE = step.counts_SLE.sum(0, dtype=np.float64)
    num_layers, num_experts = loads_LE.shape
    mean = loads_LE.sum() / num_ranks
    natural = Placement.natural(num_layers, num_experts, num_ranks)

    def busiest(placement: Placement) -> float:
        pairs = zip(loads_LE, range(num_layers), strict=True)
        return sum(float((row @ placement.is_on_rank_ER(layer)).max()) for row, layer in pairs)

    solved: list[tuple[float, float]] = []
    ways: dict[str, Callable[[], float]] = {
        "natural": lambda: busiest(natural),
        "longest first": lambda: sum(place_longest_first(row, num_ranks) for row in loads_LE),
        "ours": lambda: busiest(swapped(loads_LE[:, None], natural)),
        "HiGHS": lambda: sum(
            found for found, _ in _collected(solved, loads_LE, num_ranks, limit_s)
        ),
    }
    figures = {name: _timed(way, mean) for name, way in ways.items()}
    figures["bound of HiGHS"] = {"peak_over_mean": sum(b for _, b in solved) / mean, "seconds": 0.0}
    return figures


def _collected(
    solved: list[tuple[float, float]], loads_LE: np.ndarray, num_ranks: int, limit_s: float
) -> list[tuple[float, float]]:
    solved += [place_by_solver(row, num_ranks, limit_s) for row in loads_LE]
    return solved


def packings(step: Step, num_ranks: int, num_cells: int, limit_s: float) -> dict[str, Any]:
    """Pack one minibatch under our placement; peak over mean and seconds."""
    layout = PlanLayout(data=num_ranks, expert=num_ranks)
    options = PlanOptions(budget=Budget(microbatches=num_cells))
    planned = plan(step.counts_SLE, step.lengths_S, layout, options, top_k=step.top_k)
    loads = StepLoads.of(step.counts_SLE, step.lengths_S, step.top_k)
    (loads_RSL,) = loads.by_rank(planned.placement)
    mean = float(loads_RSL.sum()) / num_ranks
    fixed = replace(options, kind="packing", placement=planned.placement)
    solved: list[float] = []

    def solve() -> float:
        found, bound = pack_by_solver(loads_RSL, num_cells, limit_s)
        solved.append(bound)
        return found

    def ours(rounds: int) -> float:
        more = replace(fixed, rounds=rounds)
        step_plan = plan(step.counts_SLE, step.lengths_S, layout, more, top_k=step.top_k)
        return step_plan.prediction.peak_over_mean * mean

    orders = {
        "natural": np.arange(len(step.lengths_S)),
        "sorted by length": np.argsort(step.lengths_S, kind="stable"),
        "first-fit-decreasing": np.argsort(-step.lengths_S, kind="stable"),
    }
    ways: dict[str, Callable[[], float]] = {
        name: lambda order=order: (  # type: ignore[misc]
            peak_in_order(step, layout, fixed, order, planned.placement) * mean
        )
        for name, order in orders.items()
    }
    ways |= {"ours": lambda: ours(1), "ours, 16 rounds": lambda: ours(16), "HiGHS": solve}
    figures = {name: _timed(way, mean) for name, way in ways.items()}
    figures["bound of HiGHS"] = {"peak_over_mean": solved[0] / mean, "seconds": 0.0}
    return figures


def _timed(way: Callable[[], float], mean: float) -> dict[str, float]:
    started = time.process_time()
    peak = way() / mean
    return {"peak_over_mean": peak, "seconds": time.process_time() - started}


def _print(title: str, figures: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}\n| | peak / mean | s |\n| --- | --- | --- |")
    for name, row in figures.items():
        print(f"| {name} | {row['peak_over_mean']:.4f} | {row['seconds']:.3f} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    made = parser(__doc__)
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--experts", type=int, default=64)
    made.add_argument("--ranks", type=int, default=8)
    made.add_argument("--sequences", type=int, default=64)
    made.add_argument("--microbatches", type=int, default=4)
    made.add_argument("--skew", type=float, default=0.6)
    made.add_argument(
        "--limit", type=float, default=30.0, help="seconds of each call of the solver"
    )
    arguments: argparse.Namespace = parse(made, argv, QUICK)
    step = synthetic(
        num_sequences=arguments.sequences,
        num_layers=arguments.layers,
        num_experts=arguments.experts,
        top_k=min(8, arguments.experts // 4),
        length=1024,
        skew=arguments.skew,
    )
    figures = {
        "placement": placements(step, arguments.ranks, arguments.limit),
        "packing": packings(step, arguments.ranks, arguments.microbatches, arguments.limit),
    }
    for name, rows in figures.items():
        _print(name, rows)
    finish("plan_solver", arguments, figures)


if __name__ == "__main__":
    main()
