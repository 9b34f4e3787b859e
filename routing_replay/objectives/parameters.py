"""Parameters that every objective has, and the checks that every parameter passes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import ClassVar

import torch

from ..errors import ConfigError
from .advantages import ADVANTAGES
from .aggregation import AGGREGATIONS
from .inputs import StepTokens

_KINDS = {"str": str, "int": int, "bool": bool, "float": (int, float)}

CORRECTIONS = {
    "none": "1",
    "tis-token": "min(m, cap) per token",
    "tis-sequence": "min(product of m, cap) per sequence",
    "tis-geometric": "min(geometric mean of m, cap) per sequence",
    "mis-token": "m where m <= cap, else 0",
    "mis-sequence": "product of m where that is <= cap, else 0 for the whole sequence",
}
KL_REFERENCES = {
    "ref": "a frozen reference",
    "old": "the policy of the rollout, in the trainer",
    "mu": "the policy of the rollout, in the inference engine",
}
KL_RATIOS = {
    "none": "samples are taken as they are",
    "stopped": "weighted by (first policy of the KL) / mu, without gradient",
    "graph": "weighted by (first policy of the KL) / mu, gradient included",
}
KL_ESTIMATORS = {
    "k1": "log-ratio",
    "k2": "half the squared log-ratio",
    "k3": "ratio - 1 - log-ratio",
    "k3+": "value of k3, gradient of k2",
}
KL_DIRECTIONS = {"reverse": "KL(pi_theta || other)", "forward": "KL(other || pi_theta)"}


def parameter(default, help: str, *, source: str = "", choices=None, above=None, least=None):
    """A dataclass field that can be shown as a flag.

    Args:
        default: Its value when not given.
        help: One clause for people.
        source: Where the default comes from.
        choices: The names allowed.
        above: Values must be larger than this.
        least: Values must be at least this.
    """
    checks = {"choices": choices, "above": above, "least": least}
    return field(default=default, metadata={"help": help, "source": source, **checks})


def aggregation(default: str, source: str = ""):
    help = "what the sum over tokens is divided by"
    return parameter(default, help, source=source, choices=AGGREGATIONS)


def advantage(default: str, source: str = ""):
    help = "the advantage that the method is published with; the caller computes it"
    return parameter(default, help, source=source, choices=ADVANTAGES)


def horizon(default: int | None, source: str = ""):
    help = "constant of seq-mean-token-sum-norm; the longest allowed response if not set"
    return parameter(default, help, source=source, least=1)


def eps_low(default: float | None, source: str):
    return parameter(default, "lower clip range: 1 - eps_low", source=source, least=0)


def eps_high(default: float, source: str):
    return parameter(default, "upper clip range: 1 + eps_high", source=source, least=0)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What goes with every surrogate: aggregation, corrections, a KL term, an entropy bonus."""

    aggregation: str = aggregation("seq-mean-token-mean")
    advantage: str = advantage("group-mean-std")
    horizon: int | None = horizon(None)
    correction: str = parameter("none", "weight on the policy term from m", choices=CORRECTIONS)
    correction_cap: float = parameter(
        2.0, "cap of the correction", source="verl's TIS example", above=0
    )
    geometric_low: float | None = parameter(
        None, "drop sequences whose geometric mean of m is lower (0.999 is usual)", above=0
    )
    geometric_high: float | None = parameter(
        None, "drop sequences whose geometric mean of m is higher (1.001 is usual)", above=0
    )
    sequence_k3_max: float | None = parameter(
        None, "drop sequences whose mean k3 of m is higher (1e-3 to 1e-2 is usual)", above=0
    )
    veto_below: float | None = parameter(
        None, "drop sequences with any m below this (1e-4 is usual)", above=0
    )
    off_policy_delta: float | None = parameter(
        None,
        "drop sequences with A < 0 and mean log(anchor / pi_theta) above this (DeepSeek-V3.2)",
        least=0,
    )
    off_policy_anchor: str = parameter(
        "mu",
        "anchor of that mask; 'old' sees staleness only",
        source="DeepSeek-V3.2: the inference framework's probability",
        choices=("mu", "old"),
    )
    kl_coefficient: float = parameter(0.0, "weight of the KL term in the loss", least=0)
    kl_estimator: str = parameter("k3", "estimator of the KL term", choices=KL_ESTIMATORS)
    kl_direction: str = parameter("reverse", "which policy comes first", choices=KL_DIRECTIONS)
    kl_reference: str = parameter("ref", "the other policy of the KL term", choices=KL_REFERENCES)
    kl_ratio: str = parameter("graph", "importance ratio of the KL term", choices=KL_RATIOS)
    entropy_coefficient: float = parameter(0.0, "weight of the entropy bonus", least=0)

    # The method's own weight holds m already: correcting by m again would square it.
    has_m: ClassVar[bool] = False
    # Inputs that the method cannot do without, or that it would otherwise take from a microbatch.
    needs: ClassVar[frozenset[str]] = frozenset()
    # Whether `choose` looks at pi_theta: then a pass over the step has to come first.
    chooses_by_theta: ClassVar[bool] = False

    def choose(self, step: StepTokens) -> Mapping[str, torch.Tensor]:
        """The method's choice among all tokens of an optimizer step, by name in LossInputs."""
        return {}

    def __post_init__(self):
        if self.has_m and self.correction != "none":
            raise ConfigError(
                f"correction {self.correction!r} would count m twice",
                expected="'none': the objective weights by m or w itself",
                fix="Masks (geometric_*, veto_below, off_policy_delta) are free to combine",
            )
        for f in fields(self):
            _check(f, getattr(self, f.name))


def _check(f, value):
    kind, _, optional = f.type.partition(" | ")
    where = f"objective parameter {f.name!r}"
    if value is None and optional:
        return
    if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
        # YAML 1.1 reads 1e-4 (no dot) as text: the commonest cause.
        raise ConfigError(
            f"{where} is of the wrong kind",
            expected=f.type,
            got=repr(value),
            fix="Write numbers with a dot (1.0e-4) in YAML" if kind == "float" else None,
        )
    checks = f.metadata
    if checks["choices"] is not None and value not in checks["choices"]:
        raise ConfigError(
            f"{where} is not one of its values",
            expected=", ".join(checks["choices"]),
            got=repr(value),
        )
    bad = kind in ("int", "float") and not math.isfinite(value)
    bad = bad or (checks["above"] is not None and value <= checks["above"])
    bad = bad or (checks["least"] is not None and value < checks["least"])
    if bad:
        bound = f"> {checks['above']}" if checks["above"] is not None else f">= {checks['least']}"
        raise ConfigError(f"{where} is out of range", expected=bound, got=value)


def described(parameters: type[Parameters]) -> list[dict]:
    """Name, type, default, help, source and choices of every parameter."""
    assert all(f.default is not MISSING for f in fields(parameters))
    return [
        {
            "name": f.name,
            "type": f.type,
            "default": f.default,
            "help": f.metadata["help"],
            "source": f.metadata["source"],
            "choices": tuple(f.metadata["choices"]) if f.metadata["choices"] else None,
        }
        for f in fields(parameters)
    ]
