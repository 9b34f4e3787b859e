"""Settings of an adapter: flags of the launcher, or environment variables where no flag gets by."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..config import ReplayConfig
from ..errors import ConfigError, unknown_name

MODES = ("disabled", "R2", "R3")
PREFIX = "ROUTING_REPLAY_"


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """What an adapter is told.

    Raises:
        ConfigError: A value that cannot work.
    """

    mode: str = _setting(
        "R3", "R3: the rollout's routes; R2: those of the old policy's pass; disabled: live"
    )
    routes: str = _setting(
        "",
        "table of routes with token ids (RouteTable.save); {step} in the name stands for the "
        "loop's 0-based iteration; without it one file serves all steps",
    )
    agreement_every: int = _setting(1, "compare live with replayed routes every N-th microbatch")
    agreement_tokens: int = _setting(512, "tokens of such a microbatch that are compared")
    max_uncovered: float = _setting(
        1.0,
        "largest fraction of a pass's rows that may be without routes, rows that were left out on "
        "purpose apart; above it the pass ends with the causes",
    )
    metrics_dir: str = _setting("", "folder of metrics.jsonl; Megatron's writers get them anyway")

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown_name("mode of routing replay", self.mode, MODES)
        if not 0 <= self.max_uncovered <= 1:
            raise ConfigError(
                "max_uncovered is out of range", expected="0..1", got=self.max_uncovered
            )

    @property
    def is_enabled(self) -> bool:
        return self.mode != "disabled"

    def require_routes_file(self) -> None:
        """Raise ConfigError unless a loop without rollouts and old-policy passes can replay."""
        if self.mode == "R2":
            raise ConfigError(
                "R2 needs a loop with an old-policy pass: this one has none",
                expected="R3 or disabled",
                got="R2",
            )
        if self.is_enabled and not self.routes:
            raise ConfigError(
                "no routes are named",
                expected="--routing-replay-routes FILE, or ROUTING_REPLAY_ROUTES=FILE",
                got="none",
                fix="Name the file that RouteTable.save wrote, or set the mode to disabled",
            )

    @property
    def replay_config(self) -> ReplayConfig:
        return ReplayConfig(
            mode=self.mode,
            agreement_every=self.agreement_every,
            agreement_tokens=self.agreement_tokens,
        )

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] = os.environ, *, mode: str = "R3"
    ) -> AdapterSettings:
        """Read ROUTING_REPLAY_MODE, ROUTING_REPLAY_ROUTES, ... once.

        Args:
            environment: The variables.
            mode: Without ROUTING_REPLAY_MODE: "disabled" where an adapter loads without being
                asked for.
        """
        texts = {f.name: environment.get(PREFIX + f.name.upper()) for f in fields(cls)}
        named = {name: text for name, text in texts.items() if text is not None}
        return cls._from_texts({"mode": mode} | named)

    @classmethod
    def from_mapping(
        cls, settings: Mapping[str, Any], environment: Mapping[str, str] = os.environ
    ) -> AdapterSettings:
        """Read the keys `routing_replay_...` of a framework's configuration; others are not ours.

        A key wins over the environment's variable.

        Raises:
            ConfigError: A key `routing_replay_...` that is no setting, or a value that cannot work.
        """
        names = [f.name for f in fields(cls)]
        prefix = PREFIX.lower()
        texts = {
            n: environment[PREFIX + n.upper()] for n in names if PREFIX + n.upper() in environment
        }
        for key, value in settings.items():
            if not key.startswith(prefix):
                continue
            name = key.removeprefix(prefix)
            if name not in names:
                raise unknown_name("setting of routing replay", key, [prefix + n for n in names])
            texts[name] = str(value)
        return cls._from_texts(texts)

    @classmethod
    def from_arguments(
        cls, arguments: Sequence[str], environment: Mapping[str, str] = os.environ
    ) -> tuple[AdapterSettings, list[str]]:
        """Take the flags `--routing-replay-...` out of a command line; a flag wins over a variable.

        Returns:
            The settings, and the arguments that are left for the framework.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for f in fields(cls):
            default = environment.get(PREFIX + f.name.upper())
            flag = "--routing-replay-" + f.name.replace("_", "-")
            parser.add_argument(flag, dest=f.name, default=default, help=f.metadata["help"])
        known, rest = parser.parse_known_args(arguments)
        texts = {name: text for name, text in vars(known).items() if text is not None}
        return cls._from_texts(texts), rest

    @classmethod
    def _from_texts(cls, texts: Mapping[str, str]) -> AdapterSettings:
        values: dict[str, str | int | float] = {}
        for f in fields(cls):
            if f.name not in texts:
                continue
            values[f.name] = texts[f.name]
            if isinstance(f.default, int):
                values[f.name] = _integer(f.name, texts[f.name])
            if isinstance(f.default, float):
                values[f.name] = _fraction(f.name, texts[f.name])
        return cls(**values)  # type: ignore[arg-type]


def _fraction(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(
            f"{name} is not a number", expected="a fraction, 0..1", got=repr(text)
        ) from error


def _integer(name: str, text: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"{name} is not a count", expected="an integer >= 0", got=repr(text))
    return int(text)
