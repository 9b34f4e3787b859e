"""Log-probs and entropy of sampled tokens, without a second tensor of the logits' size.

A plain log-softmax keeps a tensor as large as the logits for the backward pass: 2.3 GiB in float32
for 4,096 tokens of a vocabulary of 151,936. Here both passes walk over the tokens in chunks and
keep one number per token. The backward pass can write its result into the logits themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ..errors import ObjectiveError

# Size of one float32 temporary; about two live at once. CPU: 2 to 16 MiB are near in time, 64 MiB
# takes half as long again (tools/bench/logprobs.py). CUDA: not measured; 16,384 tokens of a
# vocabulary shard of 75,968 make 77 chunks of about 18 launches. `--chunk-mib 256` tries a quarter.
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 64 * 2**20}
# Stands for -inf where it would be multiplied by a probability of 0; finite in float32.
LOWEST = -1e30


@dataclass(frozen=True, kw_only=True)
class Support:
    """The tokens that sampling could choose from at each position (top-p, top-k), ragged.

    Args:
        ids_N: int64 token ids, position after position, on the logits' device.
        offsets_T1: int64, T + 1 values on the CPU: ids_N[offsets[t]:offsets[t + 1]] belong to
            position t. A position without ids is not restricted.
    """

    ids_N: torch.Tensor
    offsets_T1: torch.Tensor

    def __post_init__(self) -> None:
        offsets, num_ids = self.offsets_T1, len(self.ids_N)
        rises = offsets.device.type == "cpu" and bool((offsets[1:] >= offsets[:-1]).all())
        if not rises or int(offsets[0]) != 0 or int(offsets[-1]) != num_ids:
            raise ObjectiveError(
                "the offsets of a sampling support do not fit its ids",
                expected=f"rising from 0 to {num_ids}, on the CPU",
                got=f"{offsets.tolist()[:8]}... on {offsets.device}",
            )


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Scores of the target tokens, in float32 (float64 for float64 logits), both differentiable.

    Args:
        logp_T: Log-prob of the target; -inf where it is outside the vocabulary or its support.
        entropy_T: Entropy of the distribution, in nats.
    """

    logp_T: torch.Tensor
    entropy_T: torch.Tensor


def token_logprobs(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    support: Support | None = None,
    reuse_logits: bool = False,
) -> TokenScores:
    """Return log softmax(logits / temperature) at the targets, and the distribution's entropy.

    Args:
        logits_TV: Any floating type; with `group` this rank's equal share of the vocabulary.
        targets_T: int64 ids of the whole vocabulary; ids outside it (as -100) score -inf without
            gradient.
        temperature: The rollout's sampling temperature, so that both engines mean the same policy.
        group: Tensor-parallel group that the vocabulary is split over in the order of its ranks.
            Its ranks must compute the same loss, as everywhere in Megatron: the backward pass does
            not communicate.
        support: Keep Sampling Mask: only these tokens have probability, as in the rollout. Apply
            it to pi_theta and pi_old; mu must be the log-prob after truncation.
        reuse_logits: The backward pass overwrites the logits with their gradient. Nothing else may
            need them afterwards; autograd raises if a second backward pass tries to.

    Raises:
        ObjectiveError: Shapes that do not fit, or a temperature that is not positive.
    """
    if logits_TV.dim() != 2 or targets_T.shape != logits_TV.shape[:1]:
        raise ObjectiveError(
            "logits and targets do not fit",
            expected="[T, V] and [T]",
            got=f"{tuple(logits_TV.shape)} and {tuple(targets_T.shape)}",
        )
    if not temperature > 0:
        raise ObjectiveError("the temperature is not positive", expected="> 0", got=temperature)
    if support is not None and len(support.offsets_T1) != len(targets_T) + 1:
        raise ObjectiveError(
            "the sampling support is of another length",
            expected=f"{len(targets_T) + 1} offsets",
            got=len(support.offsets_T1),
        )
    shard = _Shard(logits_TV.shape[1], temperature, group, support)
    logp_T, entropy_T = _TokenLogprobs.apply(logits_TV, targets_T, shard, reuse_logits)
    return TokenScores(logp_T=logp_T, entropy_T=entropy_T)


@torch.no_grad()
def logprobs_at(
    logits_TV: torch.Tensor,
    ids_TK: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    support: Support | None = None,
) -> torch.Tensor:
    """Return log softmax(logits / temperature) at several ids per position, without gradient.

    Args:
        logits_TV, temperature, group, support: As in `token_logprobs`; call this before a backward
            pass that reuses the logits.
        ids_TK: int64 ids of the whole vocabulary.

    Returns:
        [T, K] in float32 (float64 for float64 logits); -inf outside the vocabulary or the support.
    """
    shard = _Shard(logits_TV.shape[1], temperature, group, support)
    precise = torch.promote_types(logits_TV.dtype, torch.float32)
    first_T = torch.zeros_like(ids_TK[:, 0])
    parts = [logits_TV.new_zeros(4, 0, dtype=precise)]
    values = [logits_TV.new_zeros(0, ids_TK.shape[1], dtype=precise)]
    for rows in shard.chunks(logits_TV):
        logits = shard.allowed_logits(logits_TV, rows)
        parts.append(_sums(shard, logits, first_T[rows]))
        columns, is_own = shard.owned(ids_TK[rows])
        scores = logits.gather(1, columns).to(precise) / temperature
        values.append(torch.where(is_own, scores, -torch.inf))
    values_TK = torch.cat(values)
    peak_T, sums = torch.cat(parts, dim=1).tensor_split([1])
    peak_T = peak_T[0]
    if group is not None:
        # An id is with one rank; the others hold -inf.
        dist.all_reduce(values_TK, op=dist.ReduceOp.MAX, group=group)
        no_owner_T = torch.zeros_like(peak_T, dtype=torch.bool)
        zeros_T = torch.zeros_like(peak_T)
        sums = torch.stack([*sums[:2], zeros_T, zeros_T])
        peak_T, sums = _combine(peak_T, sums, no_owner_T, group)
    return values_TK - (peak_T + sums[0].log())[:, None]


@dataclass(frozen=True)
class _Shard:
    """How this rank's logits become scores, chunk by chunk."""

    vocab: int
    temperature: float
    group: dist.ProcessGroup | None
    support: Support | None

    @functools.cached_property
    def support_counts_T(self) -> torch.Tensor:
        """Ids of each position, on the device: copied once per call, without a wait."""
        assert self.support is not None
        counts_T, device = self.support.offsets_T1.diff(), self.support.ids_N.device
        if device.type == "cuda":
            return counts_T.pin_memory().to(device, non_blocking=True)
        return counts_T.to(device)

    @property
    def first_id(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group) * self.vocab

    def chunks(self, logits_TV: torch.Tensor) -> Iterator[slice]:
        """Yield slices of the tokens, of about CHUNK_BYTES of float32 each."""
        size_bytes = CHUNK_BYTES.get(logits_TV.device.type, CHUNK_BYTES["cuda"])
        size, total = max(1, size_bytes // (4 * max(1, self.vocab))), len(logits_TV)
        return (slice(n, min(n + size, total)) for n in range(0, total, size))

    def allowed_logits(self, logits_TV: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return the rows, or a copy of them that is -inf outside the support."""
        logits = logits_TV[rows]
        if self.support is None:
            return logits
        return logits.masked_fill(~self._allowed(logits, rows), -torch.inf)

    def shifted(self, logits: torch.Tensor, shift_T: torch.Tensor) -> torch.Tensor:
        """Return logits / temperature - shift in a new tensor, in the shift's dtype."""
        scores = torch.sub(logits, (shift_T * self.temperature)[:, None])
        return scores if self.temperature == 1.0 else scores.div_(self.temperature)

    def _allowed(self, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        assert self.support is not None
        start, stop = self.support.offsets_T1[[rows.start, rows.stop]].tolist()
        ids_N = self.support.ids_N[start:stop] - self.first_id
        counts_T = self.support_counts_T[rows]
        index_N = torch.arange(len(counts_T), device=ids_N.device)
        index_N = index_N.repeat_interleave(counts_T, output_size=len(ids_N))
        # One column more collects the ids of other ranks.
        is_own_N = (ids_N >= 0) & (ids_N < self.vocab)
        shape = (len(counts_T), self.vocab + 1)
        allowed_TV = torch.zeros(shape, dtype=torch.bool, device=logits.device)
        allowed_TV[index_N, torch.where(is_own_N, ids_N, self.vocab)] = True
        return allowed_TV[:, : self.vocab] | (counts_T == 0)[:, None]

    def owned(self, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the targets' local columns (0 for other ranks') and whether they are ours."""
        columns_T = targets_T - self.first_id
        is_own_T = (columns_T >= 0) & (columns_T < self.vocab)
        return torch.where(is_own_T, columns_T, 0), is_own_T


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: torch.Tensor,
        targets_T: torch.Tensor,
        shard: _Shard,
        reuse_logits: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        columns_T, is_own_T = shard.owned(targets_T)
        precise = torch.promote_types(logits_TV.dtype, torch.float32)
        parts = [logits_TV.new_zeros(4, 0, dtype=precise)]
        for rows in shard.chunks(logits_TV):
            parts.append(_sums(shard, shard.allowed_logits(logits_TV, rows), columns_T[rows]))
        peak_T, total_T, weighted_T, target_T = torch.cat(parts, dim=1)
        target_T = torch.where(is_own_T, target_T, 0.0)
        sums = torch.stack([total_T, weighted_T, target_T, is_own_T.to(total_T.dtype)])
        if shard.group is not None:
            peak_T, sums = _combine(peak_T, sums, is_own_T, shard.group)
        total_T, weighted_T, target_T, owners_T = sums
        log_total_T = total_T.log()
        entropy_T = log_total_T - weighted_T / total_T
        logp_T = torch.where(owners_T > 0, target_T - log_total_T, -torch.inf)
        ctx.save_for_backward(
            logits_TV, columns_T, is_own_T, peak_T + log_total_T, entropy_T, logp_T
        )
        ctx.shard, ctx.reuse_logits = shard, reuse_logits
        ctx.set_materialize_grads(False)
        return logp_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logp_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None, None]:
        logits_TV, columns_T, is_own_T, log_norm_T, entropy_T, logp_T = ctx.saved_tensors
        gradient_TV = logits_TV if ctx.reuse_logits else torch.empty_like(logits_TV)
        if grad_logp_T is None:
            grad_logp_T = torch.zeros_like(logp_T)
        # A target without probability has no direction to go.
        grad_logp_T = torch.where(torch.isfinite(logp_T), grad_logp_T, 0.0)
        for rows in ctx.shard.chunks(logits_TV):
            logits = ctx.shard.allowed_logits(logits_TV, rows)
            logs = ctx.shard.shifted(logits, log_norm_T[rows])
            # d logp / d z_v = [v = y] - p_v;   d H / d z_v = -p_v (log p_v + H)
            factor = -grad_logp_T[rows, None]
            if grad_entropy_T is not None:
                slope = logs.clamp(min=LOWEST).add_(entropy_T[rows, None])
                factor = slope.mul_(-grad_entropy_T[rows, None]).add_(factor)
            gradient = logs.exp_().mul_(factor)
            own = torch.where(is_own_T[rows], grad_logp_T[rows], 0.0)
            gradient.scatter_add_(1, columns_T[rows, None], own[:, None])
            if ctx.shard.temperature != 1.0:
                gradient /= ctx.shard.temperature
            gradient_TV[rows] = gradient
        return gradient_TV, None, None, None


def _sums(shard: _Shard, logits: torch.Tensor, columns_T: torch.Tensor) -> torch.Tensor:
    """Return [4, T]: the maximum, and relative to it three sums.

    They are the sum of exp, the sum of exp * score, and the target's score.
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    peak_T = (logits.amax(dim=1).to(precise) / shard.temperature).clamp(min=LOWEST)
    scores = shard.shifted(logits, peak_T)
    target_T = scores.gather(1, columns_T[:, None]).squeeze(1)
    probabilities = scores.exp()
    total_T = probabilities.sum(dim=1)
    weighted_T = torch.linalg.vecdot(probabilities, scores.clamp_(min=LOWEST))
    return torch.stack([peak_T, total_T, weighted_T, target_T])


def _combine(
    peak_T: torch.Tensor, sums: torch.Tensor, is_own_T: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce over the ranks: one maximum, then one sum relative to the common peak."""
    common_T = peak_T.clone()
    dist.all_reduce(common_T, op=dist.ReduceOp.MAX, group=group)
    shift_T = peak_T - common_T
    total_T, weighted_T, target_T, owners_T = sums
    scale_T = shift_T.exp()
    sums = torch.stack(
        [
            total_T * scale_T,
            (weighted_T + total_T * shift_T) * scale_T,
            torch.where(is_own_T, target_T + shift_T, 0.0),
            owners_T,
        ]
    )
    dist.all_reduce(sums, group=group)
    return common_T, sums
