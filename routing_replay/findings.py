"""Finding: one result of a check, as preflight, doctor and report give it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from .errors import RoutingReplayError, unknown_name

Level = Literal["error", "warning", "note", "ok"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note", "ok")  # the worst first


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One result of a check.

    Args:
        level: "error" (wrong, a job must not start), "warning" (suspicious), "note" (worth
            knowing) or "ok" (checked and right).
        what: One clause that states the result.
        name: Short stable name, for scripts.
        where: Layer, step, file or URL.
        cause: Why it matters.
        fix: The next step for the user.

    Raises:
        ConfigError: An unknown level.
    """

    level: Level
    what: str
    name: str = ""
    where: str = ""
    cause: str = ""
    fix: str = ""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise unknown_name("level of a finding", self.level, LEVELS)

    def __str__(self) -> str:
        head = f"{self.level:7s} {self.name}: " if self.name else f"{self.level:7s} "
        what = f"{self.what} [{self.where}]" if self.where else self.what
        return head + ". ".join(part.rstrip(".") for part in (what, self.cause, self.fix) if part)

    @property
    def is_error(self) -> bool:
        return self.level == "error"

    @property
    def rank(self) -> int:
        """Sort key: 0 for an error, larger for what matters less."""
        return LEVELS.index(self.level)

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    def to_error(self, error_class: type[RoutingReplayError]) -> RoutingReplayError:
        """Return this finding as an exception: the cause explains, the fix ends the message."""
        what = f"{self.what} ({self.name})" if self.name else self.what
        where = ": ".join(part for part in (self.where, self.cause) if part)
        return error_class(what, where=where or None, fix=self.fix or None)
