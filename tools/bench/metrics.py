"""What the default telemetry costs a training step: step with it / step without it, in one run.

    python tools/bench/metrics.py [--tokens 2048] [--steps 12]

Both steps replay (R3) and differ only in the telemetry: live against replayed routes on the
default sample of tokens, gates included, reduced and written as JSON lines. Steps of both kinds
alternate, and so does which comes first, so that a slow moment of the machine and a warm cache
favour neither; the ratio is the median over the pairs. On a CPU the process's own time is taken:
what other processes do to the clock is not ours.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time

import numpy as np
import torch

from routing_replay.config import ReplayConfig
from routing_replay.metrics.sinks import JsonLinesSink
from routing_replay.metrics.typed import to_floats
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

from recipes.model import parallel  # isort: skip
from recipes.model.model import build_model, transformer_config
from routing_replay.megatron import attach

VOCAB = 4096


def make_model(parsed):
    """A Qwen3-MoE of the given size with random weights."""
    from transformers import Qwen3MoeConfig

    hf_config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=parsed.hidden,
        intermediate_size=2 * parsed.hidden,
        moe_intermediate_size=parsed.hidden // 2,
        num_hidden_layers=parsed.layers,
        num_attention_heads=parsed.hidden // 64,
        num_key_value_heads=max(1, parsed.hidden // 256),
        head_dim=64,
        num_experts=parsed.experts,
        num_experts_per_tok=parsed.top_k,
        norm_topk_prob=True,
        max_position_embeddings=parsed.tokens,
        tie_word_embeddings=False,
    )
    layout = parallel.ParallelLayout()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = transformer_config(hf_config, layout, dtype=dtype)
    return build_model(config, layout)[0].to("cuda" if torch.cuda.is_available() else "cpu")


def make_table(parsed) -> RouteTable:
    """Random routes with gates for one sequence."""
    generator = np.random.default_rng(0)
    shape = (parsed.tokens, parsed.layers, parsed.experts)
    ids_TLK = generator.random(shape, np.float32).argsort(-1)[..., : parsed.top_k]
    routes = Routes(
        expert_ids_TLK=ids_TLK.astype(np.uint8),
        gate_probs_TLK=np.full(ids_TLK.shape, 1 / parsed.experts, np.float16),
        layers=range(parsed.layers),
        num_experts=parsed.experts,
    )
    return RouteTable.from_routes([routes])


clock = time.perf_counter if torch.cuda.is_available() else time.process_time


class Step:
    """A training step of several microbatches: forward, backward, with or without telemetry."""

    def __init__(self, model, parsed, table: RouteTable, has_telemetry: bool, folder: str):
        every = ReplayConfig().agreement_every if has_telemetry else 0
        self.config = dataclasses.replace(ReplayConfig(mode="R3"), agreement_every=every)
        self.model, self.table, self.parsed = model, table, parsed
        self.sink = JsonLinesSink(folder) if has_telemetry else None
        device = next(model.parameters()).device
        self.ids_BT = torch.randint(VOCAB, (1, parsed.tokens), device=device)
        self.positions_BT = torch.arange(parsed.tokens, device=device)[None]
        self.rows_BT = torch.arange(parsed.tokens)[None]

    def __call__(self) -> float:
        """Seconds of one step."""
        with attach(self.model, self.config) as replay:
            started = clock()
            with replay.replaying(self.table):
                for _ in range(self.parsed.microbatches):
                    with replay.microbatch(self.rows_BT):
                        loss = self.model(
                            self.ids_BT, self.positions_BT, None, labels=self.ids_BT
                        ).mean()
                    loss.backward()
            if self.sink is not None:
                self.sink.write(0, to_floats(replay.metrics()))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = clock() - started
        self.model.zero_grad()
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of a microbatch")
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="pairs of steps")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parsed = parser.parse_args()
    parallel.initialize(parallel.ParallelLayout(), seed=1)
    model, table = make_model(parsed), make_table(parsed)
    with tempfile.TemporaryDirectory() as folder:
        without, default = (Step(model, parsed, table, kind, folder) for kind in (False, True))
        without(), default()  # the first steps pay for the allocator and the compiler
        pairs = []
        for number in range(parsed.steps):
            order = (without, default) if number % 2 == 0 else (default, without)
            seconds = {step: step() for step in order}
            pairs.append((seconds[without], seconds[default]))
    ratios = sorted(b / a for a, b in pairs)
    seconds = [statistics.median(column) for column in zip(*pairs, strict=True)]
    print(
        f"{parsed.layers} layers, {parsed.experts} experts, top-{parsed.top_k}, hidden "
        f"{parsed.hidden}, {parsed.microbatches} x {parsed.tokens} tokens"
    )
    print(f"without telemetry {seconds[0]:.3f} s, with {seconds[1]:.3f} s (medians)")
    print(f"ratio {statistics.median(ratios):.4f} (median of {len(ratios)} pairs, ", end="")
    print(f"quartiles {ratios[len(ratios) // 4]:.4f} to {ratios[3 * len(ratios) // 4]:.4f})")
    parallel.destroy()


if __name__ == "__main__":
    main()
