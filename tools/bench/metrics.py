"""What the default metrics cost a training step: a step with them / a step without, in one run.

    python -m tools.bench.metrics [--tokens 2048] [--rounds 12]

Both steps replay (R3) and differ only in the metrics: live against replayed routes on the default
sample of tokens, gates included, reduced and written as JSON lines.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from recipes.model import parallel
from recipes.model.model import build_model, transformer_config
from recipes.model.tiny import tiny_config
from routing_replay.config import ReplayConfig
from routing_replay.megatron import attach
from routing_replay.metrics.sinks import JsonLinesSink
from routing_replay.metrics.typed import to_floats
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

from .paired import finish, parse, parser, ratios, spread, take_turns, timed

VOCAB = 4096


def make_model(parsed: argparse.Namespace) -> torch.nn.Module:
    """Return a Qwen3-MoE of the given size with random weights."""
    hf_config = tiny_config(
        vocab=VOCAB,
        hidden=parsed.hidden,
        dense_size=2 * parsed.hidden,
        expert_size=parsed.hidden // 2,
        layers=parsed.layers,
        heads=parsed.hidden // 64,
        groups=max(1, parsed.hidden // 256),
        experts=parsed.experts,
        top_k=parsed.top_k,
        max_position_embeddings=parsed.tokens,
    )
    layout = parallel.ParallelLayout()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = transformer_config(hf_config, layout, dtype=dtype, spec=parsed.spec)
    return build_model(config, layout)[0]


def make_table(parsed: argparse.Namespace) -> RouteTable:
    """Return random routes with gates for one sequence."""
    generator = np.random.default_rng(0)
    shape = (parsed.tokens, parsed.layers, parsed.experts)
    ids_TLK = generator.random(shape, np.float32).argsort(-1)[..., : parsed.top_k]
    routes = Routes(
        expert_ids_TLK=ids_TLK.astype(np.uint8),
        gate_probs_TLK=np.full(ids_TLK.shape, 1 / parsed.experts, np.float16),
        layers=tuple(range(parsed.layers)),
        num_experts=parsed.experts,
    )
    return RouteTable.from_routes([routes])


class Step:
    """A training step of several microbatches: forward, backward, with or without metrics."""

    def __init__(
        self,
        model: torch.nn.Module,
        parsed: argparse.Namespace,
        table: RouteTable,
        has_metrics: bool,
        folder: str,
    ):
        every = ReplayConfig().agreement_every if has_metrics else 0
        self.config = replace(ReplayConfig(mode="R3"), agreement_every=every)
        self.model, self.table, self.parsed = model, table, parsed
        self.sink = JsonLinesSink(folder) if has_metrics else None
        device = next(model.parameters()).device
        self.ids_BT = torch.randint(VOCAB, (1, parsed.tokens), device=device)
        self.positions_BT = torch.arange(parsed.tokens, device=device)[None]
        self.rows_BT = torch.arange(parsed.tokens)[None]

    def __call__(self) -> float:
        """Return the seconds of one step."""
        with attach(self.model, self.config) as self.replay:
            seconds = timed(self._run)()
        self.model.zero_grad()
        return seconds

    def _run(self) -> None:
        with self.replay.replaying(self.table):
            for _ in range(self.parsed.microbatches):
                with self.replay.microbatch(self.rows_BT):
                    loss = self.model(self.ids_BT, self.positions_BT, None, labels=self.ids_BT)
                loss.mean().backward()
        if self.sink is not None:
            self.sink.write(0, to_floats(self.replay.metrics()))


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, default=2048, help="of a microbatch")
    made.add_argument("--microbatches", type=int, default=2)
    made.add_argument("--rounds", type=int, default=12, help="pairs of steps")
    made.add_argument("--hidden", type=int, default=512)
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--experts", type=int, default=32)
    made.add_argument("--top-k", type=int, default=4)
    made.add_argument("--spec", choices=("auto", "te", "local"), default="local", help="layer spec")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Time pairs of steps and print their ratio."""
    quick = {"tokens": 32, "microbatches": 1, "rounds": 1, "hidden": 64, "layers": 1, "experts": 8}
    parsed = parse(make_parser(), argv, quick)
    parallel.initialize(parallel.ParallelLayout(), seed=1)
    model, table = make_model(parsed), make_table(parsed)
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            name: Step(model, parsed, table, name == "with", folder) for name in ("without", "with")
        }
        times = take_turns(steps, parsed.rounds)
    seconds = {name: spread(values) for name, values in times.items()}
    ratio = ratios(times, "without")["with"]
    print(f"{parsed.layers} layers, {parsed.experts} experts, top-{parsed.top_k}, ", end="")
    print(f"hidden {parsed.hidden}, {parsed.microbatches} x {parsed.tokens} tokens")
    for name, value in seconds.items():
        print(f"{name} metrics: {value} s")
    print(f"ratio {ratio} (median of {parsed.rounds} pairs [quartiles])")
    finish("metrics", parsed, {"seconds": seconds, "ratio": ratio})
    parallel.destroy()


if __name__ == "__main__":
    main()
