"""Seconds of a real Megatron step under expert parallelism, in natural order and planned.

    python -m tools.bench.plan_step                             # the model's own routes
    python -m tools.bench.plan_step --routes zipf --skew 0.8    # drawn ones
    python -m tools.bench.plan_step --routes RUN/last_batch/routes.safetensors

starts two processes of one thread each (EP2, gloo) that take the recipe's training step, the old
policy's pass and one update over packed microbatches, in turns:

    live       without replay (the model's own routes only)
    natural    R3, Megatron's order of sequences and experts
    packing, placement, both    R3 and a plan

A step waits for its busiest rank at every collective. The path is the sum, between collectives, of
the busiest rank's processor time: what a step takes on cores of its own, whoever else uses the
machine. The ideal is the mean rank's instead: the same work, evenly spread. Planning and the moving
of experts are timed apart. Other batches of the same model then fit the cost model, and half of
them are predicted by the other half.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from recipes.minirl.policy.policy import FixedScores, Policy
from recipes.minirl.policy.step_plan import PlannedStep, plan_alone
from recipes.minirl.rollout.batch import Batch
from recipes.minirl.settings.config import RecipeConfig
from recipes.model.cpu import enable_cpu
from routing_replay.balance import StepPlan
from routing_replay.routes.parts import open_table
from routing_replay.routes.table import RouteTable

from .paired import finish, parse, parser
from .plan_step_figures import Timing, parts_between_collectives, report
from .plan_step_inputs import drawn_table, random_batch, random_lengths, write_model

QUICK = {
    "sequences": 8,
    "length": 12,
    "layers": 2,
    "hidden": 32,
    "expert_size": 32,
    "experts": 4,
    "top_k": 2,
    "rounds": 1,
    "fitted": 2,
}
RANKS = 2
KINDS = ("packing", "placement", "both")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch and its routes, as every rank has them."""

    batch: Batch
    table: RouteTable


def recipe(arguments: argparse.Namespace, lengths_S: np.ndarray) -> RecipeConfig:
    """Return the recipe's settings: one update, about four packed microbatches on each rank."""
    tokens = max(int(lengths_S.max()), int(lengths_S.sum() / RANKS / 4 * 1.1))
    return RecipeConfig.from_mapping(
        {
            "nproc": RANKS,
            "expert_parallel": RANKS,
            "routing_replay_mode": "R3",
            "plan": "both",
            "minibatch_size": len(lengths_S),
            "prompts_per_step": len(lengths_S),
            "samples_per_prompt": 1,
            "microbatch_tokens": tokens,
            "learning_rate": 1e-12,  # every step is the same one
            "trainer_dtype": "float32",
            "cpu_threads": 1,
        }
    )


class Bench:
    """The recipe's policy on one rank, and the steps that it is timed with."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, table: RouteTable | None):
        self.arguments = arguments
        lengths_S = random_lengths(arguments, 0)
        if table is not None:
            lengths_S = np.diff(table.offsets_S1) + 1
        self.config = recipe(arguments, lengths_S)
        self.policy = Policy(self.config, folder)
        self.case = self.case_of(lengths_S, table, 0)

    def take(self, config: RecipeConfig) -> None:
        """Go on with steps of another size."""
        t, self.config, self.policy.config = config.training, config, config
        self.policy.follow(None)
        self.policy.sharding = replace(
            self.policy.sharding,
            minibatch_size=t.minibatch_size,
            microbatch_tokens=t.microbatch_tokens,
        )

    def case_of(self, lengths_S: np.ndarray, table: RouteTable | None, seed: int) -> Case:
        """Return a batch with a table, or else with drawn or the model's own routes."""
        batch = random_batch(lengths_S, seed)
        if table is None and self.arguments.routes == "zipf":
            table = drawn_table(self.arguments, lengths_S, seed)
        if table is None:
            with self.policy.replay.recording(batch.lengths_S.numpy()) as recorded:
                self.policy.score(batch, recorded)
            table = recorded.table()
            table.source = "rollout"  # as if the engine had routed exactly as the trainer does
        return Case(batch=batch, table=table)

    def plan(self, case: Case, kind: str) -> StepPlan:
        """Return a plan from Megatron's own placement; the same on every rank."""
        t = replace(self.config.training, plan=kind)
        return plan_alone(t, self.policy.sharding, case.batch, case.table, None)

    def follow(self, plan: StepPlan | None) -> float:
        """Take a plan's arrangement; return the seconds of the moves."""
        assert self.policy.placed is not None
        dist.barrier()
        started = time.perf_counter()
        if plan is None:
            self.policy.follow(None)
            self.policy.placed.home()
        else:
            self.policy.follow(
                PlannedStep(
                    packing=plan.packing,
                    placement=plan.placement,
                    counts_SLE=plan.counts_SLE,
                    metrics={},
                )
            )
        dist.barrier()
        return time.perf_counter() - started

    def step(self, case: Case, is_replayed: bool = True) -> Timing:
        """Run the old policy's pass and one update."""
        policy, batch = self.policy, case.batch
        source = case.table if is_replayed else None
        objective = self.config.make_objective()

        def scope() -> Any:
            if not is_replayed:
                return nullcontext()
            return policy.replay.replaying(case.table, **policy.planned_counts(0))

        dist.barrier()
        started = time.perf_counter()
        with parts_between_collectives() as parts_N:
            with scope():
                scores = policy.score(batch, source)
            with scope():
                policy.update(batch, source, FixedScores(old=scores), objective, 0)
            dist.barrier()
        return Timing(wall_s=time.perf_counter() - started, parts_N=parts_N)


def run(rank: int, arguments: argparse.Namespace, folder: str, output: str) -> None:
    """Be one rank; rank 0 writes what all of them measured."""
    torch.set_num_threads(1)
    enable_cpu()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
    )
    table = None
    if arguments.routes not in ("own", "zipf"):
        table = open_table(Path(arguments.routes), verify=False)
    bench = Bench(arguments, Path(folder) / "model", table)
    figures = {"turns": turns(bench), "fit": fitting(bench)}
    gathered: list[Any] = [None] * RANKS
    dist.all_gather_object(gathered, figures)
    if rank == 0:
        torch.save(gathered, output)
    dist.barrier()
    dist.destroy_process_group()


def turns(bench: Bench) -> dict[str, Any]:
    """Take the steps in turns; times, predictions, seconds of planning and moving."""
    names = (["live"] if bench.arguments.routes == "own" else []) + ["natural", *KINDS]
    plans: dict[str, StepPlan] = {}
    planning = {}
    for kind in KINDS:
        started = time.process_time()
        plans[kind] = bench.plan(bench.case, kind)
        planning[kind] = time.process_time() - started
    times: dict[str, list[Timing]] = {name: [] for name in names}
    moving: list[float] = []
    for number in range(bench.arguments.rounds + 1):
        for name in names if number % 2 else names[::-1]:
            seconds = bench.follow(plans.get(name))
            if name in ("placement", "both"):
                moving.append(seconds)
            timing = bench.step(bench.case, is_replayed=name != "live")
            if number:
                times[name].append(timing)
    both = plans["both"]
    peaks = {"natural": both.natural.peak_over_mean}
    peaks |= {kind: planned.prediction.peak_over_mean for kind, planned in plans.items()}
    return {"times": times, "planning": planning, "moving": moving, "peaks": peaks}


def fitting(bench: Bench) -> list[tuple[list[float], Timing]]:
    """Features and times of other batches: other lengths, in natural order and planned."""
    steps = []
    arguments = argparse.Namespace(**vars(bench.arguments))
    for number in range(bench.arguments.fitted):
        # From half to all of the tokens, in fewer or more sequences.
        arguments.sequences = max(4, bench.arguments.sequences * (2 + number % 3) // 4)
        arguments.length = bench.arguments.length * (3 + number % 2) // 4
        lengths_S = random_lengths(arguments, 1 + number)
        bench.take(recipe(arguments, lengths_S))
        kind = "both" if number % 2 else "none"
        bench.follow(None)
        case = bench.case_of(lengths_S, None, 1 + number)
        plan = bench.plan(case, kind)
        bench.follow(plan)
        steps.append((plan.prediction.features.tolist(), bench.step(case)))
    return steps


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    made = parser(__doc__)
    made.add_argument("--routes", default="own", help="own, zipf, or a routes file")
    made.add_argument("--skew", type=float, default=1.0, help="of the routers, or of Zipf's law")
    made.add_argument("--sequences", type=int, default=48)
    made.add_argument("--length", type=int, default=64, help="tokens of a usual sequence")
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--hidden", type=int, default=256)
    made.add_argument("--expert-size", type=int, default=512)
    made.add_argument("--experts", type=int, default=16)
    made.add_argument("--top-k", type=int, default=4)
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument(
        "--fitted", type=int, default=12, help="steps that the cost model is fitted to"
    )
    made.add_argument("--seed", type=int, default=0)
    arguments = parse(made, argv, QUICK)
    if arguments.routes not in ("own", "zipf"):
        shape = open_table(Path(arguments.routes), verify=False).shape
        arguments.layers, arguments.experts = len(shape.layers), shape.num_experts
        arguments.top_k = shape.top_k
    with tempfile.TemporaryDirectory() as folder:
        write_model(arguments, Path(folder) / "model")
        output = f"{folder}/figures.pt"
        start_processes(run, (arguments, folder, output), nprocs=RANKS)
        ranks = torch.load(output, weights_only=False)
    finish("plan_step", arguments, report(ranks))


if __name__ == "__main__":
    main()
