"""MoEShape: the layers, experts and top-k on which routes and a model must agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import RoutesError, RoutingReplayError

# numpy, torch.gather and Megatron index with signed integers; 16-bit ids stay positive below this.
MAX_EXPERTS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class MoEShape:
    """What a model's routers have in common.

    Args:
        layers: Global 0-based indices of the L routed layers, ascending (dense and hash-routed
            layers are left out).
        num_experts: E, routed experts per layer, 1..32768.
        top_k: K, experts that a token selects per layer, 1..E.

    Raises:
        RoutesError: A value out of its range, or layers that do not ascend.
    """

    layers: tuple[int, ...]
    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        # Lists and numpy integers would compare unequal, or not hash.
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        if any(layer < 0 for layer in self.layers) or any(a >= b for a, b in pairwise(self.layers)):
            raise RoutesError(
                "the routed layers are out of order",
                expected="ascending global layer indices >= 0",
                got=self.layers,
            )
        for what, value, largest in (
            ("the number of experts", self.num_experts, MAX_EXPERTS),
            ("top-k", self.top_k, self.num_experts),
        ):
            if not 1 <= value <= largest:
                raise RoutesError(
                    f"{what} is out of range", expected=f"1..{largest}", got=repr(value)
                )

    def __str__(self) -> str:
        layers = f"{len(self.layers)} routed layers {_ranges(self.layers)}"
        return f"{layers}, {self.num_experts} experts, top-{self.top_k}"

    def require_equal(
        self,
        other: MoEShape,
        what: str,
        error_class: type[RoutingReplayError] = RoutesError,
        *,
        where: object = None,
        fix: str | None = None,
    ) -> None:
        """Raise unless `other` is equal; the message names the fields that differ.

        Args:
            other: The shape to compare with this one, which is the expected one.
            what: One clause that names the problem, such as "the server runs another model".
            error_class: What to raise.
            where: Where the other shape comes from.
            fix: The next step for the user.
        """
        if self == other:
            return
        names = ("layers", "num_experts", "top_k")
        differing = [name for name in names if getattr(self, name) != getattr(other, name)]
        verb = "differs" if differing in (["num_experts"], ["top_k"]) else "differ"
        raise error_class(
            f"{what}: {' and '.join(differing)} {verb}",
            expected=self,
            got=other,
            where=where,
            fix=fix,
        )


def _ranges(numbers: Sequence[int]) -> str:
    """(0, 1, 2, 5) as '0-2,5'."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in parts)
