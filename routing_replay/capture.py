"""The capture levels, and how a server learns its level when it starts.

SGLang's plugins can be configured by environment variables only; these are read once, when the
plugin registers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError, unknown_name

CAPTURES = ("off", "stock", "ids", "weights", "gates", "logits")
OURS = ("ids", "weights", "gates", "logits")
LEVEL_VARIABLE = "ROUTING_REPLAY_CAPTURE"
FRACTION_VARIABLE = "ROUTING_REPLAY_LOGIT_FRACTION"
KERNEL_VARIABLE = "ROUTING_REPLAY_CAPTURE_KERNEL"
# The name under which a request carries its level, in SGLang's `custom_params`.
REQUEST_KEY = "routing_replay"


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """The most that requests of this server can ask for.

    Args:
        level: One of `CAPTURES`; "off" and "stock" leave SGLang as it is.
        logit_fraction: Fraction of tokens whose full router logits are kept, for "logits".
        has_kernel: Whether gates are computed by one Triton kernel instead of seven small ones of
            torch. Off by default: it has not run inside a server on a GPU.

    Raises:
        ConfigError: An unknown level or a fraction outside (0, 1].
    """

    level: str = "ids"
    logit_fraction: float = 0.05
    has_kernel: bool = False

    def __post_init__(self) -> None:
        if self.level not in CAPTURES:
            raise unknown_name("capture level", self.level, CAPTURES)
        if not 0 < self.logit_fraction <= 1:
            raise ConfigError(
                "the fraction of tokens with logits is out of range",
                expected="above 0, at most 1",
                got=self.logit_fraction,
            )

    @property
    def has_gates(self) -> bool:
        return self.level in ("gates", "logits")

    @property
    def has_weights(self) -> bool:
        return self.level in ("weights", "logits")

    @property
    def hooks_routers(self) -> bool:
        """Whether more than ids is captured, which SGLang's own capture does not see."""
        return self.has_gates or self.has_weights

    @property
    def has_logits(self) -> bool:
        return self.level == "logits"

    def to_environment(self) -> dict[str, str]:
        return {
            LEVEL_VARIABLE: self.level,
            FRACTION_VARIABLE: repr(self.logit_fraction),
            KERNEL_VARIABLE: str(int(self.has_kernel)),
        }

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> CaptureSettings:
        try:
            fraction = float(environment.get(FRACTION_VARIABLE, cls.logit_fraction))
        except ValueError as error:
            raise ConfigError(
                f"the environment variable {FRACTION_VARIABLE} is not a number", got=error
            ) from error
        kernel = environment.get(KERNEL_VARIABLE, "0")
        if kernel not in ("0", "1"):
            raise ConfigError(
                f"the environment variable {KERNEL_VARIABLE} is no switch",
                expected="0 or 1",
                got=repr(kernel),
            )
        return cls(
            level=environment.get(LEVEL_VARIABLE, cls.level),
            logit_fraction=fraction,
            has_kernel=kernel == "1",
        )
