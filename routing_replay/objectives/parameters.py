"""Parameters that every objective has, and the checks that every parameter passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar, get_args, get_type_hints

import torch

from ..errors import ConfigError
from .advantages import ADVANTAGES
from .aggregation import AGGREGATIONS
from .inputs import StepTokens

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


def parameter(
    default: Any,
    help: str,
    *,
    source: str = "",
    choices: Iterable[str] | None = None,
    above: float | None = None,
    least: float | None = None,
) -> Any:
    """Return a dataclass field that can be shown as a flag.

    Args:
        default: Its value when not given.
        help: One clause that says what it does.
        source: Where the default comes from.
        choices: The names allowed.
        above: Values must be larger than this.
        least: Values must be at least this.
    """
    checks = {"choices": choices, "above": above, "least": least}
    return field(default=default, metadata={"help": help, "source": source, **checks})


def aggregation(default: str, source: str = "") -> Any:
    help = "what the sum over tokens is divided by"
    return parameter(default, help, source=source, choices=AGGREGATIONS)


def advantage(default: str, source: str = "") -> Any:
    help = "the advantage that the method is published with; the caller computes it"
    return parameter(default, help, source=source, choices=ADVANTAGES)


def horizon(default: int | None, source: str = "") -> Any:
    help = "constant of seq-mean-token-sum-norm; the longest allowed response if not set"
    return parameter(default, help, source=source, least=1)


def eps_low(default: float | None, source: str) -> Any:
    return parameter(default, "lower clip range: 1 - eps_low", source=source, least=0)


def eps_high(default: float, source: str) -> Any:
    return parameter(default, "upper clip range: 1 + eps_high", source=source, least=0)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters of every method: aggregation, corrections, a KL term, an entropy bonus."""

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
        """Return the method's choice among all tokens of a step, by name in LossInputs."""
        return {}

    @property
    def needs_mu(self) -> bool:
        """Whether the loss compares with the sampling distribution mu, its KL term aside."""
        return self.has_m or self.correction != "none" or self.has_bound_of_m

    @property
    def has_bound_of_m(self) -> bool:
        """Whether tokens or sequences are dropped by their distance from mu."""
        bounds = (
            self.geometric_low,
            self.geometric_high,
            self.sequence_k3_max,
            self.veto_below,
            self.off_policy_delta if self.off_policy_anchor == "mu" else None,
        )
        return any(bound is not None for bound in bounds)

    def __post_init__(self) -> None:
        if self.has_m and self.correction != "none":
            raise ConfigError(
                f"correction {self.correction!r} would count m twice",
                expected="'none': the objective weights by m or w itself",
                fix="Masks (geometric_*, veto_below, off_policy_delta) are free to combine",
            )
        kinds = _kinds(type(self))
        for f in fields(self):
            _check(f, kinds[f.name], getattr(self, f.name))


def _kinds(parameters: type[Parameters]) -> dict[str, tuple[type, ...]]:
    """Return the types that each parameter may have; NoneType for an optional one."""
    hints = get_type_hints(parameters)
    return {f.name: get_args(hints[f.name]) or (hints[f.name],) for f in fields(parameters)}


def _is_kind(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _kind_text(kinds: tuple[type, ...]) -> str:
    return " | ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)


def _check(f: Field[Any], kinds: tuple[type, ...], value: Any) -> None:
    where = f"objective parameter {f.name!r}"
    if not any(_is_kind(value, kind) for kind in kinds):
        # YAML 1.1 reads 1e-4 (no dot) as text: the commonest cause.
        raise ConfigError(
            f"{where} is of the wrong kind",
            expected=_kind_text(kinds),
            got=repr(value),
            fix="Write numbers with a dot (1.0e-4) in YAML" if float in kinds else None,
        )
    if value is None:
        return
    choices, above, least = (f.metadata[name] for name in ("choices", "above", "least"))
    if choices is not None and value not in choices:
        raise ConfigError(
            f"{where} is not one of its values", expected=", ".join(choices), got=repr(value)
        )
    is_number = isinstance(value, int | float)
    is_out = is_number and not math.isfinite(value)
    is_out |= above is not None and value <= above
    is_out |= least is not None and value < least
    if is_out:
        bound = "a finite number" if above is least is None else None
        bound = bound or (f"> {above}" if above is not None else f">= {least}")
        raise ConfigError(f"{where} is out of range", expected=bound, got=value)


def described(parameters: type[Parameters]) -> list[dict[str, Any]]:
    """Return name, type, default, help, source and choices of every parameter."""
    kinds = _kinds(parameters)
    return [
        {
            "name": f.name,
            "type": _kind_text(kinds[f.name]),
            "default": f.default,
            "help": f.metadata["help"],
            "source": f.metadata["source"],
            "choices": tuple(f.metadata["choices"]) if f.metadata["choices"] else None,
        }
        for f in fields(parameters)
    ]
