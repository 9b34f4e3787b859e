"""What recording (R2) copies to the host: one copy for each microbatch, or one for each layer.

    python -m tools.bench.recording [--tokens 8704] [--layers 48] [--microbatches 16]

    per microbatch    the pass's own buffer [L, T, K] in the compact dtype, as recording does
    per layer         a pinned buffer for each layer, which costs an allocation each
    int64             as Megatron holds ids: eight bytes for each

Time is that of the host until everything has arrived.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from routing_replay.megatron.passes import LiveRecord
from routing_replay.megatron.transfers import compact_dtype, to_host

from .paired import device, finish, parse, parser, ratios, spread, take_turns, timed


def per_microbatch(ids_LTK: torch.Tensor, num_experts: int) -> list[torch.Tensor]:
    """Record as a pass does."""
    record = LiveRecord(tuple(range(len(ids_LTK))), num_experts)
    for layer, ids_TK in enumerate(ids_LTK):
        record.put(layer, ids_TK)
    record.move_to_host()
    return list(record.by_layer().values())


def per_layer(ids_LTK: torch.Tensor, num_experts: int) -> list[torch.Tensor]:
    """Copy each layer's ids, compact, as soon as they are known."""
    return [to_host(ids_TK.to(compact_dtype(num_experts))) for ids_TK in ids_LTK]


def int64(ids_LTK: torch.Tensor, num_experts: int) -> list[torch.Tensor]:
    """Copy each layer's ids as they are."""
    return [to_host(ids_TK) for ids_TK in ids_LTK]


def main(argv: Sequence[str] | None = None) -> None:
    """Time every way over some microbatches, in turns."""
    made = parser(__doc__)
    for name, default in (("tokens", 8704), ("layers", 48), ("microbatches", 16), ("rounds", 9)):
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--experts", type=int, default=128)
    made.add_argument("--top-k", type=int, default=8)
    quick = {"tokens": 16, "layers": 2, "microbatches": 2, "rounds": 1}
    arguments = parse(made, argv, quick)
    shape_LTK = (arguments.layers, arguments.tokens, arguments.top_k)
    ids_LTK = torch.randint(arguments.experts, shape_LTK, device=device())
    ways = {"per microbatch": per_microbatch, "per layer": per_layer, "int64": int64}
    times = take_turns(
        {name: timed(step(way, ids_LTK, arguments)) for name, way in ways.items()},
        arguments.rounds,
    )
    to_ours, figures = ratios(times, "per microbatch"), {}
    print("| way | ms per microbatch | / per microbatch | MB on the host | host buffers |")
    print("| --- | --- | --- | --- | --- |")
    for name, way in ways.items():
        copies = way(ids_LTK, arguments.experts)
        size = sum(values.nbytes for values in copies)
        buffers = len({values.untyped_storage().data_ptr() for values in copies})
        ms = spread([1e3 * value / arguments.microbatches for value in times[name]])
        figures[name] = {"ms": ms, "to_ours": to_ours[name], "bytes": size, "buffers": buffers}
        print(f"| {name} | {ms} | {to_ours[name]} | {size / 1e6:.2f} | {buffers} |")
    finish("recording", arguments, figures)


def step(
    way: Callable[[torch.Tensor, int], list[torch.Tensor]],
    ids_LTK: torch.Tensor,
    arguments: argparse.Namespace,
) -> Callable[[], object]:
    """Return a step: all microbatches' copies are kept, as a recording keeps them."""
    return lambda: [way(ids_LTK, arguments.experts) for _ in range(arguments.microbatches)]


if __name__ == "__main__":
    main()
