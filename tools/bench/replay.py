"""Cost of replay at the router and at the whole MoE layer, against live routing and Megatron's own.

    python -m tools.bench.replay [--tokens 4096] [--layers 4] [--rounds 9]

Four ways to select experts take turns, so that a machine's mood meets all of them alike:

    live        stock routing
    stock       megatron-core's own RouterReplay, its int64 targets set for every microbatch
    ours        routing_replay with its receipt
    agreement   ours, comparing live with replayed routes on a sample of tokens as well

Printed are medians in milliseconds and the median of the ratios to `live` and to `stock`, round by
round, with their quartiles. One step of one microbatch is timed as a trainer runs it: the scope is
opened, the rows of all layers are gathered from the step's table, checked, moved to the device and
replayed (and recomputed before a backward), and the receipt is checked. A scope and a microbatch
cost something once, however many layers there are: with a few layers instead of a model's dozens
our share is rather over- than understated.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from recipes.model import parallel
from recipes.model.model import build_model, transformer_config
from routing_replay.config import ReplayConfig
from routing_replay.megatron import attach
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

# isort: split
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

WAYS = ("live", "stock", "ours", "agreement")
MODELS = {
    # name: experts, top-k, fields of Megatron's configuration
    "Qwen3-30B-A3B": (128, 8, {}),
    "DeepSeek-V3": (
        256,
        8,
        {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_num_groups": 8,
            "moe_router_group_topk": 4,
            "moe_router_topk_scaling_factor": 2.5,
        },
    ),
}


class Chunk(torch.nn.Module):
    """Some MoE layers, or their routers alone, as a model chunk; recomputed in backward if asked.

    Each layer gets the same input: random experts one after another would blow up or die out.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], is_router_only: bool):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
        self.is_router_only, self.recompute = is_router_only, False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        total = 0.0
        for layer in self.layers:
            module = layer.router if self.is_router_only else layer
            if self.recompute:
                output = tensor_parallel.checkpoint(_first_output(module), False, hidden)
            else:
                output = module(hidden)[0]
            total = total + output.float().square().mean()
        return total


def _first_output(module: torch.nn.Module):
    return lambda hidden: module(hidden)[0]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model and what is timed of it."""

    name: str
    experts: int
    top_k: int
    fields: dict
    layers: int
    tokens: int
    hidden: int
    expert_width: int
    is_router_only: bool


def build(setting: Setting, has_stock_replay: bool) -> Chunk:
    """The MoE layers of a model; the same weights for every way."""
    from transformers import Qwen3MoeConfig

    hf = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=setting.hidden,
        intermediate_size=64,
        moe_intermediate_size=setting.expert_width,
        num_hidden_layers=setting.layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=setting.experts,
        num_experts_per_tok=setting.top_k,
        norm_topk_prob=True,
    )
    layout = parallel.ParallelLayout()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = transformer_config(
        hf, layout, dtype=dtype, moe_enable_routing_replay=has_stock_replay, **setting.fields
    )
    torch.manual_seed(1)
    model = build_model(config, layout)[0]
    return Chunk([layer.mlp for layer in model.decoder.layers], setting.is_router_only)


def random_routes(setting: Setting) -> RouteTable:
    layers = tuple(range(setting.layers))
    model = MoEShape(layers=layers, num_experts=setting.experts, top_k=setting.top_k)
    table = RouteTable.empty(model, [setting.tokens], source="rollout")
    scores = np.random.default_rng(1).random((setting.layers, setting.tokens, setting.experts))
    table.expert_ids_LTK[:] = np.argsort(scores, axis=-1)[..., : setting.top_k]
    table.covered_T[:] = True
    return table


class Way:
    """One of WAYS on its own copy of the layer."""

    def __init__(self, name: str, setting: Setting, table: RouteTable):
        self.name, self.setting, self.table = name, setting, table
        self.chunk = build(setting, has_stock_replay=name == "stock")
        self.rows_T = torch.arange(setting.tokens)
        every = int(name == "agreement")
        config = ReplayConfig(mode="R3", agreement_every=every)
        self.replay = attach(self.chunk, config) if name in ("ours", "agreement") else None
        if name == "stock":
            # Its users hold int64 targets, which its gather needs.
            self.targets_LTK = torch.from_numpy(table.expert_ids_LTK.astype(np.int64))
            self.stock = [layer.router.router_replay for layer in self.chunk.layers]

    def step(self, hidden: torch.Tensor, backward: bool) -> None:
        self.chunk.recompute = backward
        around = self.replay.replaying(self.table) if self.replay else contextlib.nullcontext()
        with around, torch.set_grad_enabled(backward):
            output = self._forward(hidden)
            if backward:
                self._action(RouterReplayAction.REPLAY_BACKWARD)
                output.backward()
        if self.name == "stock":
            for replay in self.stock:
                replay.clear_indices()

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.replay:
            with self.replay.microbatch(self.rows_T):
                return self.chunk(hidden)
        if self.name == "stock":
            for replay, targets_TK in zip(self.stock, self.targets_LTK, strict=True):
                rows_TK = targets_TK[self.rows_T].to(hidden.device, non_blocking=True)
                replay.set_target_indices(rows_TK)
            self._action(RouterReplayAction.REPLAY_FORWARD)
        return self.chunk(hidden)

    def _action(self, action: RouterReplayAction) -> None:
        if self.name == "stock":
            for replay in self.stock:
                replay.set_router_replay_action(action)


def measure(setting: Setting, backward: bool, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every way in every round."""
    table = random_routes(setting)
    ways = [Way(name, setting, table) for name in WAYS]
    device = next(ways[0].chunk.parameters()).device
    dtype = next(ways[0].chunk.parameters()).dtype
    hidden = torch.randn(setting.tokens, 1, setting.hidden, device=device).to(dtype)
    hidden.requires_grad_(backward)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):  # the first round warms up
        # Who follows whom matters to the allocator and the caches: every other round backwards.
        for way in ways if number % 2 else reversed(ways):
            torch.cuda.synchronize()
            start = time.perf_counter()
            way.step(hidden, backward)
            torch.cuda.synchronize()
            if number:
                times[way.name].append(1e3 * (time.perf_counter() - start))
    RouterReplay.clear_global_router_replay_instances()
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> str:
    quotients = np.array(times[name]) / np.array(times[base])
    low, middle, high = np.quantile(quotients, [0.25, 0.5, 0.75])
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def print_table(title: str, times: dict[str, list[float]]) -> None:
    print(f"\n{title}\n| way | ms | / live | / stock |\n| --- | --- | --- | --- |")
    for name in WAYS:
        median = f"{np.median(times[name]):.2f}"
        print(
            f"| {name} | {median} | {ratio(times, name, 'live')} | {ratio(times, name, 'stock')} |"
        )


def print_bytes(setting: Setting) -> None:
    """Bytes per token and layer that each way holds, from the tensors' sizes."""
    id_bytes, top_k = 1 if setting.experts <= 256 else 2, setting.top_k
    print(
        f"\n{setting.name}: bytes per token and layer\n| way | device | host |\n| --- | --- | --- |"
    )
    print("| live | 0 | 0 |")
    print(f"| stock | {8 * top_k} until its backward, int64 | {8 * top_k} |")
    print(f"| ours | {id_bytes * top_k} until its backward | {id_bytes * top_k}, one per node |")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a microbatch")
    parser.add_argument("--layers", type=int, default=4, help="MoE layers of the chunk")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size")
    parser.add_argument("--expert-width", type=int, default=64, help="width of an expert")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # one thread is steadier than a shared machine's two
    parallel.initialize(parallel.ParallelLayout(), seed=1)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, 1 thread"
    print(f"{where}; {arguments.layers} layers, {arguments.tokens} tokens, hidden ", end="")
    print(f"{arguments.hidden}, expert width {arguments.expert_width}; ", end="")
    print(f"median of {arguments.rounds} rounds [quartiles]")
    for name, (experts, top_k, fields) in MODELS.items():
        for is_router_only in (True, False):
            setting = Setting(
                name=name,
                experts=experts,
                top_k=top_k,
                fields=fields,
                layers=arguments.layers,
                tokens=arguments.tokens,
                hidden=arguments.hidden,
                expert_width=arguments.expert_width,
                is_router_only=is_router_only,
            )
            part = "routers" if is_router_only else "whole MoE layers"
            for backward in (False, True):
                what = "forward + backward with recomputation" if backward else "forward"
                times = measure(setting, backward, arguments.rounds)
                print_table(f"{name} ({experts} experts, top-{top_k}), {part}, {what}", times)
        print_bytes(setting)
    parallel.destroy()


if __name__ == "__main__":
    main()
