"""The replay router: logits and expert ids in, combine weights and routing map out, in one kernel.

A router that replays needs no top-k. One program reads all logits of a few tokens once and writes
their weights and their map; nothing is sorted, gathered or scattered. Tokens without a route (live
ones) are selected in the same program by an exact top-k, which a tile without live tokens skips.

The mathematics is Megatron's (`topk_routing_with_score_function`, megatron-core 0.16 to 0.19): in
float32 whatever the logits' dtype, with the weights rounded to that dtype at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ..errors import ConfigError, ReplayError
from .scores import independent_scores, row_softmax, sigmoid, tile_of

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Ids of Megatron's own int64, and the compact ones of a table (uint16 is viewed as int16).
ID_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
NUM_WARPS = 4
# Megatron adds it to the sum that sigmoid and sqrtsoftplus scores are divided by.
EPSILON = tl.constexpr(1e-20)
# Below the key of every number (see `sort_key`): an expert that cannot be selected (any more).
NO_KEY_32 = tl.constexpr(-(2**31) + 1)
NO_KEY_64 = tl.constexpr(-(2**63) + 1)


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """How a router turns logits into weights: the arguments of Megatron's function.

    Args:
        top_k: Experts per token.
        score_function: One of `SCORE_FUNCTIONS`.
        use_pre_softmax: Softmax over all experts before the selection, not over the selected.
        num_groups: Groups of group-limited routing; None for none. Matters to live tokens only.
        group_top_k: Groups per token; None for none.
        scaling_factor: Factor of the weights; None (and 0, as in Megatron) for none.

    Raises:
        ConfigError: An unknown score function, or numbers that no router can have.
    """

    top_k: int
    score_function: str = "softmax"
    use_pre_softmax: bool = False
    num_groups: int | None = None
    group_top_k: int | None = None
    scaling_factor: float | None = None

    def __post_init__(self) -> None:
        if self.score_function not in SCORE_FUNCTIONS:
            raise ConfigError(
                "score function is unknown",
                expected=" or ".join(SCORE_FUNCTIONS),
                got=repr(self.score_function),
            )
        if self.top_k < 1:
            raise ConfigError("top-k is out of range", expected=">= 1", got=self.top_k)
        if self.group_top_k and not (
            self.num_groups and self.group_top_k <= min(self.num_groups, self.top_k)
        ):
            raise ConfigError(
                "groups per token are out of range",
                expected="1 .. the number of groups, and at most top-k",
                got=f"{self.group_top_k} of {self.num_groups} groups, top-{self.top_k}",
            )

    @property
    def form(self) -> str:
        """The kernel's name of the score function."""
        is_pre = self.score_function == "softmax" and self.use_pre_softmax
        return "pre_softmax" if is_pre else self.score_function


def replay_routing(
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    rule: RoutingRule,
    *,
    is_live_T: torch.Tensor | None = None,
    expert_bias_E: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what Megatron's `topk_routing_with_score_function` returns, with replayed experts.

    Args:
        logits_TE: Router logits, of any of `DTYPES`.
        ids_TK: Replayed experts, distinct in each row, of any of `ID_DTYPES`. Rows of live tokens
            may hold anything, and are OVERWRITTEN with the experts that were selected: a
            recomputation that replays them takes the forward's experts.
        rule: The router's.
        is_live_T: bool or uint8, tokens to select anew; None for none, which is faster.
        expert_bias_E: float32, added to the scores for the selection of live tokens only.

    Returns:
        Weights [T, E] in the logits' dtype, 0 where an expert is not selected, and the map [T, E],
        bool. Gradients flow from the weights into the logits.

    Raises:
        ReplayError: Shapes or dtypes that do not belong together.

    Live tokens: of equal scores the expert with the lowest index wins. Top-k is exact for the
    scores as the kernel computes them, which differ from torch's by float32 rounding.
    """
    logits_TE = logits_TE.contiguous()
    _check(logits_TE, ids_TK, rule, is_live_T, expert_bias_E)
    weights_TE, routing_map_TE = _ReplayRouting.apply(
        logits_TE, ids_TK, is_live_T, expert_bias_E, rule
    )
    return weights_TE, routing_map_TE


class _ReplayRouting(torch.autograd.Function):
    """Saved for the backward: the logits and the compact ids, nothing of size [T, E] of ours."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: torch.Tensor,
        ids_TK: torch.Tensor,
        is_live_T: torch.Tensor | None,
        expert_bias_E: torch.Tensor | None,
        rule: RoutingRule,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, num_experts = logits_TE.shape
        probs_TE = torch.empty_like(logits_TE)
        routing_map_TE = torch.empty_like(logits_TE, dtype=torch.bool)
        block_t, block_e = tile_of(num_experts, NUM_WARPS)
        num_groups = (rule.num_groups or 0) if rule.group_top_k else 0
        if num_tokens:
            _forward_kernel[(triton.cdiv(num_tokens, block_t),)](
                logits_TE,
                ids_TK,
                ids_TK if is_live_T is None else is_live_T.view(torch.uint8),
                logits_TE if expert_bias_E is None else expert_bias_E,
                probs_TE,
                routing_map_TE.view(torch.uint8),
                num_tokens,
                rule.scaling_factor or 1.0,
                FORM=rule.form,
                HAS_LIVE=is_live_T is not None,
                HAS_BIAS=expert_bias_E is not None,
                NUM_GROUPS=num_groups,
                BLOCK_G=triton.next_power_of_2(num_groups or 1),
                GROUP_TOP_K=rule.group_top_k or 0,
                K=rule.top_k,
                E=num_experts,
                BLOCK_T=block_t,
                BLOCK_E=block_e,
                num_warps=NUM_WARPS,
            )
        ctx.rule = rule
        ctx.save_for_backward(logits_TE, ids_TK)
        ctx.mark_non_differentiable(routing_map_TE)
        ctx.set_materialize_grads(False)
        return probs_TE, routing_map_TE

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_probs_TE: torch.Tensor | None, _: None
    ) -> tuple[torch.Tensor | None, None, None, None, None]:
        if grad_probs_TE is None:
            return None, None, None, None, None
        logits_TE, ids_TK = ctx.saved_tensors
        num_tokens, num_experts = logits_TE.shape
        grad_logits_TE = torch.empty_like(logits_TE)
        block_t, block_e = tile_of(num_experts, NUM_WARPS)
        if num_tokens:
            _backward_kernel[(triton.cdiv(num_tokens, block_t),)](
                logits_TE,
                ids_TK,
                grad_probs_TE.contiguous(),
                grad_logits_TE,
                num_tokens,
                ctx.rule.scaling_factor or 1.0,
                FORM=ctx.rule.form,
                K=ctx.rule.top_k,
                E=num_experts,
                BLOCK_T=block_t,
                BLOCK_E=block_e,
                num_warps=NUM_WARPS,
            )
        return grad_logits_TE, None, None, None, None


# Microbatches differ in length, and a layer's ids lie at any byte: neither shall compile anew.
@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["ids", "is_live"])
def _forward_kernel(
    logits,
    ids,
    is_live,
    expert_bias,
    probs,
    routing_map,
    num_tokens,
    scaling_factor,
    FORM: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    GROUP_TOP_K: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tokens_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts_E = tl.arange(0, BLOCK_E)
    exists_T = tokens_T < num_tokens
    exists_TE = exists_T[:, None] & (experts_E < E)[None, :]
    at_TE = tokens_T[:, None] * E + experts_E[None, :]
    logits_TE = tl.load(logits + at_TE, mask=exists_TE, other=0.0)
    x_TE = logits_TE.to(tl.float32)
    if FORM == "softmax":
        scores_TE = x_TE
    elif FORM == "pre_softmax":
        scores_TE = row_softmax(x_TE, exists_TE)
    else:
        scores_TE = independent_scores(x_TE, FORM)

    selected_TE = _selected(ids, tokens_T, exists_T, K, BLOCK_T, BLOCK_E)
    if HAS_LIVE:
        live_T = exists_T & (tl.load(is_live + tokens_T, mask=exists_T, other=0) != 0)
        if tl.max(live_T.to(tl.int32), 0) > 0:
            if FORM == "softmax":
                values_TE = logits_TE  # Megatron compares the logits as they are, float64 too
                if logits_TE.dtype != tl.float64:
                    values_TE = x_TE
            elif HAS_BIAS:
                bias_E = tl.load(expert_bias + experts_E, mask=experts_E < E, other=0.0)
                values_TE = scores_TE + bias_E.to(tl.float32)[None, :]
            else:
                values_TE = scores_TE
            keys_TE = _sort_key(values_TE, (experts_E < E)[None, :])
            if NUM_GROUPS > 0:
                keys_TE = _within_best_groups(
                    values_TE,
                    keys_TE,
                    experts_E // (E // NUM_GROUPS),
                    logits_TE.dtype if FORM == "softmax" else tl.float32,
                    NUM_GROUPS,
                    BLOCK_G,
                    GROUP_TOP_K,
                    K // GROUP_TOP_K,
                    BLOCK_T,
                )
            selected_live_TE = exists_TE & (experts_E < 0)[None, :]
            for k in range(K):  # not unrolled: few tiles come here, and registers are dear
                best_T = tl.argmax(keys_TE, 1)
                is_best_TE = experts_E[None, :] == best_T[:, None]
                keys_TE = tl.where(is_best_TE, _no_key(keys_TE), keys_TE)
                selected_live_TE = selected_live_TE | is_best_TE
                tl.store(ids + tokens_T * K + k, best_T.to(ids.dtype.element_ty), mask=live_T)
            selected_TE = tl.where(live_T[:, None], selected_live_TE, selected_TE)

    if FORM == "softmax":
        weights_TE = row_softmax(x_TE, selected_TE)
    else:
        weights_TE = tl.where(selected_TE, scores_TE, 0.0)
        if FORM != "pre_softmax" and K > 1:
            weights_TE = weights_TE / (tl.sum(weights_TE, 1) + EPSILON)[:, None]
    weights_TE = weights_TE * scaling_factor
    tl.store(probs + at_TE, weights_TE.to(probs.dtype.element_ty), mask=exists_TE)
    tl.store(routing_map + at_TE, selected_TE.to(tl.uint8), mask=exists_TE)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["ids"])
def _backward_kernel(
    logits,
    ids,
    grad_probs,
    grad_logits,
    num_tokens,
    scaling_factor,
    FORM: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tokens_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts_E = tl.arange(0, BLOCK_E)
    exists_T = tokens_T < num_tokens
    exists_TE = exists_T[:, None] & (experts_E < E)[None, :]
    at_TE = tokens_T[:, None] * E + experts_E[None, :]
    x_TE = tl.load(logits + at_TE, mask=exists_TE, other=0.0).to(tl.float32)
    selected_TE = _selected(ids, tokens_T, exists_T, K, BLOCK_T, BLOCK_E)
    # Wide loads of all gradients, most of them unused: a mask by expert would make them narrow.
    grad_TE = tl.load(grad_probs + at_TE, mask=exists_TE, other=0.0).to(tl.float32)
    grad_TE = tl.where(selected_TE, grad_TE, 0.0) * scaling_factor
    if FORM == "softmax" or FORM == "pre_softmax":
        # p_e (g_e - sum of p g), over the experts that the softmax is over.
        p_TE = row_softmax(x_TE, selected_TE if FORM == "softmax" else exists_TE)
        grad_TE = p_TE * (grad_TE - tl.sum(p_TE * grad_TE, 1)[:, None])
    else:
        scores_TE = independent_scores(x_TE, FORM)
        if K > 1:
            total_T = tl.sum(tl.where(selected_TE, scores_TE, 0.0), 1) + EPSILON
            mean_T = tl.sum(grad_TE * scores_TE, 1) / total_T
            grad_TE = (grad_TE - mean_T[:, None]) / total_T[:, None]
        if FORM == "sigmoid":
            slope_TE = scores_TE * (1.0 - scores_TE)
        else:
            # Where softplus underflows to 0 so does the slope; Megatron's autograd says nan there.
            slope_TE = 0.5 * sigmoid(x_TE) / tl.where(scores_TE == 0.0, 1.0, scores_TE)
        grad_TE = tl.where(selected_TE, grad_TE * slope_TE, 0.0)
    tl.store(grad_logits + at_TE, grad_TE.to(grad_logits.dtype.element_ty), mask=exists_TE)


@triton.jit
def _selected(
    ids, tokens_T, exists_T, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):
    """The experts named by the ids, as a mask."""
    experts_E = tl.arange(0, BLOCK_E)
    selected_TE = tl.full([BLOCK_T, BLOCK_E], False, tl.int1)
    for k in tl.static_range(K):
        id_T = tl.load(ids + tokens_T * K + k, mask=exists_T, other=0).to(tl.int32)
        selected_TE = selected_TE | (experts_E[None, :] == id_T[:, None])
    return selected_TE


@triton.jit
def _no_key(keys):
    if keys.dtype == tl.int64:
        return NO_KEY_64
    else:  # noqa: RET505 (Triton drops the branch, not what follows it)
        return NO_KEY_32


@triton.jit
def _sort_key(values, can_be_selected):
    """Integers in the order of the values. Integers tie in one way only; floats know nan and -0."""
    values = tl.where(values == 0.0, 0.0, values)
    # As in torch, nan is greater than every number.
    values = tl.where(values != values, float("inf"), values)
    if values.dtype == tl.float64:
        bits = values.to(tl.int64, bitcast=True)
        keys = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    else:
        bits = values.to(tl.int32, bitcast=True)
        keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(can_be_selected, keys, _no_key(keys))


@triton.jit
def _within_best_groups(
    values_TE,
    keys_TE,
    group_E,
    sum_dtype: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,  # not computed here: SGLang replaces triton.next_power_of_2 on a CPU
    GROUP_TOP_K: tl.constexpr,
    NUM_SUMMED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Keys of the experts in the groups whose few best experts have the largest sums."""
    groups_G = tl.arange(0, BLOCK_G)
    experts_E = tl.arange(0, keys_TE.shape[1])
    sums_TG = tl.zeros([BLOCK_T, BLOCK_G], values_TE.dtype)
    for g in range(NUM_GROUPS):
        left_TE = tl.where(group_E[None, :] == g, keys_TE, _no_key(keys_TE))
        sum_T = tl.zeros([BLOCK_T], values_TE.dtype)
        for _ in range(NUM_SUMMED):
            is_best_TE = experts_E[None, :] == tl.argmax(left_TE, 1)[:, None]
            left_TE = tl.where(is_best_TE, _no_key(keys_TE), left_TE)
            sum_T += tl.sum(tl.where(is_best_TE, values_TE, 0.0), 1)
        # Megatron sums in the dtype of the scores; bfloat16 logits tie where float32 would not.
        sum_T = sum_T.to(sum_dtype).to(values_TE.dtype)
        sums_TG = tl.where(groups_G[None, :] == g, sum_T[:, None], sums_TG)
    group_keys_TG = _sort_key(sums_TG, (groups_G < NUM_GROUPS)[None, :])
    is_left_out_TE = keys_TE == keys_TE
    for _ in range(GROUP_TOP_K):
        best_T = tl.argmax(group_keys_TG, 1)
        is_best_TG = groups_G[None, :] == best_T[:, None]
        group_keys_TG = tl.where(is_best_TG, _no_key(group_keys_TG), group_keys_TG)
        is_left_out_TE = is_left_out_TE & (group_E[None, :] != best_T[:, None])
    return tl.where(is_left_out_TE, _no_key(keys_TE), keys_TE)


def _check(
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    rule: RoutingRule,
    is_live_T: torch.Tensor | None,
    expert_bias_E: torch.Tensor | None,
) -> None:
    """Refuse what would read out of bounds: on a GPU that is no exception, but a lost process."""
    num_tokens, num_experts = logits_TE.shape
    tensors: list[tuple[str, torch.Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]] = [
        ("logits", logits_TE, (num_tokens, num_experts), DTYPES),
        ("expert ids", ids_TK, (num_tokens, rule.top_k), ID_DTYPES),
        ("live tokens", is_live_T, (num_tokens,), (torch.bool, torch.uint8)),
        ("expert bias", expert_bias_E, (num_experts,), (torch.float32,)),
    ]
    for name, values, shape, dtypes in tensors:
        if values is None:
            continue
        fits = values.shape == shape and values.dtype in dtypes and values.is_contiguous()
        if not fits or values.device != logits_TE.device:
            raise ReplayError(
                f"{name} do not fit the replay router",
                expected=f"{list(shape)} of {' or '.join(map(str, dtypes))}, contiguous, on "
                f"{logits_TE.device}",
                got=f"{list(values.shape)} of {values.dtype} with strides {values.stride()} on "
                f"{values.device}",
            )
    num_groups = rule.num_groups if rule.group_top_k else None
    if rule.top_k > num_experts or num_experts % (num_groups or 1):
        raise ReplayError(
            "the routing rule does not fit the router",
            expected=f"top-k up to {num_experts}, and groups of equal size",
            got=f"top-{rule.top_k}, {num_groups or 1} groups",
        )
