"""Settings of routing replay: the same names as flags, as YAML keys, and in Python."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import ConfigError

MODES = ("disabled", "R2", "R3", "auto")
CAPTURES = ("ids", "gates", "logits")
SINKS = ("jsonl", "tensorboard", "wandb", "megatron")
FLAG_PREFIX = "routing_replay_"


def setting(default, help_text: str, choices: tuple[str, ...] | None = None):
    """A dataclass field that can be a flag: its help and choices ride along."""
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """How routes are captured, replayed and measured.

    Raises:
        ConfigError: A value that cannot work.
    """

    mode: str = setting(
        "R3",
        "disabled: live routing; R2: replay the old policy's training-engine routes; R3: replay "
        "the rollout's routes; auto: by global batch / mini batch (1 disabled, 2 and 3 R2, 4+ R3)",
        MODES,
    )
    capture: str = setting(
        "gates",
        "what the rollout engine returns per token and layer: expert ids; ids and gate "
        "probabilities; these and the full router logits of a sample of tokens",
        CAPTURES,
    )
    agreement_every: int = setting(
        1, "compare live with replayed routes every N-th microbatch of a replaying pass; 0: never"
    )
    agreement_tokens: int = setting(
        512, "tokens of such a microbatch that are compared (evenly spaced); 0: all of them"
    )
    unset_router_fusion: bool = setting(
        False,
        "unset moe_router_fusion on the attached routers (the fused kernel bypasses replay) "
        "instead of refusing to attach",
    )
    sinks: tuple[str, ...] = setting(
        ("jsonl", "tensorboard"),
        "where metrics go; megatron: the writers that Megatron has opened",
        SINKS,
    )
    metrics_dir: str = setting(
        "", "folder of metrics.jsonl and tensorboard/; the run's own, or routing_replay_metrics"
    )
    heat_map_every: int = setting(
        0, "write heat maps of layers over steps to the sinks every N-th step; 0: none"
    )

    def __post_init__(self):
        for name, choices in (("mode", MODES), ("capture", CAPTURES)):
            if getattr(self, name) not in choices:
                raise unknown_name(f"{name} of routing replay", getattr(self, name), choices)
        for sink in self.sinks:
            if sink not in SINKS:
                raise unknown_name("sink of routing replay", sink, SINKS)
        for name in ("agreement_every", "agreement_tokens", "heat_map_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(
                    f"{name} of routing replay", expected="an integer >= 0", got=repr(value)
                )

    @classmethod
    def from_mapping(cls, settings: Mapping) -> ReplayConfig:
        """From YAML keys: with or without the prefix `routing_replay_`, `-` and `_` alike."""
        known = {f.name for f in fields(cls)}
        plain: dict[str, Any] = {}
        for key, value in settings.items():
            name = str(key).replace("-", "_").removeprefix(FLAG_PREFIX)
            if name not in known:
                raise unknown_name("setting of routing replay", key, sorted(known))
            plain[name] = tuple(value) if isinstance(value, list) else value
        return cls(**plain)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike) -> ReplayConfig:
        """From a YAML file.

        Raises:
            ConfigError: Unreadable, not a mapping, or an unknown key (the nearest is named).
        """
        return cls.from_mapping(read_yaml(path))

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> ReplayConfig:
        """From parsed flags (see `add_arguments`): a flag wins over the YAML file."""
        path = getattr(arguments, FLAG_PREFIX + "config", None)
        settings = dict(read_yaml(path)) if path else {}
        given = {f.name: getattr(arguments, FLAG_PREFIX + f.name, None) for f in fields(cls)}
        return cls.from_mapping(
            settings | {name: value for name, value in given.items() if value is not None}
        )

    def resolve(self, num_mini_batches: int) -> ReplayConfig:
        """These settings with `auto` replaced by the mode that N mini-batches call for."""
        if self.mode != "auto":
            return self
        return replace(self, mode=choose_mode(num_mini_batches))


def choose_mode(num_mini_batches: int) -> str:
    """The replay mode that MiniRL's experiments found best for N = global batch / mini batch.

    N = 1: none (importance sampling alone was best), N = 2: R2, N = 4 and 8: R3. N = 3 was not
    run; it takes the mode of the nearest smaller N.

    Raises:
        ConfigError: N below 1.

    Source: arXiv 2512.01374, section 4 (on-policy and off-policy training).
    """
    if num_mini_batches < 1:
        raise ConfigError("mini-batches per global batch", expected=">= 1", got=num_mini_batches)
    if num_mini_batches == 1:
        return "disabled"
    return "R2" if num_mini_batches < 4 else "R3"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags `--routing-replay-...`; usable as Megatron's `extra_args_provider`.

    All default to None, so that a value in the YAML file is only overridden by a flag that was
    really given.
    """
    group = parser.add_argument_group("routing replay")
    group.add_argument(
        "--routing-replay-config", metavar="FILE.yaml", help="the same settings as YAML keys"
    )
    for f in fields(ReplayConfig):
        flag = "--" + (FLAG_PREFIX + f.name).replace("_", "-")
        default = " ".join(f.default) if isinstance(f.default, tuple) else f.default
        help_text = f.metadata["help"] + ("" if default == "" else f" (default: {default})")
        choices = f.metadata["choices"]
        if isinstance(f.default, bool):
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, action=action, default=None, help=help_text)
        elif isinstance(f.default, tuple):
            group.add_argument(flag, nargs="+", choices=choices, help=help_text)
        else:
            group.add_argument(flag, type=type(f.default), choices=choices, help=help_text)
    return parser


def read_yaml(path: str | os.PathLike) -> dict:
    """A YAML file's mapping; an empty file is an empty mapping.

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
            "a configuration is a mapping", expected="key: value", got=content, where=path
        )
    return content


def unknown_name(kind: str, name, known) -> ConfigError:
    """The error for a name that does not exist: it names the nearest one that does."""
    nearest = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.4)
    fix = f"Did you mean {nearest[0]!r}?" if nearest else None
    known_text = ", ".join(str(k) for k in known)
    return ConfigError(f"unknown {kind}", expected=f"one of {known_text}", got=repr(name), fix=fix)
