"""Settings of routing replay: the same names as flags, as YAML keys, and in Python."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import ConfigError, unknown_name

MODES = ("disabled", "R2", "R3", "auto")
# Smallest and largest value. A decay of 0 would make any older route a ratio of 1: 1e-9 does.
SOFT_RANGES = (
    ("soft_ratio", 0.0, 1.0),
    ("soft_mass", 0.0, 1.0),
    ("soft_margin", 0.0, float("inf")),
    ("soft_decay", 1e-9, 1.0),
)
WEIGHTS = ("live", "frozen", "straight_through")
FLAG_PREFIX = "routing_replay_"


def setting(default: Any, help_text: str, choices: tuple[str, ...] | None = None) -> Any:
    """Return a dataclass field that can become a flag: it carries help text and choices."""
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """How `routing_replay.megatron.attach` replays and measures.

    Raises:
        ConfigError: A value is unknown or out of range.
    """

    mode: str = setting(
        "R3",
        "disabled: live routing; R2: replay the old policy's training-engine routes; R3: replay "
        "the rollout's routes; auto: by global batch / mini batch (1 disabled, 2 and 3 R2, 4+ R3), "
        "and R3 for rollouts of older weights",
        MODES,
    )
    weights: str = setting(
        "live",
        "combine weights of replayed experts. live: the trainer's router's own; frozen: the "
        "rollout's (capture level weights), and the router gets no gradient from the experts' "
        "outputs; straight_through: the rollout's, and the router gets the live weights' gradient",
        WEIGHTS,
    )
    soft_ratio: float = setting(
        0.0,
        "soft replay: a replayed expert that the live router would not choose stays if its live "
        "probability is at least this share of the weakest chosen one's; 0: always",
    )
    soft_mass: float = setting(
        0.0,
        "soft replay: such experts stay if a token's replayed ones together hold this share of the "
        "live ones' probability; 0: always",
    )
    soft_margin: float = setting(
        0.0,
        "soft replay: such experts stay if the live router's last chosen expert is at most so many "
        "nats likelier than the first left out; 0: always",
    )
    soft_decay: float = setting(
        1.0,
        "soft replay: soft_ratio r becomes r ** (soft_decay ** age), age in weight versions: the "
        "older the weights that routed a token, the stricter; 1: alike at any age",
    )
    agreement_every: int = setting(
        1, "compare live with replayed routes every N-th microbatch of a replaying pass; 0: never"
    )
    agreement_tokens: int = setting(
        512, "tokens of such a microbatch that are compared (evenly spaced); 0: all of them"
    )
    unset_router_fusion: bool = setting(
        False,
        "unset moe_router_fusion on the attached routers inside scopes (the fused kernel bypasses "
        "replay) instead of refusing to attach",
    )
    kernel: bool = setting(
        False,
        "replay in one Triton kernel in place of the router's own functions (it needs a GPU and "
        "has not run on one yet); moe_router_fusion may then stay on",
    )
    captured_routers: bool = setting(
        False,
        "replay in routers that CUDA graphs capture (moe_router, moe_preprocess), through buffers "
        "that are filled before each microbatch; it has not run on a GPU yet",
    )

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown_name("mode of routing replay", self.mode, MODES)
        if self.weights not in WEIGHTS:
            raise unknown_name("weights of routing replay", self.weights, WEIGHTS)
        if self.replays_weights and self.mode == "R2":
            raise ConfigError(
                "mode R2 replays no weights",
                expected="weights='live', or mode R3",
                got=f"weights={self.weights!r}",
                fix="R2 replays the trainer's own routes, whose weights are not recorded",
            )
        for name in ("agreement_every", "agreement_tokens"):
            require_count(name, getattr(self, name))
        self._require_soft_rule()
        self._require_uncaptured()

    @property
    def is_soft(self) -> bool:
        """Whether replayed experts may be replaced by live ones."""
        return bool(self.soft_ratio or self.soft_mass or self.soft_margin)

    def _require_soft_rule(self) -> None:
        for name, low, high in SOFT_RANGES:
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(
                    f"{name} of routing replay is out of range",
                    expected=f"{low:g} .. {high:g}",
                    got=value,
                )
        if self.soft_decay < 1 and not self.soft_ratio:
            raise ConfigError(
                "soft_decay has no ratio to change",
                expected="soft_ratio above 0",
                got=f"soft_decay={self.soft_decay}, soft_ratio=0",
            )
        if self.kernel and self.is_soft:
            raise ConfigError(
                "the replay kernel does not replay softly",
                expected="kernel without soft_ratio, soft_mass and soft_margin",
                fix="Leave `kernel` off: the torch form replays softly",
            )

    def _require_uncaptured(self) -> None:
        if self.captured_routers and (self.replays_weights or self.is_soft):
            raise ConfigError(
                "captured routers replay ids only",
                expected="weights='live' and no soft replay beside captured_routers",
                fix="Leave `captured_routers` off: a CUDA graph runs none of what these need",
            )

    @property
    def replays_weights(self) -> bool:
        return self.weights != "live"

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> ReplayConfig:
        """Read YAML keys: with or without the prefix `routing_replay_`, `-` and `_` alike.

        Raises:
            ConfigError: A key is unknown (the nearest is named), or a value cannot work.
        """
        names = [f.name for f in fields(cls)]
        plain: dict[str, Any] = {}
        for key, value in settings.items():
            name = str(key).replace("-", "_").removeprefix(FLAG_PREFIX)
            if name not in names:
                raise unknown_name("setting of routing replay", key, sorted(names))
            plain[name] = value
        return cls(**plain)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> ReplayConfig:
        """Read a YAML file.

        Raises:
            ConfigError: The file is unreadable or no mapping, or a key is unknown.
        """
        return cls.from_mapping(read_yaml(path))

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> ReplayConfig:
        """Read parsed flags (see `add_arguments`): a flag wins over the YAML file."""
        path = getattr(arguments, FLAG_PREFIX + "config", None)
        settings = dict(read_yaml(path)) if path else {}
        flags = {f.name: getattr(arguments, FLAG_PREFIX + f.name, None) for f in fields(cls)}
        return cls.from_mapping(
            settings | {name: value for name, value in flags.items() if value is not None}
        )

    def resolve(self, num_mini_batches: int, version_lag: int = 0) -> ReplayConfig:
        """Return these settings with `auto` replaced; the arguments are those of `choose_mode`."""
        if self.mode != "auto":
            return self
        return replace(self, mode=choose_mode(num_mini_batches, version_lag))


def choose_mode(num_mini_batches: int, version_lag: int = 0) -> str:
    """Return the mode that MiniRL's experiments found best for N = global batch / mini batch.

    N = 1: none (importance sampling alone was best), N = 2: R2, N = 4 and 8: R3. N = 3 was not
    run; it takes the mode of the nearest smaller N. Responses of older weights take R3 at any N:
    their gap is between mu and pi_old, and R2 replays routes of pi_old, which leave it as it is.

    Args:
        num_mini_batches: N.
        version_lag: Versions that the rollout's weights are older than those of pi_old.

    Raises:
        ConfigError: N below 1.

    Source: arXiv 2512.01374, section 4 (on-policy and off-policy training); the lag is ours.
    """
    if num_mini_batches < 1:
        raise ConfigError(
            "the number of mini-batches is out of range", expected=">= 1", got=num_mini_batches
        )
    if version_lag > 0:
        return "R3"
    if num_mini_batches == 1:
        return "disabled"
    return "R2" if num_mini_batches < 4 else "R3"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags `--routing-replay-...`; usable as Megatron's `extra_args_provider`.

    Every default is None, so that only a flag on the command line overrides the YAML file.
    """
    group = parser.add_argument_group("routing replay")
    group.add_argument(
        "--routing-replay-config", metavar="FILE.yaml", help="the same settings as YAML keys"
    )
    for f in fields(ReplayConfig):
        flag = "--" + (FLAG_PREFIX + f.name).replace("_", "-")
        help_text = f"{f.metadata['help']} (default: {f.default})"
        if isinstance(f.default, bool):
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, action=action, default=None, help=help_text)
        else:
            choices = f.metadata["choices"]
            group.add_argument(flag, type=type(f.default), choices=choices, help=help_text)
    return parser


def require_count(name: str, value: object) -> None:
    """Raise ConfigError unless a setting is an integer >= 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(
            f"{name} of routing replay is out of range",
            expected="an integer >= 0",
            got=repr(value),
        )


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a YAML file's mapping; an empty file is an empty mapping.

    Raises:
        ConfigError: Unreadable, malformed, or not a mapping.
    """
    import yaml  # optional: part of the recipe and megatron environments, not of the core

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("the configuration cannot be read", got=error, where=path) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            "the configuration is no mapping", expected="key: value", got=content, where=path
        )
    return content
