"""Advantages and reward shaping, once per step, on whole sequences."""

from __future__ import annotations

import torch

from ..errors import ObjectiveError, unknown_name

# Keeps a division by the standard deviation finite; verl's value.
STD_EPS = 1e-6

ADVANTAGES = {
    "group-mean": "reward - mean of the group",
    "group-mean-std": "(reward - mean of the group) / (standard deviation of the group + 1e-6)",
    "leave-one-out": "reward - mean of the others in the group",
    "batch-norm": "(reward - mean of the batch) / (standard deviation of the batch + 1e-6)",
}


def group_mean(rewards_S: torch.Tensor, group_S: torch.Tensor) -> torch.Tensor:
    """Return A = R - mean over the group.

    Groups are named by any integers, in any order. A group of one or of equal rewards gets 0.

    Source: MiniRL (2512.01374) section 2; Dr.GRPO (2503.20783).
    """
    return _Groups(rewards_S, group_S).centred_S


def group_mean_std(rewards_S: torch.Tensor, group_S: torch.Tensor) -> torch.Tensor:
    """Return A = (R - mean) / (std + 1e-6) over the group.

    The std has Bessel's correction, as verl computes it. Groups of one or of equal rewards get
    exactly 0. Pitfall: groups with nearly equal rewards are amplified (Dr.GRPO's "difficulty
    bias").

    Source: GRPO (2402.03300) section 4.1.2.
    """
    groups = _Groups(rewards_S, group_S)
    variance_G = groups.sum_G(groups.centred_S**2) / (groups.size_G - 1).clamp(min=1)
    return groups.centred_S / (variance_G.sqrt() + STD_EPS)[groups.index_S]


def leave_one_out(rewards_S: torch.Tensor, group_S: torch.Tensor) -> torch.Tensor:
    """Return A = R - mean of the other members; 0 in a group of one.

    This is n / (n - 1) * (R - mean).

    The baseline is independent of the response, so the gradient is unbiased.

    Source: RLOO (2402.14740).
    """
    groups = _Groups(rewards_S, group_S)
    factor_G = groups.size_G / (groups.size_G - 1).clamp(min=1)
    return groups.centred_S * factor_G[groups.index_S]


def batch_norm(rewards_S: torch.Tensor, group_S: torch.Tensor | None = None) -> torch.Tensor:
    """Return A = (R - mean) / (std + 1e-6) over the batch, whatever the groups."""
    everyone_S = torch.zeros_like(rewards_S, dtype=torch.int64)
    return group_mean_std(rewards_S, everyone_S)


def advantages(name: str, rewards_S: torch.Tensor, group_S: torch.Tensor) -> torch.Tensor:
    """Return the advantage of each sequence by its name in ADVANTAGES.

    Raises:
        ConfigError: An unknown name.
        ObjectiveError: Rewards that are not finite, or shapes that differ.
    """
    functions = {
        "group-mean": group_mean,
        "group-mean-std": group_mean_std,
        "leave-one-out": leave_one_out,
        "batch-norm": batch_norm,
    }
    if name not in functions:
        raise unknown_name("advantage", name, functions)
    return functions[name](rewards_S, group_S)


class _Groups:
    """Rewards by group."""

    def __init__(self, rewards_S: torch.Tensor, group_S: torch.Tensor) -> None:
        if rewards_S.shape != group_S.shape or rewards_S.dim() != 1:
            raise ObjectiveError(
                "rewards and groups do not match",
                expected="two vectors of one length",
                got=f"{tuple(rewards_S.shape)} and {tuple(group_S.shape)}",
            )
        if not torch.isfinite(rewards_S).all():
            raise ObjectiveError(
                "a reward is not finite",
                where=f"sequences {torch.nonzero(~torch.isfinite(rewards_S)).flatten().tolist()}",
                fix="Give a response without a verdict the reward of a wrong one, or leave it out",
            )
        _, self.index_S = torch.unique(group_S, return_inverse=True)
        self.num_groups = int(self.index_S.max()) + 1 if len(group_S) else 0
        self.size_G = self.sum_G(torch.ones_like(rewards_S))
        centred_S = rewards_S - (self.sum_G(rewards_S) / self.size_G)[self.index_S]
        # A mean of equal numbers need not equal them exactly, and a std would blow that up.
        self.equal_S = (self.extreme_G(rewards_S, "amax") == self.extreme_G(rewards_S, "amin"))[
            self.index_S
        ]
        self.centred_S = torch.where(self.equal_S, torch.zeros_like(centred_S), centred_S)

    def sum_G(self, values_S: torch.Tensor) -> torch.Tensor:
        return values_S.new_zeros(self.num_groups).index_add(0, self.index_S, values_S)

    def extreme_G(self, values_S: torch.Tensor, which: str) -> torch.Tensor:
        empty_G = values_S.new_zeros(self.num_groups)
        return empty_G.scatter_reduce(0, self.index_S, values_S, which, include_self=False)


def informative_groups(rewards_S: torch.Tensor, group_S: torch.Tensor) -> torch.Tensor:
    """Return which sequences have an advantage, because the rewards of their group differ.

    DAPO's dynamic sampling keeps these groups and samples on until the batch is full. For rewards
    of 0 and 1 the condition is 0 < number correct < group size.

    Source: DAPO (2503.14476) equation 11.
    """
    return ~_Groups(rewards_S, group_S).equal_S


def overlong_penalty(lengths_S: torch.Tensor, max_length: int, cache: int) -> torch.Tensor:
    """Return DAPO's soft penalty for long responses, to be added to the reward.

    0 up to max_length - cache, from there falling linearly to -1 at max_length, -1 beyond.

    Args:
        lengths_S: Tokens of each response.
        max_length: Where the penalty is full; DAPO prints 20,480.
        cache: Length of the slope; DAPO prints 4,096.

    Source: DAPO (2503.14476) equation 13.
    """
    if not 0 < cache <= max_length:
        raise ObjectiveError("overlong shaping has no slope", expected="0 < cache <= max_length")
    free = max_length - cache
    return ((free - lengths_S.double()) / cache).clamp(-1.0, 0.0)


def differential_smoothing(
    advantages_S: torch.Tensor,
    sequence_logp_old_S: torch.Tensor,
    correct_S: torch.Tensor,
    *,
    gamma_correct: float,
    gamma_wrong: float,
) -> torch.Tensor:
    """Return A - gamma_correct * log pi_old(y|x) if correct, else A + gamma_wrong * the same.

    Rare correct answers gain, common wrong ones lose. No published default of the gammas was found.

    Source: 2511.19942, as implemented publicly; the theory puts the base model into the reward.
    """
    logp_S = sequence_logp_old_S.detach()
    return advantages_S + torch.where(correct_S, -gamma_correct * logp_S, gamma_wrong * logp_S)
