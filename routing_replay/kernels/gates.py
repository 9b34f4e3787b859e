"""Gates capture: logits and the engine's expert ids in, packed ids and gates out, in one kernel.

It stands for seven small kernels of the torch form (clamp, widen, softmax, gather, two halves,
store) and for stock's own write, once per layer and step, inside the engine's CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..errors import ServerError
from .scores import exp, independent_scores, tile_of

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
# A decode step has few tokens: a warp for each few of them spreads these over more of the GPU.
NUM_WARPS = 1
# A slot of the buffer: the expert id in the upper half, the gate as float16 bits in the lower.
GATE_BITS = tl.constexpr(16)
GATE_MASK = tl.constexpr(0xFFFF)


def capture_gates(
    router_logits_TE: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    function: str,
    packed_TK: torch.Tensor,
) -> None:
    """Write one layer's ids and gates into a view of the capture buffer; no sync, static shapes.

    A gate is the probability of a selected expert over ALL experts, from the raw logits.

    Args:
        router_logits_TE: Raw logits, float32, bfloat16 or float16; rows may be strided.
        expert_ids_TK: int32 or int64 from the engine; rows may be strided. Ids of padding rows may
            be out of range: they are stored as they are, and their gates mean nothing.
        function: One of `SCORE_FUNCTIONS`.
        packed_TK: int32, where the rows go; strided as the buffer is.

    Raises:
        ServerError: Shapes, dtypes or a score function that do not fit.
    """
    _check(router_logits_TE, expert_ids_TK, function, packed_TK)
    num_tokens, num_experts = router_logits_TE.shape
    if not num_tokens:
        return
    block_t, block_e = tile_of(num_experts, NUM_WARPS)
    top_k = expert_ids_TK.shape[1]
    _capture_kernel[(triton.cdiv(num_tokens, block_t),)](
        router_logits_TE,
        expert_ids_TK,
        packed_TK,
        num_tokens,
        router_logits_TE.stride(0),
        expert_ids_TK.stride(0),
        packed_TK.stride(0),
        FUNCTION=function,
        K=top_k,
        E=num_experts,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=NUM_WARPS,
    )


# A graph is captured for each batch size: none of them shall compile anew, nor a layer's offset.
@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["packed"])
def _capture_kernel(
    logits,
    ids,
    packed,
    num_tokens,
    logits_stride,
    ids_stride,
    packed_stride,
    FUNCTION: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tokens_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts_E = tl.arange(0, BLOCK_E)
    slots_K = tl.arange(0, BLOCK_K)
    exists_T = tokens_T < num_tokens
    exists_TE = exists_T[:, None] & (experts_E < E)[None, :]
    exists_TK = exists_T[:, None] & (slots_K < K)[None, :]
    rows_T1 = (logits + tokens_T * logits_stride)[:, None]
    ids_TK = tl.load(ids + tokens_T[:, None] * ids_stride + slots_K[None, :], exists_TK, other=0)
    ids_TK = ids_TK.to(tl.int32)
    # The selected logits are read again: their lines have just been fetched by the row.
    picked_TK = tl.minimum(tl.maximum(ids_TK, 0), E - 1)
    chosen_TK = tl.load(rows_T1 + picked_TK, exists_TK, other=0.0).to(tl.float32)
    x_TE = tl.load(rows_T1 + experts_E[None, :], exists_TE, other=0.0).to(tl.float32)
    if FUNCTION == "softmax":
        x_TE = tl.where(exists_TE, x_TE, float("-inf"))
        largest_T1 = tl.max(tl.where(exists_T[:, None], x_TE, 0.0), 1)[:, None]
        scores_TE = exp(x_TE - largest_T1)
        scores_TK = exp(chosen_TK - largest_T1)
    else:
        scores_TE = tl.where(exists_TE, independent_scores(x_TE, FUNCTION), 0.0)
        scores_TK = independent_scores(chosen_TK, FUNCTION)
    total_T1 = tl.sum(scores_TE, 1)[:, None]
    gates_TK = (scores_TK / tl.where(exists_T[:, None], total_T1, 1.0)).to(tl.float16)
    bits_TK = gates_TK.to(tl.int16, bitcast=True).to(tl.int32) & GATE_MASK
    slots_TK = (ids_TK << GATE_BITS) | bits_TK
    tl.store(packed + tokens_T[:, None] * packed_stride + slots_K[None, :], slots_TK, exists_TK)


def _check(
    router_logits_TE: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    function: str,
    packed_TK: torch.Tensor,
) -> None:
    """Refuse what would read or write out of bounds on a GPU."""
    num_tokens, top_k = expert_ids_TK.shape
    fits = (
        function in SCORE_FUNCTIONS
        and router_logits_TE.shape[0] == num_tokens
        and packed_TK.shape == (num_tokens, top_k)
        and packed_TK.dtype == torch.int32
        and all(t.stride(1) == 1 for t in (router_logits_TE, expert_ids_TK, packed_TK))
    )
    if not fits:
        raise ServerError(
            "the gates kernel cannot capture this router call",
            expected=f"a score function of {', '.join(SCORE_FUNCTIONS)}; logits [T, E], ids [T, K] "
            "and int32 slots [T, K] with dense rows",
            got=f"{function!r}; {list(router_logits_TE.shape)}, {list(expert_ids_TK.shape)} and "
            f"{packed_TK.dtype} {list(packed_TK.shape)}",
            fix="Turn the kernel off for this model: the torch form takes any of them",
        )
