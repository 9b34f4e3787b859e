"""The local spec's attention against a kernel that knows that the mask is causal.

    python -m tools.bench.attention [--tokens 17408] [--heads 32] [--groups 4] [--head 128]

`layer_spec: local` writes the causal mask out, [T, T], and repeats keys and values for each head
of a group (`recipes.model.local_modules.AllGatherAttention`). Transformer Engine's attention does
neither; torch's own with `is_causal` stands for it here. One layer, one sequence, forward and
backward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from recipes.model import parallel
from recipes.model.local_modules import AllGatherAttention
from recipes.model.model import transformer_config
from recipes.model.tiny import tiny_config

from .paired import device, finish, parse, parser, ratios, spread, take_turns, timed

# isort: split
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def local_attention(arguments: argparse.Namespace) -> AllGatherAttention:
    """Return the module; Megatron is initialized."""
    hf = tiny_config(
        layers=1, heads=arguments.heads, groups=arguments.groups, head_dim=arguments.head
    )
    return AllGatherAttention(
        transformer_config(hf, parallel.ParallelLayout(), spec="local"),
        1,
        AttnMaskType.causal,
        "self",
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend with `is_causal`, shapes as Megatron's: [s, b, heads, d] -> [s, b, heads * d]."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    output = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    return output.permute(2, 0, 1, 3).flatten(2)


def both_passes(attend: Callable[..., torch.Tensor], inputs: Tensors) -> None:
    """Run forward and backward."""
    torch.autograd.grad(attend(*inputs).sum(), inputs)


def main(argv: Sequence[str] | None = None) -> None:
    """Time both in turns, after a comparison of their results."""
    made = parser(__doc__)
    tokens = 17408 if torch.cuda.is_available() else 2048
    sizes = {"tokens": tokens, "heads": 32, "groups": 4, "head": 128, "rounds": 9}
    for name, default in sizes.items():
        made.add_argument(f"--{name}", type=int, default=default)
    quick = {"tokens": 64, "heads": 4, "groups": 2, "head": 16, "rounds": 1}
    arguments = parse(made, argv, quick)
    parallel.initialize(parallel.ParallelLayout(), seed=1)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    module, inputs = local_attention(arguments), _inputs(arguments, dtype)

    def masked(*inputs: torch.Tensor) -> torch.Tensor:
        return module(*inputs, None)

    with torch.no_grad():
        difference = (masked(*inputs) - causal(*inputs)).abs().max().item()
    variants = {
        "local": timed(lambda: both_passes(masked, inputs)),
        "is_causal": timed(lambda: both_passes(causal, inputs)),
    }
    times = take_turns(variants, arguments.rounds)
    to_causal = ratios(times, "is_causal")
    figures = {
        name: {"ms": spread([1e3 * t for t in times[name]]), "to_is_causal": to_causal[name]}
        for name in variants
    }
    print(f"Largest difference of the results: {difference:.1e}")
    print("| attention | ms | / is_causal |\n| --- | --- | --- |")
    for name, figure in figures.items():
        print(f"| {name} | {figure['ms']} | {figure['to_is_causal']} |")
    finish("attention", arguments, figures | {"difference": difference})
    parallel.destroy()


def _inputs(arguments: argparse.Namespace, dtype: torch.dtype) -> Tensors:
    heads, groups = arguments.heads, arguments.groups
    query, key, value = (
        torch.randn(
            arguments.tokens, 1, number, arguments.head, dtype=dtype, device=device()
        ).requires_grad_()
        for number in (heads, groups, groups)
    )
    return query, key, value


if __name__ == "__main__":
    main()
