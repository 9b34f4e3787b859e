"""What an objective reads and what it returns: one microbatch in, a loss and typed metrics out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..errors import ObjectiveError
from ..metrics.typed import Metric


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """What sums are divided by: counts over the whole optimizer step, never over a microbatch.

    Counted once per step over all ranks and microbatches, before anything is filtered, so that the
    step's loss is the plain sum of the microbatch losses and does not depend on how tokens were
    split.

    Megatron averages: its schedule divides a loss by the number of microbatches, its gradient
    reduction by the number of data-parallel (times context-parallel) ranks. A loss function with
    two return values undoes that with `loss * num_microbatches * data_parallel_size`, where
    data_parallel_size is without context parallelism: the schedule multiplies by that itself.

    Args:
        num_sequences: Responses in the step, empty ones included.
        num_tokens: Tokens in the loss in the step.
        max_length: Longest response allowed: the constant of `seq-mean-token-sum-norm`.
    """

    num_sequences: int
    num_tokens: int
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_sequences", "num_tokens"):
            if getattr(self, name) < 0:
                raise ObjectiveError(
                    f"denominator {name} is negative", expected=">= 0", got=getattr(self, name)
                )
        if self.max_length is not None and self.max_length < 1:
            raise ObjectiveError(
                "denominator max_length is too small", expected=">= 1", got=self.max_length
            )


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """One microbatch: the tokens of all its sequences on one axis, in any order.

    A token whose `mask_T` is false counts for nothing and may hold anything, nan included. A token
    in the mask whose log-probs or advantage are not finite contributes zero and is counted in the
    metric `objective/nonfinite_tokens`.

    Args:
        logp_theta_T: log pi_theta of the sampled token, with gradient.
        logp_old_T: log pi_old, the trainer at the rollout's weights. Without such a pass: log mu.
        logp_mu_T: log mu, from the inference engine.
        advantages_T: Advantage of the token, usually that of its sequence.
        mask_T: bool; the token is part of the loss.
        sequence_T: int64; the token's sequence in this microbatch, in [0, num_sequences).
        num_sequences: Sequences in this microbatch, empty ones included.
        denominators: Counts over the optimizer step.
        lengths_S: Tokens in the loss of each whole sequence. Counted from `mask_T` if None, summed
            over `context_group` when that is given.
        context_group: Process group (context parallelism) whose ranks hold other tokens of the
            same sequences, with the same numbers.
        logp_ref_T: log pi_ref of a frozen reference.
        entropy_T: Entropy of pi_theta over the vocabulary, in nats; with gradient for a bonus.
        keep_T: bool; a filter of the whole step (M2PO, Clip-Cov; see `Parameters.choose`). False
            drops the policy term only.
        penalised_T: bool; tokens that KL-Cov penalises, chosen over the whole step in the same way.
        uniform_T: Random numbers in [0, 1), equal on all tensor-parallel ranks (Clip-Cov without
            keep_T).
        router_shift_T: RSPO's gamma in (0, 1]; `megatron.router_shift` measures it.
        sampled_ids_T: int64 token ids; needed by `dppo_topk`, with the next three.
        topk_ids_TK: int64 ids of mu's K most likely tokens.
        topk_logp_mu_TK: log mu at those ids.
        topk_logp_theta_TK: log pi_theta at those ids; no gradient is needed.

    Raises:
        ObjectiveError: Shapes, kinds or gradients that cannot be right.
    """

    logp_theta_T: torch.Tensor
    logp_old_T: torch.Tensor
    logp_mu_T: torch.Tensor
    advantages_T: torch.Tensor
    mask_T: torch.Tensor
    sequence_T: torch.Tensor
    num_sequences: int
    denominators: Denominators
    lengths_S: torch.Tensor | None = None
    context_group: dist.ProcessGroup | None = None
    logp_ref_T: torch.Tensor | None = None
    entropy_T: torch.Tensor | None = None
    keep_T: torch.Tensor | None = None
    penalised_T: torch.Tensor | None = None
    uniform_T: torch.Tensor | None = None
    router_shift_T: torch.Tensor | None = None
    sampled_ids_T: torch.Tensor | None = None
    topk_ids_TK: torch.Tensor | None = None
    topk_logp_mu_TK: torch.Tensor | None = None
    topk_logp_theta_TK: torch.Tensor | None = None

    def __post_init__(self) -> None:
        num_tokens = self.logp_theta_T.shape[0] if self.logp_theta_T.dim() == 1 else -1
        for name, tensor in vars(self).items():
            if tensor is None or not name.endswith(("_T", "_TK", "_S")):
                continue
            expected = self.num_sequences if name.endswith("_S") else num_tokens
            if tensor.dim() != (2 if name.endswith("_TK") else 1) or tensor.shape[0] != expected:
                raise ObjectiveError(
                    f"{name} has another shape than the microbatch",
                    expected=f"{expected} rows" if num_tokens >= 0 else "logp_theta_T of shape [T]",
                    got=tuple(tensor.shape),
                    fix="Pack the sequences into one axis of tokens",
                )
        self._check_kinds()

    def _check_kinds(self) -> None:
        for name in ("mask_T", "keep_T", "penalised_T"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.dtype != torch.bool:
                raise ObjectiveError(f"{name} is not a mask", expected="bool", got=tensor.dtype)
        if self.sequence_T.dtype != torch.int64:
            raise ObjectiveError(
                "sequence_T is not an index", expected="int64", got=self.sequence_T.dtype
            )
        for name in ("logp_old_T", "logp_mu_T", "advantages_T", "logp_ref_T"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.requires_grad:
                raise ObjectiveError(
                    f"{name} carries a gradient",
                    expected="a constant: only logp_theta_T and entropy_T are differentiated",
                    fix=f"Pass {name}.detach()",
                )
        # On a GPU this would make the host wait; there an index out of range is a device assertion.
        if self.sequence_T.device.type == "cpu" and self.sequence_T.numel():
            low, high = self.sequence_T.aminmax()
            if low < 0 or high >= self.num_sequences:
                raise ObjectiveError(
                    "sequence_T names a sequence that is not there",
                    expected=f"0..{self.num_sequences - 1}",
                    got=f"{int(low)}..{int(high)}",
                )


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """All tokens of an optimizer step, over all microbatches and ranks.

    Methods that rank tokens against each other choose from them.

    Args:
        logp_theta_T: log pi_theta at the start of the step; None where the method does not look.
        logp_old_T, logp_mu_T, advantages_T: As in LossInputs.
        mask_T: bool; tokens in the loss.
        uniform_T: Random numbers in [0, 1), equal on all ranks; None where nothing is drawn.
    """

    logp_theta_T: torch.Tensor | None
    logp_old_T: torch.Tensor
    logp_mu_T: torch.Tensor
    advantages_T: torch.Tensor
    mask_T: torch.Tensor
    uniform_T: torch.Tensor | None = None

    def need(self, name: str) -> torch.Tensor:
        """Return an optional field that the method requires."""
        value = getattr(self, name)
        assert value is not None, f"{name} is None: the method does not say that it needs it"
        return value

    @property
    def counted_T(self) -> torch.Tensor:
        """In the loss and finite."""
        counted_T = self.mask_T
        for name in ("logp_theta_T", "logp_old_T", "logp_mu_T", "advantages_T"):
            if getattr(self, name) is not None:
                counted_T = counted_T & torch.isfinite(getattr(self, name))
        return counted_T


@dataclass(frozen=True, kw_only=True)
class LossOutputs:
    """What an objective returns.

    Args:
        loss: Scalar to minimise; its value means little, its gradient is the method's.
        metrics: Typed and detached, to be merged over microbatches and reduced over ranks.
        kept_T: bool; the token's policy term has a gradient: not masked, clipped or dropped.
    """

    loss: torch.Tensor
    metrics: dict[str, Metric]
    kept_T: torch.Tensor
