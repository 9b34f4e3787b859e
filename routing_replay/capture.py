"""What the capture inside a server is told when the server starts.

SGLang's plugins can be configured by environment variables only; these are read once, when the
plugin registers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError

CAPTURES = ("off", "stock", "ids", "gates", "logits")
OURS = ("ids", "gates", "logits")
LEVEL_VARIABLE = "ROUTING_REPLAY_CAPTURE"
FRACTION_VARIABLE = "ROUTING_REPLAY_LOGIT_FRACTION"
# The name under which a request carries its level, in SGLang's `custom_params`.
REQUEST_KEY = "routing_replay"


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """The most that requests of this server can ask for.

    Args:
        level: One of `CAPTURES`; "off" and "stock" leave SGLang as it is.
        logit_fraction: Fraction of tokens whose full router logits are kept, for "logits".

    Raises:
        ConfigError: An unknown level or a fraction outside (0, 1].
    """

    level: str = "ids"
    logit_fraction: float = 0.05

    def __post_init__(self):
        if self.level not in CAPTURES:
            raise ConfigError("capture", expected=", ".join(CAPTURES), got=repr(self.level))
        if not 0 < self.logit_fraction <= 1:
            raise ConfigError("logit fraction", expected="in (0, 1]", got=self.logit_fraction)

    @property
    def has_gates(self) -> bool:
        return self.level in ("gates", "logits")

    @property
    def has_logits(self) -> bool:
        return self.level == "logits"

    def to_environment(self) -> dict[str, str]:
        return {LEVEL_VARIABLE: self.level, FRACTION_VARIABLE: repr(self.logit_fraction)}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> CaptureSettings:
        try:
            fraction = float(environment.get(FRACTION_VARIABLE, cls.logit_fraction))
        except ValueError as error:
            raise ConfigError(FRACTION_VARIABLE, expected="a number", got=error) from error
        return cls(level=environment.get(LEVEL_VARIABLE, cls.level), logit_fraction=fraction)
