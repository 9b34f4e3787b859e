"""Planning: how even the expert-parallel ranks become, and what a plan costs.

    python -m tools.bench.plan
    python -m tools.bench.plan --routes RUN/last_batch/routes.safetensors

computes, without Megatron, and prints the busiest rank's load over the mean for packing, placement
and both, beside natural order, sequences sorted by length, first-fit-decreasing and the lower
bound; then the seconds of planning against the number of sequences, layers and experts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from routing_replay.balance import (
    Budget,
    Packing,
    Placement,
    PlanLayout,
    PlanOptions,
    Prediction,
    plan,
)
from routing_replay.balance.loads import StepLoads
from routing_replay.balance.packing import deal, in_order
from routing_replay.balance.step_plan import KINDS, minibatches
from routing_replay.routes.parts import open_table

from .paired import finish, parse, parser

QUICK = {"sequences": 32, "layers": 2, "experts": [16], "ranks": [2, 4], "sizes": 2, "length": 64}


@dataclass(frozen=True, kw_only=True)
class Step:
    """Counts of a step's sequences, as a table holds them."""

    counts_SLE: np.ndarray
    lengths_S: np.ndarray
    top_k: int


def synthetic(
    *,
    num_sequences: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    length: int,
    skew: float,
    topics: int = 8,
    seed: int = 0,
) -> Step:
    """Return sequences of several topics whose experts follow Zipf's law.

    Half of a token's choices follow its layer's experts, half those of its sequence's topic. The
    lengths are log-normal around `length`, at most eight times as long.

    Args:
        skew: Exponent of the law; 0 uses all experts alike.
    """
    generator = np.random.default_rng(seed)
    shares_E = np.arange(1, num_experts + 1) ** -skew
    shares_E /= shares_E.sum()
    own_LE = np.stack([generator.permutation(shares_E) for _ in range(num_layers)])
    shares_PLE = np.stack(
        [[(own_E + generator.permutation(shares_E)) / 2 for own_E in own_LE] for _ in range(topics)]
    )
    drawn_S = generator.lognormal(np.log(length), 0.7, num_sequences)
    rows_S = np.clip(drawn_S, length // 16 + 1, 8 * length).astype(np.int64)
    topic_S = generator.integers(0, topics, num_sequences)
    counts_SLE = generator.multinomial((rows_S * top_k)[:, None], shares_PLE[topic_S])
    return Step(counts_SLE=counts_SLE.astype(np.uint32), lengths_S=rows_S + 1, top_k=top_k)


def from_routes(path: Path) -> Step:
    """Return the counts of a routes file."""
    table = open_table(path, verify=False)
    return Step(
        counts_SLE=table.expert_counts(),
        lengths_S=np.diff(table.offsets_S1) + 1,
        top_k=table.shape.top_k,
    )


def compare(step: Step, ranks: int, minibatch: int) -> dict[str, float]:
    """Return the busiest rank's load over the mean for every way to arrange the step."""
    layout = PlanLayout(data=ranks, expert=ranks)
    fed_S = step.lengths_S - 1
    # About four microbatches of a rank, and never less than the longest sequence.
    tokens = max(int(fed_S.max()), int(fed_S.sum() * minibatch / len(fed_S) / ranks / 4))
    options = PlanOptions(minibatch_size=minibatch, budget=Budget(tokens=tokens))
    peaks = {}
    for name, order_S in (
        ("natural order", np.arange(len(fed_S))),
        ("sorted by length", np.argsort(fed_S, kind="stable")),
        ("first-fit-decreasing", np.argsort(-fed_S, kind="stable")),
    ):
        peaks[name] = peak_in_order(step, layout, options, order_S)
    for kind in KINDS[1:]:
        planned = plan(
            step.counts_SLE,
            step.lengths_S,
            layout,
            replace(options, kind=kind),  # type: ignore[arg-type]
            top_k=step.top_k,
        )
        peaks[kind] = planned.prediction.peak_over_mean
    peaks["lower bound"] = float(planned.lower_bound_L.mean())
    return peaks


def peak_in_order(
    step: Step,
    layout: PlanLayout,
    options: PlanOptions,
    order_S: np.ndarray,
    placement: Placement | None = None,
) -> float:
    """Return the busiest rank's load over the mean if bins take the sequences in an order."""
    loads = StepLoads.of(step.counts_SLE, step.lengths_S, step.top_k)
    bins = []
    for own_S in minibatches(len(order_S), options.minibatch_size):
        # The order within the minibatch: a plan may not move a sequence to another update.
        place_S = np.empty(len(order_S), np.int64)
        place_S[order_S] = np.arange(len(order_S))
        order = np.argsort(place_S[own_S])
        ordered = in_order(loads.lengths_S[own_S], order, options.budget, layout)
        bins.append(deal([own_S[one].tolist() for one in ordered], layout))
    packing = Packing(bins=tuple(bins), layout=layout)
    placement = placement or Placement.natural(loads.num_layers, loads.num_experts, layout.expert)
    return Prediction.of(loads, packing, loads.by_rank(placement)[0], options.cost).peak_over_mean


def planning_seconds(step: Step, ranks: int, minibatch: int) -> dict[str, float]:
    """Return the processor time of a plan of each kind."""
    layout = PlanLayout(data=ranks, expert=ranks)
    fed_S = step.lengths_S - 1
    tokens = max(int(fed_S.max()), int(fed_S.sum() * minibatch / len(fed_S) / ranks / 4))
    seconds = {}
    for kind in KINDS[1:]:
        options = PlanOptions(
            minibatch_size=minibatch,
            budget=Budget(tokens=tokens),
            kind=kind,  # type: ignore[arg-type]
        )
        times = []
        for _ in range(3):
            started = time.process_time()
            plan(step.counts_SLE, step.lengths_S, layout, options, top_k=step.top_k)
            times.append(time.process_time() - started)
        seconds[kind] = min(times)
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    made = parser(__doc__)
    made.add_argument("--routes", type=Path, help="a routes file instead of synthetic routes")
    made.add_argument("--sequences", type=int, default=512)
    made.add_argument("--layers", type=int, default=12)
    made.add_argument("--experts", type=int, nargs="+", default=[32, 64, 128, 256])
    made.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    made.add_argument("--skews", type=float, nargs="+", default=[0.3, 0.6])
    made.add_argument("--length", type=int, default=1024, help="tokens of a usual sequence")
    made.add_argument("--minibatches", type=int, default=4)
    made.add_argument("--sizes", type=int, default=4, help="sizes of which planning is timed")
    arguments = parse(made, argv, QUICK)
    figures = {"peak over mean": _peaks(arguments), "planning seconds": _times(arguments)}
    finish("plan", arguments, figures)


def _peaks(arguments: Any) -> dict[str, dict[str, float]]:
    steps = {}
    if arguments.routes:
        steps[arguments.routes.name] = from_routes(arguments.routes)
    for skew in () if arguments.routes else arguments.skews:
        for experts in arguments.experts:
            steps[f"{experts} experts, skew {skew}"] = synthetic(
                num_sequences=arguments.sequences,
                num_layers=arguments.layers,
                num_experts=experts,
                top_k=min(8, experts // 4),
                length=arguments.length,
                skew=skew,
            )
    figures = {}
    for name, step in steps.items():
        minibatch = len(step.lengths_S) // arguments.minibatches
        for ranks in arguments.ranks:
            if step.counts_SLE.shape[2] % ranks or minibatch < ranks:
                continue
            peaks = compare(step, ranks, minibatch)
            figures[f"{name}, EP {ranks}"] = peaks
            line = ", ".join(f"{kind} {value:.3f}" for kind, value in peaks.items())
            print(f"{name}, EP {ranks}: {line}", flush=True)
    return figures


def _times(arguments: Any) -> dict[str, dict[str, float]]:
    if arguments.routes:
        return {}
    # Each row doubles one number of the row before, up to the size of the target.
    sizes = [(1024, 24, 64), (2048, 24, 64), (2048, 48, 64), (4096, 48, 128)][: arguments.sizes]
    ranks = 8
    if arguments.quick:
        sizes, ranks = [(64, 2, 16), (128, 2, 16)], 2
    figures = {}
    for sequences, layers, experts in sizes:
        step = synthetic(
            num_sequences=sequences,
            num_layers=layers,
            num_experts=experts,
            top_k=8,
            length=arguments.length,
            skew=0.6,
        )
        seconds = planning_seconds(step, ranks, sequences // 8)
        name = f"{sequences} sequences x {layers} layers x {experts} experts, EP {ranks}"
        figures[name] = seconds
        line = ", ".join(f"{kind} {value:.2f} s" for kind, value in seconds.items())
        print(f"{name}: {line}", flush=True)
    return figures


if __name__ == "__main__":
    main()
