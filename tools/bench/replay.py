"""Cost of replay at the router and at the whole MoE layer, against live routing and Megatron's own.

    python -m tools.bench.replay [--tokens 4096] [--layers 4] [--rounds 9]

Four ways to select experts take turns, so that noise affects all of them alike:

    live        stock routing
    stock       megatron-core's own RouterReplay, its int64 targets set for every microbatch
    ours        routing_replay with its receipt
    agreement   ours, comparing live with replayed routes on a sample of tokens as well

Printed are medians in milliseconds and the median of the ratios to `live` and to `stock`, round by
round, with their quartiles. One step of one microbatch is timed as a trainer runs it: the scope is
opened, the rows of all layers are gathered from the step's table, checked, moved to the device and
replayed (and recomputed before a backward), and the receipt is checked. A scope and a microbatch
have a fixed cost, so few layers instead of a model's dozens overstate our share.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recipes.model import parallel
from recipes.model.model import Spec, build_model, transformer_config
from recipes.model.tiny import tiny_config
from routing_replay.config import ReplayConfig
from routing_replay.megatron import attach
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

from .paired import Times, finish, parse, parser, ratios, spread, take_turns, timed

# isort: split
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

WAYS = ("live", "stock", "ours", "agreement")
MODELS: dict[str, tuple[int, int, dict[str, Any]]] = {
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
    """MoE layers, or their routers alone, as a model chunk; recomputed in backward if asked.

    Each layer gets the same input: through random experts in sequence it would explode or vanish.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], is_router_only: bool):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
        self.is_router_only, self.recompute = is_router_only, False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        total = hidden.new_zeros(())
        for layer in self.layers:
            module: Any = layer.router if self.is_router_only else layer
            if self.recompute:
                output = tensor_parallel.checkpoint(_first_output(module), False, hidden)
            else:
                output = module(hidden)[0]
            total = total + output.float().square().mean()
        return total


def _first_output(module: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda hidden: module(hidden)[0]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model and what is timed of it."""

    name: str
    experts: int
    top_k: int
    fields: dict[str, Any]
    layers: int
    tokens: int
    hidden: int
    expert_width: int
    is_router_only: bool
    spec: Spec


def build(setting: Setting, has_stock_replay: bool) -> Chunk:
    """Return the MoE layers of a model; the same weights for every way."""
    hf = tiny_config(
        layers=setting.layers,
        hidden=setting.hidden,
        experts=setting.experts,
        top_k=setting.top_k,
        expert_size=setting.expert_width,
        vocab=64,
    )
    layout = parallel.ParallelLayout()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = transformer_config(
        hf,
        layout,
        dtype=dtype,
        spec=setting.spec,
        moe_enable_routing_replay=has_stock_replay,
        **setting.fields,
    )
    torch.manual_seed(1)
    model = build_model(config, layout)[0]
    return Chunk([layer.mlp for layer in model.decoder.layers], setting.is_router_only)


def random_routes(setting: Setting) -> RouteTable:
    """Return a table of distinct random experts."""
    layers = tuple(range(setting.layers))
    model = MoEShape(layers=layers, num_experts=setting.experts, top_k=setting.top_k)
    table = RouteTable.empty(model, [setting.tokens + 1], source="rollout")
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
            routers: list[Any] = [layer.router for layer in self.chunk.layers]
            self.stock = [router.router_replay for router in routers]

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


def measure(setting: Setting, backward: bool, rounds: int) -> Times:
    """Return the seconds of every way in every round."""
    table = random_routes(setting)
    ways = {name: Way(name, setting, table) for name in WAYS}
    weight = next(ways["live"].chunk.parameters())
    hidden = torch.randn(setting.tokens, 1, setting.hidden, device=weight.device).to(weight.dtype)
    hidden.requires_grad_(backward)

    def step_of(way: Way) -> Callable[[], float]:
        return timed(lambda: way.step(hidden, backward))

    times = take_turns({name: step_of(way) for name, way in ways.items()}, rounds)
    RouterReplay.clear_global_router_replay_instances()
    return times


def print_table(title: str, times: Times) -> dict[str, Any]:
    """Print the medians and ratios of one setting, and return them."""
    to_live, to_stock = ratios(times, "live"), ratios(times, "stock")
    print(f"\n{title}\n| way | ms | / live | / stock |\n| --- | --- | --- | --- |")
    for name in WAYS:
        milliseconds = 1e3 * spread(times[name]).median
        print(f"| {name} | {milliseconds:.2f} | {to_live[name]} | {to_stock[name]} |")
    seconds = {name: spread(values) for name, values in times.items()}
    return {"seconds": seconds, "to_live": to_live, "to_stock": to_stock}


def print_bytes(setting: Setting) -> None:
    """Bytes per token and layer that each way holds, from the tensors' sizes."""
    id_bytes, top_k = 1 if setting.experts <= 256 else 2, setting.top_k
    print(
        f"\n{setting.name}: bytes per token and layer\n| way | device | host |\n| --- | --- | --- |"
    )
    print("| live | 0 | 0 |")
    print(f"| stock | {8 * top_k} until its backward, int64 | {8 * top_k} |")
    print(f"| ours | {id_bytes * top_k} until its backward | {id_bytes * top_k}, one per node |")


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, default=4096, help="tokens of a microbatch")
    made.add_argument("--layers", type=int, default=4, help="MoE layers of the chunk")
    made.add_argument("--rounds", type=int, default=9, help="timed rounds")
    made.add_argument("--hidden", type=int, default=512, help="hidden size")
    made.add_argument("--expert-width", type=int, default=64, help="width of an expert")
    made.add_argument("--spec", choices=("auto", "te", "local"), default="local", help="layer spec")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Time every model, part and direction, and print one table for each."""
    quick = {"tokens": 16, "layers": 1, "rounds": 1, "hidden": 64, "expert_width": 32}
    arguments = parse(make_parser(), argv, quick)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # one thread is steadier than a shared machine's two
    parallel.initialize(parallel.ParallelLayout(), seed=1)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, 1 thread"
    print(f"{device}; {arguments.layers} layers, {arguments.tokens} tokens, hidden ", end="")
    print(f"{arguments.hidden}, expert width {arguments.expert_width}; ", end="")
    print(f"median of {arguments.rounds} rounds [quartiles]")
    figures = {}
    for setting in settings(arguments):
        part = "routers" if setting.is_router_only else "whole MoE layers"
        for backward in (False, True):
            direction = "forward + backward with recomputation" if backward else "forward"
            title = f"{setting.name} ({setting.experts} experts), {part}, {direction}"
            times = measure(setting, backward, arguments.rounds)
            figures[title] = print_table(title, times)
        if not setting.is_router_only:
            print_bytes(setting)
    finish("replay", arguments, figures)
    parallel.destroy()


def settings(arguments: argparse.Namespace) -> list[Setting]:
    """Return routers alone and whole layers of every model."""
    return [
        Setting(
            name=name,
            experts=experts,
            top_k=top_k,
            fields=fields,
            layers=arguments.layers,
            tokens=arguments.tokens,
            hidden=arguments.hidden,
            expert_width=arguments.expert_width,
            is_router_only=is_router_only,
            spec=arguments.spec,
        )
        for name, (experts, top_k, fields) in MODELS.items()
        for is_router_only in (True, False)
    ]


if __name__ == "__main__":
    main()
