"""Megatron's unfused permutation of tokens to experts and back: time, noise, error.

    python -m tools.bench.permute [--tokens 8704] [--experts 128] [--top-k 8] [--hidden 2048]

Two passes over the same routes are bitwise equal only if the way back is: unfused it adds with
atomics on a GPU, in the dtype of the tokens. Ways of permutation and its inverse:

    megatron          megatron-core's functions, unfused
    deterministic     the same under torch.use_deterministic_algorithms(True)
    gather and sum    each token gathers its experts' rows and sums them in float32
    fused             Transformer Engine's, where it is installed

Besides the milliseconds: the share of values that differ between two runs, and the largest error
against float64 relative to the largest value.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .paired import device, finish, parse, parser, ratios, spread, take_turns, timed

# isort: split
from megatron.core.transformer.moe.moe_utils import HAVE_TE, permute, unpermute


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tokens and where they go.

    Args:
        tokens_TH: What is permuted, and comes back as the sum over its experts.
        routing_map_TE: bool, K experts for each token.
        token_R: Of each permuted row, in Megatron's order: by expert, then by token.
        factor_R1: What an "expert" multiplies a row with.
    """

    tokens_TH: torch.Tensor
    routing_map_TE: torch.Tensor
    token_R: torch.Tensor
    factor_R1: torch.Tensor

    @classmethod
    def random(cls, arguments: argparse.Namespace) -> Batch:
        shape_TE = (arguments.tokens, arguments.experts)
        ids_TK = torch.rand(shape_TE, device=device()).argsort(1)[:, : arguments.top_k]
        routing_map_TE = torch.zeros(shape_TE, dtype=torch.bool, device=device())
        tokens_TH = torch.randn(arguments.tokens, arguments.hidden, device=device())
        routing_map_TE.scatter_(1, ids_TK, True)
        token_R = routing_map_TE.T.contiguous().nonzero()[:, 1]
        return cls(
            tokens_TH=tokens_TH.bfloat16(),
            routing_map_TE=routing_map_TE,
            token_R=token_R,
            factor_R1=torch.randn(len(token_R), 1, device=device()).bfloat16(),
        )

    def exact(self) -> torch.Tensor:
        """Return the sums in float64; the experts' outputs are rounded as everywhere."""
        rows_RH = self.tokens_TH[self.token_R] * self.factor_R1
        return torch.zeros_like(self.tokens_TH, dtype=torch.float64).index_add_(
            0, self.token_R, rows_RH.double()
        )


def there_and_back(batch: Batch, fused: bool = False) -> torch.Tensor:
    """Return each token's sum over its experts, by Megatron."""
    num_rows = len(batch.token_R)
    permuted_RH, _, indices, *_ = permute(
        batch.tokens_TH, batch.routing_map_TE, num_out_tokens=num_rows, fused=fused
    )
    rows_RH, shape = permuted_RH * batch.factor_R1, batch.tokens_TH.shape
    returned: torch.Tensor = unpermute(rows_RH, indices, shape, fused=fused)
    return returned


def deterministic(batch: Batch) -> torch.Tensor:
    """Return the same by kernels that add in one order."""
    torch.use_deterministic_algorithms(True)
    try:
        return there_and_back(batch)
    finally:
        torch.use_deterministic_algorithms(False)


def gather_and_sum(batch: Batch) -> torch.Tensor:
    """Return the same without atomics: what a fused kernel does, in torch."""
    token_R = batch.routing_map_TE.T.contiguous().nonzero()[:, 1]
    rows_RH = batch.tokens_TH.index_select(0, token_R) * batch.factor_R1
    top_k = len(token_R) // len(batch.tokens_TH)
    rows_TK = token_R.argsort(stable=True).view(-1, top_k)
    return rows_RH[rows_TK].sum(1, dtype=torch.float32).to(batch.tokens_TH.dtype)


def noise_and_error(way: Callable[[Batch], torch.Tensor], batch: Batch) -> dict[str, float]:
    """Return the share of values that differ between two runs, and the error against float64."""
    first, second = way(batch), way(batch)
    exact = batch.exact()
    error = (first.double() - exact).abs().max() / exact.abs().max()
    return {"differs": (first != second).float().mean().item(), "error": error.item()}


def main(argv: Sequence[str] | None = None) -> None:
    """Time every way in turns, and print what it costs in exactness."""
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, default=8704)
    made.add_argument("--experts", type=int, default=128)
    made.add_argument("--top-k", type=int, default=8)
    made.add_argument("--hidden", type=int, default=2048)
    made.add_argument("--rounds", type=int, default=9)
    quick = {"tokens": 64, "hidden": 32, "rounds": 1}
    arguments = parse(made, argv, quick)
    batch = Batch.random(arguments)
    ways: dict[str, Callable[[Batch], torch.Tensor]] = {
        "megatron": there_and_back,
        "deterministic": deterministic,
        "gather and sum": gather_and_sum,
    }
    if HAVE_TE and torch.cuda.is_available():
        ways["fused"] = lambda batch: there_and_back(batch, fused=True)
    variants = {name: timed(lambda way=way: way(batch)) for name, way in ways.items()}  # type: ignore[misc]
    times = take_turns(variants, arguments.rounds)
    to_megatron, figures = ratios(times, "megatron"), dict[str, Any]()
    print("| way | ms | / megatron | values that differ | error |\n| --- | --- | --- | --- | --- |")
    for name, way in ways.items():
        exactness = noise_and_error(way, batch)
        milliseconds = spread([1e3 * value for value in times[name]])
        figures[name] = {"ms": milliseconds, "to_megatron": to_megatron[name]} | exactness
        text = f"{exactness['differs']:.1%} | {exactness['error']:.1e} |"
        print(f"| {name} | {milliseconds} | {to_megatron[name]} | {text}")
    finish("permute", arguments, figures)


if __name__ == "__main__":
    main()
