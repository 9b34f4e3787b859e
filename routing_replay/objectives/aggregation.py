"""From one value per token to the loss of a step, with denominators of the whole step."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from .tokens import Tokens

# verl's names. What is summed over tokens, and what the sum is divided by:
AGGREGATIONS = {
    "token-mean": "sum over all tokens / tokens of the step",
    "seq-mean-token-sum": "sum over all tokens / sequences of the step",
    "seq-mean-token-mean": "sum over sequences of their token means / sequences of the step",
    "seq-mean-token-sum-norm": "sum over all tokens / (sequences of the step * horizon)",
}


def aggregate(
    values_T: torch.Tensor, tokens: Tokens, how: str, horizon: int | None = None
) -> torch.Tensor:
    """Return this microbatch's share of the step's value.

    Shares add up over microbatches and over ranks.

    Args:
        values_T: One value per token, 0 where it does not count.
        tokens: Structure and denominators. A dropped token stays in its denominator, so dropping
            never enlarges the other tokens' weight.
        how: One of AGGREGATIONS.
        horizon: The constant of `seq-mean-token-sum-norm`; the denominators' `max_length` if None.

    Raises:
        ConfigError: The constant is needed, and neither `horizon` nor `max_length` is set.
    """
    over = tokens.inputs.denominators
    if how == "seq-mean-token-mean":
        values_T = values_T / tokens.spread(tokens.lengths_S)
    total = values_T.sum()
    if how == "token-mean":
        return total / max(over.num_tokens, 1)
    mean = total / max(over.num_sequences, 1)
    if how != "seq-mean-token-sum-norm":
        return mean
    horizon = horizon or over.max_length
    if horizon is None:
        raise ConfigError(
            "aggregation 'seq-mean-token-sum-norm' has no constant to divide by",
            expected="parameter horizon, or Denominators.max_length",
            fix="Set horizon to the longest response that the rollout allows",
        )
    return mean / horizon
