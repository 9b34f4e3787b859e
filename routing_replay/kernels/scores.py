"""The score functions of routers, as Triton device functions on float32 tiles.

Both kernels use them, so that a gate that was captured and a gate that is replayed round alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Above this torch takes softplus(x) = x; exp(20) * 2**-24 is where float32 cannot tell them apart.
SOFTPLUS_LIMIT = tl.constexpr(20.0)
LOG2_E = tl.constexpr(1.4426950408889634)
# ln(2) in two parts: the first has 9 bits, so that its multiples are exact.
LN_2_HIGH = tl.constexpr(0.693359375)
LN_2_LOW = tl.constexpr(-2.12194440e-4)
# Beyond it float32's exp is 0 or infinity, and an infinite x would give nan.
EXP_LIMIT = tl.constexpr(200.0)
# Values that a thread holds of a [tokens, experts] tile: registers allow it without spilling.
VALUES_PER_THREAD = 16
THREADS_PER_WARP = 32


@triton.jit
def exp(x):
    """exp(x) to about two units in the last place, wherever a float32 holds it."""
    # tl.exp is exp2(x * log2(e)) on a GPU: the product's rounding alone makes the result wrong by
    # |x| units. So the whole powers of two come off first (Cody and Waite).
    x = tl.where(x < -EXP_LIMIT, -EXP_LIMIT, tl.where(x > EXP_LIMIT, EXP_LIMIT, x))
    n = tl.floor(x * LOG2_E + 0.5)
    rest = (x - n * LN_2_HIGH) - n * LN_2_LOW
    return tl.exp2(rest * LOG2_E) * tl.exp2(n)


@triton.jit
def log1p(y):
    """log(1 + y) to a few units in the last place, for y >= 0."""
    # Triton's own log1p is in CUDA's library only, which the interpreter has not. 1 + y rounds;
    # the quotient y / (u - 1) repairs what the rounding did to the logarithm (Kahan).
    u = 1.0 + y
    rounded = u - 1.0
    is_lost = rounded == 0.0
    return tl.where(is_lost, y, tl.log(u) * (y / tl.where(is_lost, 1.0, rounded)))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def sqrt_softplus(x):
    return tl.sqrt(tl.where(x > SOFTPLUS_LIMIT, x, log1p(exp(tl.minimum(x, SOFTPLUS_LIMIT)))))


@triton.jit
def row_softmax(x_TE, included_TE):
    """Softmax of each row over the included experts; 0 elsewhere."""
    x_TE = tl.where(included_TE, x_TE, float("-inf"))
    # A row without an included expert exists only beyond the last token; keep it finite.
    largest_T = tl.max(x_TE, 1)
    largest_T = tl.where(largest_T == float("-inf"), 0.0, largest_T)
    weights_TE = exp(x_TE - largest_T[:, None])
    total_T = tl.sum(weights_TE, 1)
    return weights_TE / tl.where(total_T == 0.0, 1.0, total_T)[:, None]


@triton.jit
def independent_scores(x_TE, FUNCTION: tl.constexpr):
    """Scores of routers whose experts are scored one by one: "sigmoid" or "sqrtsoftplus"."""
    if FUNCTION == "sigmoid":
        return sigmoid(x_TE)
    else:  # noqa: RET505 (Triton drops the branch, not what follows it)
        return sqrt_softplus(x_TE)


def tile_of(num_experts: int, num_warps: int) -> tuple[int, int]:
    """(tokens, experts) of a program's tile: all experts of a few tokens; powers of two."""
    block_e = triton.next_power_of_2(num_experts)
    return max(1, VALUES_PER_THREAD * THREADS_PER_WARP * num_warps // block_e), block_e
