"""A whole training step of the tiny model: live, with megatron-core's own RouterReplay, with ours.

    python -m tools.bench.step [--tokens 512] [--microbatches 4] [--recompute full] [--rounds 15]

    live       no replay
    stock      megatron-core's own RouterReplay, its int64 targets set for every microbatch
    ours       routing_replay with its receipt
    telemetry  ours, comparing live with replayed routes as an adapter does by default

A step is forward, backward and AdamW (its learning rate is 0, so all steps are alike). Printed are
medians in milliseconds, the ratios to `live` and to `stock`, round by round, with their quartiles,
the largest sum of bytes that torch's allocator holds within a step, and by how much the log-probs
differ from stock's: both replay the same random routes.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from recipes.model import parallel
from recipes.model.model import build_model, transformer_config
from recipes.model.tiny import tiny_config
from routing_replay.config import ReplayConfig
from routing_replay.megatron import attach
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

from .paired import device, finish, parse, parser, ratios, spread, take_turns, timed

# isort: split
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

WAYS = ("live", "stock", "ours", "telemetry")
VOCABULARY = 128


def random_table(arguments: argparse.Namespace) -> RouteTable:
    """Return distinct random experts for every token of a step."""
    layers = tuple(range(arguments.layers))
    shape = MoEShape(layers=layers, num_experts=arguments.experts, top_k=arguments.top_k)
    table = RouteTable.empty(shape, [arguments.tokens + 1] * arguments.microbatches, "rollout")
    scores = np.random.default_rng(1).random((len(layers), table.num_rows, arguments.experts))
    table.expert_ids_LTK[:] = np.argsort(scores, axis=-1)[..., : arguments.top_k]
    table.covered_T[:] = True
    return table


class Way:
    """One of WAYS, on a model of its own.

    Args:
        name: Of the way.
        arguments: Sizes.
        table: Routes of a step.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, table: RouteTable):
        self.name, self.arguments, self.table = name, arguments, table
        layout = parallel.ParallelLayout()
        config = transformer_config(
            tiny_config(
                layers=arguments.layers,
                experts=arguments.experts,
                top_k=arguments.top_k,
                vocab=VOCABULARY,
                max_position_embeddings=arguments.tokens,
            ),
            layout,
            recompute=arguments.recompute,
            spec="local",
            moe_enable_routing_replay=name == "stock",
        )
        (self.model,) = build_model(config, layout)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        every = 0 if name == "ours" else 1
        settings = ReplayConfig(mode="R3", agreement_every=every)
        self.replay = attach(self.model, settings) if name in ("ours", "telemetry") else None
        # Its users hold int64 targets, which its gather needs.
        self.targets_LTK = torch.from_numpy(table.expert_ids_LTK.astype(np.int64))
        self.tokens_1T = torch.arange(arguments.tokens, device=device())[None] % VOCABULARY
        self.positions_1T = torch.arange(arguments.tokens, device=device())[None]

    def step(self) -> list[torch.Tensor]:
        """Train on the step's microbatches; return the log-probs of each."""
        logp = []
        self.optimizer.zero_grad()
        with self.replay.replaying(self.table) if self.replay else contextlib.nullcontext():
            for number in range(self.arguments.microbatches):
                fed_T = self.table.rows(number, self.arguments.tokens + 1)[:-1]
                nll_1T = self._forward(torch.from_numpy(fed_T))
                if self.name == "stock":  # for what is recomputed
                    action = RouterReplayAction.REPLAY_BACKWARD
                    RouterReplay.set_global_router_replay_action(action)
                nll_1T.mean().backward()
                logp.append(-nll_1T.detach())
        if self.name == "stock":
            RouterReplay.clear_global_indices()
            RouterReplay.clear_global_router_replay_action()
        self.optimizer.step()
        return logp

    def _forward(self, rows_T: torch.Tensor) -> torch.Tensor:
        if self.name == "stock":
            targets_LTK = self.targets_LTK[:, rows_T].to(self.tokens_1T.device, non_blocking=True)
            RouterReplay.set_replay_data(list(targets_LTK))
            RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        announced = self.replay.microbatch(rows_T[None]) if self.replay else None
        with announced or contextlib.nullcontext():
            nll_1T: torch.Tensor = self.model(
                self.tokens_1T, self.positions_1T, None, labels=self.tokens_1T
            )
        return nll_1T


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that torch's allocator holds during `work`, beyond those before it."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    profiler: Any = profile.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = parser(__doc__)
    defaults = {"tokens": 512, "microbatches": 4, "layers": 4, "experts": 8, "top-k": 2}
    for name, default in (defaults | {"rounds": 15}).items():
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--recompute", choices=("none", "full"), default="none")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Time every way and print one table."""
    arguments = parse(make_parser(), argv, {"tokens": 16, "microbatches": 1, "rounds": 1})
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # one thread is steadier than a shared machine's two
    parallel.initialize(parallel.ParallelLayout(), seed=1)
    table = random_table(arguments)
    ways = {name: Way(name, arguments, table) for name in WAYS}
    for way in ways.values():
        way.model.load_state_dict(ways["live"].model.state_dict())
    logp = {name: torch.cat(way.step()) for name, way in ways.items()}
    sizes = {name: peak_bytes(way.step) for name, way in ways.items()}
    times = take_turns({name: timed(way.step) for name, way in ways.items()}, arguments.rounds)
    to_live, to_stock = ratios(times, "live"), ratios(times, "stock")
    print("| way | ms | / live | / stock | peak MB | / stock | log-probs - stock's, largest |")
    print(f"|{' --- |' * 7}")
    figures = {}
    for name in WAYS:
        difference = float((logp[name] - logp["stock"]).abs().max())
        ms, to_stocks_size = 1e3 * spread(times[name]).median, sizes[name] / sizes["stock"]
        print(
            f"| {name} | {ms:.1f} | {to_live[name]} | {to_stock[name]} | {sizes[name] / 1e6:.3f} | "
            f"{to_stocks_size:.4f} | {difference:.1e} |"
        )
        figures[name] = {
            "ms": ms,
            "to_live": to_live[name],
            "to_stock": to_stock[name],
            "bytes": sizes[name],
            "logp_difference": difference,
        }
    host = {"stock": ways["stock"].targets_LTK.nbytes, "ours": table.expert_ids_LTK.nbytes}
    print(f"\nHost bytes of a step's ids: stock {host['stock']}, ours {host['ours']}")
    finish("step", arguments, figures | {"host_bytes": host})
    RouterReplay.clear_global_router_replay_instances()
    parallel.destroy()


if __name__ == "__main__":
    main()
