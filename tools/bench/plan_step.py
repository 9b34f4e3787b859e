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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from recipes.minirl.batch import Batch, Sample
from recipes.minirl.config import RecipeConfig
from recipes.minirl.policy import FixedScores, Policy
from recipes.minirl.step_plan import PlannedStep, plan_alone
from recipes.model.cpu import enable_cpu
from recipes.model.tiny import tiny_config
from routing_replay.balance import CostModel, StepPlan
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

from .paired import finish, parse, parser, ratios, spread

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
RANKS, VOCAB = 2, 128
KINDS = ("packing", "placement", "both")
COLLECTIVES = ("all_to_all_single", "all_reduce", "barrier", "reduce_scatter_tensor")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One step on one rank.

    Args:
        wall_s: From barrier to barrier.
        parts_N: Processor seconds between one collective and the next.
    """

    wall_s: float
    parts_N: list[float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch and its routes, as every rank has them."""

    batch: Batch
    table: RouteTable


def write_model(arguments: argparse.Namespace, folder: Path) -> None:
    """Write a random Qwen3-MoE whose routers prefer some experts.

    All embeddings share one direction, and each router has its own liking for it.
    """
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(arguments.seed)
    config = tiny_config(
        layers=arguments.layers,
        hidden=arguments.hidden,
        experts=arguments.experts,
        top_k=arguments.top_k,
        vocab=VOCAB,
        expert_size=arguments.expert_size,
        initializer_range=0.02,
        max_position_embeddings=16 * arguments.length,
    )
    model = Qwen3MoeForCausalLM(config)
    direction_H = torch.nn.functional.normalize(torch.randn(arguments.hidden), dim=0)
    with torch.no_grad():
        embeddings: Any = model.get_input_embeddings()
        embeddings.weight.normal_().add_(arguments.hidden**0.5 * direction_H)
        for layer in model.model.layers:
            # The direction is about 0.7 of a normalised state, whose length is the root of hidden.
            liking_E = torch.randn(arguments.experts) * arguments.skew
            scale = 0.7 * arguments.hidden**0.5
            gate: Any = layer.mlp.gate
            gate.weight.normal_(std=arguments.hidden**-0.5)
            gate.weight.add_(liking_E[:, None] * direction_H / scale)
    model.save_pretrained(folder)


def random_batch(lengths_S: np.ndarray, seed: int) -> Batch:
    """Return sequences of random tokens, all sampled but the first."""
    generator = np.random.default_rng(seed)
    samples = []
    for length in lengths_S.tolist():
        tokens = tuple(generator.integers(VOCAB, size=length).tolist())
        logp_mu = (-1.0,) * (length - 1)
        samples.append(Sample(prompt_ids=tokens[:1], response_ids=tokens[1:], logp_mu=logp_mu))
    batch = Batch.from_samples(samples, 1, 1)
    return replace(
        batch, advantages_S=torch.from_numpy(generator.normal(size=len(samples))).float()
    )


def random_lengths(arguments: argparse.Namespace, seed: int) -> np.ndarray:
    """Return log-normal lengths around `length`, at most four times as long."""
    generator = np.random.default_rng(seed)
    drawn_S = generator.lognormal(np.log(arguments.length), 0.5, arguments.sequences)
    lengths_S: np.ndarray = np.clip(drawn_S, 3, 4 * arguments.length).astype(np.int64)
    return lengths_S


def drawn_table(arguments: argparse.Namespace, lengths_S: np.ndarray, seed: int) -> RouteTable:
    """Return routes of four topics whose experts follow Zipf's law; see `plan.synthetic`."""
    generator = np.random.default_rng(seed)
    shape = (arguments.layers, arguments.experts)
    ranks_LE = np.argsort(np.random.default_rng(arguments.seed).random(shape), axis=1)
    ranks_PLE = np.argsort(np.random.default_rng(arguments.seed + 1).random((4, *shape)), axis=2)
    shares_E = np.arange(1, arguments.experts + 1) ** -float(arguments.skew)
    log_PLE = np.log(shares_E[ranks_LE] + shares_E[ranks_PLE])
    routes = []
    for length, topic in zip(
        lengths_S.tolist(), generator.integers(4, size=len(lengths_S)), strict=True
    ):
        # The largest of Gumbel noise and log-shares are draws without replacement.
        scores_TLE = log_PLE[topic] + generator.gumbel(size=(length - 1, *shape))
        ids_TLK = np.argsort(-scores_TLE, axis=2)[..., : arguments.top_k].astype(np.uint8)
        layers = tuple(range(arguments.layers))
        routes.append(Routes(expert_ids_TLK=ids_TLK, layers=layers, num_experts=arguments.experts))
    return RouteTable.from_routes(routes)


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
                self.policy.score(batch, batch.token_rows(recorded))
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
        rows_ST = batch.token_rows(case.table if is_replayed else None)
        objective = self.config.make_objective()

        def scope() -> Any:
            if not is_replayed:
                return nullcontext()
            return policy.replay.replaying(case.table, **policy.planned_counts(0))

        dist.barrier()
        started = time.perf_counter()
        with parts_between_collectives() as parts_N:
            with scope():
                scores = policy.score(batch, rows_ST)
            with scope():
                policy.update(batch, rows_ST, FixedScores(old=scores), objective, 0)
            dist.barrier()
        return Timing(wall_s=time.perf_counter() - started, parts_N=parts_N)


@contextmanager
def parts_between_collectives() -> Iterator[list[float]]:
    """Collect the processor seconds of this thread between collectives; gloo's are not counted."""
    parts: list[float] = []
    last = time.thread_time()

    def counted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal last
            parts.append(time.thread_time() - last)
            result = collective(*arguments, **options)
            last = time.thread_time()
            return result

        return call

    with ExitStack() as stack:
        for name in COLLECTIVES:
            wrapped = counted(getattr(dist, name))
            stack.enter_context(mock.patch.object(dist, name, wrapped))
        yield parts


def run(rank: int, arguments: argparse.Namespace, folder: str, output: str) -> None:
    """Be one rank; rank 0 writes what all of them measured."""
    torch.set_num_threads(1)
    enable_cpu()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
    )
    table = None
    if arguments.routes not in ("own", "zipf"):
        table = RouteTable.open(Path(arguments.routes), verify=False)
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


def path_s(timings: Sequence[Timing], is_ideal: bool = False) -> float:
    """Return the sum of the busiest rank's parts of a step, or of the mean rank's."""
    parts_RN = np.array([timing.parts_N for timing in timings])
    return float((parts_RN.mean(0) if is_ideal else parts_RN.max(0)).sum())


def report(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Print and return the figures of all ranks together."""
    first = ranks[0]["turns"]
    by_name = {
        name: list(zip(*(one["turns"]["times"][name] for one in ranks), strict=True))
        for name in first["times"]
    }
    wall = {
        name: [max(t.wall_s for t in step) for step in steps] for name, steps in by_name.items()
    }
    path = {name: [path_s(step) for step in steps] for name, steps in by_name.items()}
    ideal = {
        name: [path_s(step) / path_s(step, is_ideal=True) for step in steps]
        for name, steps in by_name.items()
    }
    wall_ratios, path_ratios = ratios(wall, "natural"), ratios(path, "natural")
    figures: dict[str, Any] = {}
    print("| step | peak / mean | wall s | / natural | path s | / natural | path / ideal |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in by_name:
        row = {
            "peak_over_mean": first["peaks"].get(name, first["peaks"]["natural"]),
            "wall_s": spread(wall[name]),
            "wall_to_natural": wall_ratios[name],
            "path_s": spread(path[name]),
            "path_to_natural": path_ratios[name],
            "path_to_ideal": spread(ideal[name]),
        }
        figures[name] = row
        print(
            f"| {name} | {row['peak_over_mean']:.3f} | "
            + " | ".join(map(str, list(row.values())[1:]))
            + " |"
        )
    if "live" in path:
        figures["both_to_live"] = ratios(path, "live")["both"]
        figures["both_to_live_wall"] = ratios(wall, "live")["both"]
        print(f"both / live: path {figures['both_to_live']}, wall {figures['both_to_live_wall']}")
    figures["planning_s"], figures["moving_s"] = first["planning"], spread(first["moving"])
    print(f"planning {first['planning']} s, moving {figures['moving_s']} s")
    return figures | {"fit": fitted(ranks)}


def fitted(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit the cost model to half of the steps, and predict the other half."""
    features_N4 = np.array([features for features, _ in ranks[0]["fit"]])
    measured_N = np.array(
        [path_s([one["fit"][n][1] for one in ranks]) for n in range(len(features_N4))]
    )
    half = np.arange(len(measured_N)) // 2 % 2 == 0  # pairs: natural, planned
    model = CostModel.fit(features_N4[half], measured_N[half])
    predicted_N = np.array([model.seconds(features_4) for features_4 in features_N4])
    error_N = predicted_N / measured_N - 1
    print(f"{model}\npredicted / measured - 1 of the other half: {np.round(error_N[~half], 3)}")
    return {
        "model": str(model),
        "measured_s": measured_N.tolist(),
        "predicted_s": predicted_N.tolist(),
        "errors_of_the_other_half": error_N[~half].tolist(),
    }


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
        shape = RouteTable.open(Path(arguments.routes), verify=False).shape
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
