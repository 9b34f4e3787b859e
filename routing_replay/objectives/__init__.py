"""Losses for reinforcement learning with verifiable rewards, chosen by name.

    objective = objectives.get("minirl", cap=5.0)
    outputs = objective(LossInputs(...))        # outputs.loss, outputs.metrics

`names()` lists them, `parameters_of(name)` is the frozen dataclass of a method's parameters,
`table()` says for each what it computes, where it is from, when to use it and what goes wrong.
"""

# Importing registers the objectives, in the order of the documentation.
from . import minirl, ppo, token_level, sequence_level, divergence, masks  # noqa: F401, I001
from .advantages import (
    ADVANTAGES,
    advantages,
    batch_norm,
    differential_smoothing,
    gae,
    group_mean,
    group_mean_std,
    informative_groups,
    leave_one_out,
    overlong_penalty,
    spread_over_tokens,
)
from .aggregation import AGGREGATIONS
from .documentation import help_text
from .inputs import Denominators, LossInputs, LossOutputs, StepTokens
from .kl import reward_penalty
from .parameters import Parameters
from .masks import second_moment_mask, token_covariance
from .registry import Objective, get, names, parameters_of, table
from .sequence_level import router_shift

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "Denominators",
    "LossInputs",
    "LossOutputs",
    "Objective",
    "Parameters",
    "StepTokens",
    "advantages",
    "batch_norm",
    "differential_smoothing",
    "gae",
    "get",
    "group_mean",
    "group_mean_std",
    "help_text",
    "informative_groups",
    "leave_one_out",
    "names",
    "overlong_penalty",
    "parameters_of",
    "reward_penalty",
    "router_shift",
    "second_moment_mask",
    "spread_over_tokens",
    "table",
    "token_covariance",
]
