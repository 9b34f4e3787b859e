"""The replay router against Megatron's routers: microseconds and GB/s.

    python -m tools.bench.router_kernel [--tokens 16384] [--dtype float32|bfloat16] [--json FILE]

Without a GPU it checks the results in Triton's interpreter, and times nothing. Ways, forward alone
and with backward, on tensors that are not in the cache:

    kernel            the replay router, every token replayed
    kernel, 5% live   one token in twenty without a route
    kernel, all live  every token live: what the exact top-k in the kernel costs
    torch, replayed   Megatron's function with our selection (what runs without the kernel)
    torch, live       Megatron's function, stock
    fused, live       Transformer Engine's fused router, where it is installed

The limit is what memory allows, each tensor counted once at the rate of a plain copy: logits,
weights, map and ids of the forward; logits, both gradients and ids of the backward. Others report,
at 16,384 tokens, 128 experts and top-8 on an H100: 12.4 microseconds for a fused top-k router and
137 for torch's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tools import gpu_timing

from .paired import device, machine, parse, parser, run_kernel, spread

Call = Callable[[], torch.Tensor]
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "pre_softmax": {"use_pre_softmax": True},
    "sigmoid": {"score_function": "sigmoid", "scaling_factor": 2.5},
    "sqrtsoftplus": {"score_function": "sqrtsoftplus", "scaling_factor": 2.5},
}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One router call's tensors."""

    logits_TE: torch.Tensor
    ids_TK: torch.Tensor
    grad_TE: torch.Tensor
    live_T: torch.Tensor
    all_T: torch.Tensor

    @classmethod
    def random(cls, arguments: argparse.Namespace, dtype: torch.dtype) -> Batch:
        shape = (arguments.tokens, arguments.experts)
        ids_TK = torch.rand(shape, device=device()).argsort(1)[:, : arguments.top_k]
        is_small = arguments.experts <= 256
        return cls(
            logits_TE=torch.randn(shape, device=device()).to(dtype).requires_grad_(),
            ids_TK=ids_TK.to(torch.uint8 if is_small else torch.int16).contiguous(),
            grad_TE=torch.randn(shape, device=device()).to(dtype),
            live_T=torch.arange(arguments.tokens, device=device()) % 20 == 19,
            all_T=torch.ones(arguments.tokens, dtype=torch.bool, device=device()),
        )

    def bytes_of(self, has_backward: bool) -> int:
        """Bytes that any router must move."""
        values, ids = self.logits_TE.nbytes, self.ids_TK.nbytes
        forward = 2 * values + self.logits_TE.numel() + ids
        return forward + (3 * values + ids if has_backward else 0)


Route = Callable[[Batch], torch.Tensor]


def ways(rule_fields: dict[str, Any], top_k: int) -> dict[str, Route]:
    """Each way to route a batch; returns the weights."""
    from megatron.core.transformer.moe.moe_utils import HAVE_TE, topk_routing_with_score_function

    from routing_replay.kernels.router import RoutingRule, replay_routing
    from routing_replay.megatron.selection import select

    rule = RoutingRule(top_k=top_k, **rule_fields)

    class Seam:
        def __init__(self, ids_TK: torch.Tensor):
            self.ids_TK = ids_TK.long()

        def get_replay_topk(self, scores_TE: torch.Tensor, *arguments: Any) -> Any:
            return select(scores_TE, self.ids_TK, keep_slots=True)

    def kernel(batch: Batch, is_live_T: torch.Tensor | None = None) -> torch.Tensor:
        return replay_routing(batch.logits_TE, batch.ids_TK, rule, is_live_T=is_live_T)[0]

    def stock(batch: Batch, **options: Any) -> torch.Tensor:
        routed = topk_routing_with_score_function(batch.logits_TE, top_k, **rule_fields, **options)
        weights_TE: torch.Tensor = routed[0]
        return weights_TE

    routes: dict[str, Route] = {
        "kernel": kernel,
        "kernel, 5% live": lambda batch: kernel(batch, batch.live_T),
        "kernel, all live": lambda batch: kernel(batch, batch.all_T),
        "torch, replayed": lambda batch: stock(batch, router_replay=Seam(batch.ids_TK)),
        "torch, live": stock,
    }
    if HAVE_TE:
        routes["fused, live"] = lambda batch: stock(batch, fused=True)
    return routes


def call_of(route: Route, batch: Batch, has_backward: bool) -> Call:
    def forward() -> torch.Tensor:
        with torch.no_grad():
            return route(batch)

    def both() -> torch.Tensor:
        return torch.autograd.grad(route(batch), batch.logits_TE, batch.grad_TE)[0]

    return both if has_backward else forward


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time every way of each router, forward alone and with backward."""
    bandwidth = gpu_timing.copy_bandwidth(device())
    print(f"{machine()['device']}: a copy moves {bandwidth / 1e9:.0f} GB/s")
    dtype = getattr(torch, arguments.dtype)
    first = Batch.random(arguments, dtype)
    count = gpu_timing.copies_beyond_cache(first.bytes_of(False))
    batches = [first, *(Batch.random(arguments, dtype) for _ in range(count - 1))]
    rows = []
    print("| router | way | direction | us | GB/s | limit, us |")
    print("| --- | --- | --- | --- | --- | --- |")
    for router, fields in ROUTERS.items():
        for has_backward, direction in ((False, "forward"), (True, "forward + backward")):
            size, calls = first.bytes_of(has_backward), {}
            for way, route in ways(fields, arguments.top_k).items():
                calls[way] = [call_of(route, batch, has_backward) for batch in batches]
            for way, seconds in gpu_timing.seconds_per_call(calls).items():
                us, limit_us = spread([1e6 * value for value in seconds]), 1e6 * size / bandwidth
                row = {"router": router, "way": way, "direction": direction}
                rows.append(row | {"us": us, "limit_us": limit_us})
                text = f"{us} | {size / us.median / 1e3:.0f} | {limit_us:.2f} |"
                print(f"| {router} | {way} | {direction} | {text}", flush=True)
    return {"copy_gb_per_s": bandwidth / 1e9, "rows": rows}


def check(arguments: argparse.Namespace) -> dict[str, float]:
    """Compare the kernel with torch on a few tokens; ends the process if they differ.

    Raises:
        SystemExit: Weights or gradients are farther apart than float32 rounding.
    """
    distances = {}
    few = argparse.Namespace(**vars(arguments) | {"tokens": 64})
    for router, fields in ROUTERS.items():
        batch = Batch.random(few, torch.float32)
        routes = ways(fields, arguments.top_k)
        for ours, theirs in (("kernel", "torch, replayed"), ("kernel, all live", "torch, live")):
            one, other = routes[ours], routes[theirs]
            apart = (one(batch) - other(batch)).abs().max().item()
            gradients = [call_of(route, batch, True)() for route in (one, other)]
            grads_apart = (gradients[0] - gradients[1]).abs().max().item()
            print(f"{router}, {ours}: weights differ by {apart:.1e}, gradients {grads_apart:.1e}")
            if not max(apart, grads_apart) < 1e-5:
                sys.exit(f"{router}: {ours} and {theirs} differ")
            distances[f"{router}, {ours}"] = max(apart, grads_apart)
    return distances


def main(argv: Sequence[str] | None = None) -> None:
    """Time the kernel, or check it where there is no GPU."""
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, default=16384)
    made.add_argument("--experts", type=int, default=128)
    made.add_argument("--top-k", type=int, default=8)
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    run_kernel("router_kernel", parse(made, argv, {}), measure, check)


if __name__ == "__main__":
    main()
