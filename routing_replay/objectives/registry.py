"""Objectives by name: how a loss is built, chosen and documented."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..errors import unknown_name
from ..metrics.typed import Mean, Metric, Sum, masked_max, masked_mean
from .aggregation import aggregate
from .corrections import keep, weight
from .inputs import LossInputs, LossOutputs
from .kl import kl_term
from .parameters import Parameters, described
from .surrogate import Surrogate
from .tokens import Tokens

# Any: a method's surrogate takes its own subclass of Parameters.
SurrogateFunction = Callable[[Tokens, Any], Surrogate]
SECTIONS = ("Equation", "Reference", "Use", "Pitfalls")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A surrogate with its parameters; call it with LossInputs."""

    name: str
    parameters: Parameters
    surrogate: SurrogateFunction

    @property
    def needs(self) -> frozenset[str]:
        """Optional fields of LossInputs that the caller must give.

        Without its choice over the step (`Parameters.choose`) a method chooses within the
        microbatch.
        """
        p = self.parameters
        needs = set(p.needs)
        if p.kl_coefficient and p.kl_reference == "ref":
            needs.add("logp_ref_T")
        if p.entropy_coefficient:
            needs.add("entropy_T")
        return frozenset(needs)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Return - policy term + kl_coefficient * KL - entropy_coefficient * entropy.

        All three terms are aggregated alike.
        """
        p, tokens = self.parameters, Tokens(inputs)
        surrogate = self.surrogate(tokens, p)
        kept_T = surrogate.kept_T & keep(tokens, p) & tokens.counted_T
        weighted_T = surrogate.value_T * weight(tokens, p)
        # A clipped surrogate keeps its value and has no gradient; a dropped token has neither.
        dropped_T = ~(keep(tokens, p) & tokens.counted_T)
        policy_T = torch.where(dropped_T, torch.zeros_like(weighted_T), weighted_T)
        loss = -aggregate(policy_T, tokens, p.aggregation, p.horizon)
        metrics = _metrics(tokens, surrogate, kept_T, loss)
        if p.kl_coefficient:
            kl_T = tokens.safe(kl_term(tokens, p))
            loss = loss + p.kl_coefficient * aggregate(kl_T, tokens, p.aggregation, p.horizon)
            metrics[f"objective/kl_{p.kl_reference}"] = masked_mean(kl_T, tokens.counted_T)
        if p.entropy_coefficient:
            entropy_T = tokens.safe(tokens.need("entropy_T"))
            bonus = aggregate(entropy_T, tokens, p.aggregation, p.horizon)
            loss = loss - p.entropy_coefficient * bonus
        if inputs.entropy_T is not None:
            metrics["objective/entropy"] = masked_mean(inputs.entropy_T, inputs.mask_T)
        metrics["objective/loss"] = Sum(total=loss.detach().double())
        return LossOutputs(loss=loss, metrics=metrics, kept_T=kept_T)


def _metrics(
    tokens: Tokens, surrogate: Surrogate, kept_T: torch.Tensor, policy_loss: torch.Tensor
) -> dict[str, Metric]:
    """Count fractions over the tokens with an advantage: without one nothing can be clipped."""
    signal_T = tokens.counted_T & (tokens.advantages_T != 0)
    nonfinite_T = tokens.inputs.mask_T & ~tokens.finite_T
    # .double() before the product: counts of tokens exceed what float32 can count.
    clipped_T = (tokens.counted_T & ~surrogate.kept_T).double()
    dropped_T = (surrogate.kept_T & ~kept_T).double()
    return {
        "objective/policy_loss": Sum(total=policy_loss.detach().double()),
        "objective/clip_fraction": masked_mean(clipped_T, signal_T),
        "objective/drop_fraction": masked_mean(dropped_T, signal_T),
        "objective/weight_mean": masked_mean(surrogate.weight_T, kept_T & signal_T),
        "objective/weight_max": masked_max(surrogate.weight_T, kept_T & signal_T),
        "objective/advantage_abs": masked_mean(tokens.advantages_T.abs(), tokens.counted_T),
        "objective/signal_fraction": Mean(
            total=signal_T.sum().double(), count=tokens.inputs.mask_T.sum().double()
        ),
        "objective/nonfinite_tokens": Sum(total=nonfinite_T.sum().double()),
    }


_METHODS: dict[str, tuple[type[Parameters], SurrogateFunction]] = {}
_PRESETS: dict[str, Preset] = {}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A method with some parameters set, under the name by which it is known.

    Args:
        name: The preset's name; `get` takes it like a method's.
        method: The method.
        parameters: What differs from the method's defaults.
        summary: What it is.
        reference: Where it is from.
        use: When to use it.
        pitfalls: What goes wrong.
    """

    name: str
    method: str
    parameters: Mapping[str, object]
    summary: str
    reference: str
    use: str
    pitfalls: str


def objective(parameters: type[Any]) -> Callable[[SurrogateFunction], SurrogateFunction]:
    """Register a surrogate: its name becomes the method's, its docstring the documentation."""

    def register(surrogate: SurrogateFunction) -> SurrogateFunction:
        _METHODS[surrogate.__name__] = (parameters, surrogate)
        return surrogate

    return register


def preset(**entry: Any) -> None:
    """Register a preset of a registered method; the arguments are those of `Preset`."""
    assert entry["method"] in _METHODS, entry["method"]
    _PRESETS[entry["name"]] = Preset(**entry)


def methods() -> list[str]:
    """Return the names of the losses, in the order of the documentation."""
    return list(_METHODS)


def presets() -> list[Preset]:
    """Return the presets: a loss with other parameters, under a name of its own."""
    return list(_PRESETS.values())


def names() -> list[str]:
    """Return every name that `get` takes: methods, then presets."""
    return [*_METHODS, *_PRESETS]


def parameters_of(name: str) -> type[Parameters]:
    """Return the frozen dataclass of the parameters of a method, or of a preset's method.

    Raises:
        ConfigError: No objective has this name; all names are listed.
    """
    return _METHODS[_method(name)][0]


def get(name: str, **parameters: object) -> Objective:
    """Return the objective `name` with its defaults, some replaced.

    Args:
        name: A method or a preset.
        parameters: Fields of `parameters_of(name)`.

    Raises:
        ConfigError: An unknown objective, an unknown parameter, or a value that cannot be.
    """
    kind, surrogate = _METHODS[_method(name)]
    known = [f.name for f in fields(kind)]
    for parameter in parameters:
        if parameter not in known:
            raise unknown_name(f"parameter of objective {name!r}", parameter, known)
    # A preset replaces defaults, and the caller's parameters replace the preset's.
    values: dict[str, Any] = dict(_PRESETS[name].parameters) if name in _PRESETS else {}
    return Objective(name=name, parameters=kind(**values | parameters), surrogate=surrogate)


def _method(name: str) -> str:
    if name in _PRESETS:
        return _PRESETS[name].method
    if name not in _METHODS:
        raise unknown_name("objective", name, names())
    return name


def table() -> list[dict[str, Any]]:
    """Return one entry per method: name, summary, equation, reference, use, pitfalls, parameters.

    `parameters` holds name, type, default, help, source and choices of each, see `described`.
    """
    return [
        {"name": name, **_sections(surrogate), "parameters": described(kind)}
        for name, (kind, surrogate) in _METHODS.items()
    ]


def _sections(surrogate: SurrogateFunction) -> dict[str, str]:
    """Split a docstring at its `Section:` lines; the text before the first is the summary."""
    text = inspect.getdoc(surrogate) or ""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(sections) == list(SECTIONS), f"{surrogate.__name__}: {list(sections)}"
    entry = {"summary": parts[0], **{name.lower(): part for name, part in sections.items()}}
    return {name: " ".join(part.split()) for name, part in entry.items()}
