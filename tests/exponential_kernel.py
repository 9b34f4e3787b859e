"""A kernel that does nothing but the kernels' exp."""

import torch
import triton
import triton.language as tl

from routing_replay.kernels.scores import exp


@triton.jit
def _exp_kernel(values, results, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(results + at, exp(tl.load(values + at)))


def run(values):
    results = torch.empty_like(values)
    _exp_kernel[(1,)](values, results, BLOCK=len(values))
    return results
