"""Objectives by name: what they are made of, how they are chosen, what is said about them."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from ..errors import ConfigError
from ..metrics.typed import Mean, Sum, masked_max, masked_mean
from .aggregation import aggregate
from .corrections import keep, weight
from .inputs import LossInputs, LossOutputs
from .kl import kl_term
from .parameters import Parameters, described
from .surrogate import Surrogate
from .tokens import Tokens

SECTIONS = ("Equation", "Reference", "Use", "Pitfalls")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A surrogate with its parameters; call it with LossInputs."""

    name: str
    parameters: Parameters
    surrogate: Callable[[Tokens, Parameters], Surrogate]

    @property
    def needs(self) -> frozenset[str]:
        """Optional fields of LossInputs that have to be given; chosen ones (`Parameters.choose`)
        would otherwise be of the microbatch.
        """
        p = self.parameters
        needs = set(p.needs)
        if p.kl_coefficient and p.kl_reference == "ref":
            needs.add("logp_ref_T")
        if p.entropy_coefficient:
            needs.add("entropy_T")
        return frozenset(needs)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """- policy term + kl_coefficient * KL - entropy_coefficient * entropy, aggregated alike."""
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


def _metrics(tokens: Tokens, surrogate: Surrogate, kept_T, policy_loss) -> dict:
    """Fractions are of the tokens with an advantage: without one nothing can be clipped."""
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


_REGISTRY: dict[str, tuple[type[Parameters], Callable]] = {}


def objective(parameters: type[Parameters]):
    """Decorator: the function's name becomes the objective's, its docstring the documentation."""

    def register(surrogate):
        assert surrogate.__name__ not in _REGISTRY, surrogate.__name__
        _REGISTRY[surrogate.__name__] = (parameters, surrogate)
        return surrogate

    return register


def names() -> list[str]:
    """All objectives, in the order of the documentation."""
    return list(_REGISTRY)


def parameters_of(name: str) -> type[Parameters]:
    """The frozen dataclass of an objective's parameters.

    Raises:
        ConfigError: No objective of this name; the nearest one is named.
    """
    return _find(name)[0]


def get(name: str, **parameters) -> Objective:
    """The objective `name` with its defaults, some replaced.

    Raises:
        ConfigError: An unknown objective, an unknown parameter, or a value that cannot be.
    """
    kind, surrogate = _find(name)
    known = [f.name for f in fields(kind)]
    for given in parameters:
        if given not in known:
            raise ConfigError(
                f"objective {name!r} has no parameter {given!r}",
                expected=_nearest(given, known),
                fix=f"Its parameters: {', '.join(known)}",
            )
    return Objective(name=name, parameters=kind(**parameters), surrogate=surrogate)


def _find(name):
    if name not in _REGISTRY:
        raise ConfigError(
            f"no objective is called {name!r}",
            expected=_nearest(name, names()),
            fix=f"There are: {', '.join(names())}",
        )
    return _REGISTRY[name]


def _nearest(name, known):
    # cutoff 0: a poor suggestion is still better than none, and the full list follows.
    return difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]


def table() -> list[dict]:
    """One entry per objective: name, summary, equation, reference, use, pitfalls, parameters.

    `parameters` holds name, type, default, help, source and choices of each, see `described`.
    """
    return [
        {"name": name, **_sections(surrogate), "parameters": described(kind)}
        for name, (kind, surrogate) in _REGISTRY.items()
    ]


def _sections(surrogate) -> dict[str, str]:
    """Split a docstring at its `Section:` lines; the text before the first is the summary."""
    text = inspect.getdoc(surrogate) or ""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", text, flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(found) == list(SECTIONS), f"{surrogate.__name__}: {list(found)}"
    entry = {"summary": parts[0], **{name.lower(): part for name, part in found.items()}}
    return {name: " ".join(part.split()) for name, part in entry.items()}
