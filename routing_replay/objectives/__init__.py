"""Losses for reinforcement learning with verifiable rewards, chosen by name.

    objective = objectives.get("minirl", cap=5.0)
    outputs = objective(LossInputs(...))        # outputs.loss, outputs.metrics

`names()` lists them, `parameters_of(name)` is the frozen dataclass of a method's parameters,
`table()` and `presets()` say for each what it computes, where it is from, when to use it and what
goes wrong.
"""

# Importing registers the methods, in the order of the documentation, then the presets.
from . import minirl, ppo, token_level, sequence_level, divergence, masks, variants  # noqa: F401, I001
from .advantages import advantages, differential_smoothing, informative_groups, overlong_penalty
from .help import help_text
from .inputs import Denominators, LossInputs, LossOutputs, StepTokens
from .kl import reward_penalty
from .logprobs import Support, TokenScores, logprobs_at, token_logprobs
from .parameters import Parameters
from .registry import Objective, Preset, get, methods, names, parameters_of, presets, table

__all__ = [
    "Denominators",
    "LossInputs",
    "LossOutputs",
    "Objective",
    "Parameters",
    "Preset",
    "StepTokens",
    "Support",
    "TokenScores",
    "advantages",
    "differential_smoothing",
    "get",
    "help_text",
    "informative_groups",
    "logprobs_at",
    "methods",
    "names",
    "overlong_penalty",
    "parameters_of",
    "presets",
    "reward_penalty",
    "table",
    "token_logprobs",
]
