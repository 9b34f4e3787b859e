"""Sequences whose every token is another id, so that a token names its row, and their routes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from witness import Witness


def distinct_tokens(lengths: Sequence[int]) -> list[torch.Tensor]:
    """Return sequences whose token ids are 1, 2, 3, ... throughout; 0 pads."""
    return list(torch.arange(1, 1 + sum(lengths)).split(list(lengths)))


def random_routes(
    lengths: Sequence[int], num_layers: int, num_experts: int, top_k: int
) -> list[torch.Tensor]:
    """Return random experts of every fed token: int64 [n - 1, L, K]."""
    g = torch.Generator().manual_seed(0)
    shapes = [(length - 1, num_layers, num_experts) for length in lengths]
    return [torch.rand(shape, generator=g).topk(top_k).indices for shape in shapes]


def dispatch_maps(routes: list[torch.Tensor], num_experts: int) -> torch.Tensor:
    """Return the experts of every token id, bool [V, L, E]; none for padding and last tokens."""
    num_tokens = sum(len(ids_TLK) + 1 for ids_TLK in routes)
    maps_VLE = torch.zeros(1 + num_tokens, routes[0].shape[1], num_experts, dtype=torch.bool)
    start = 1
    for ids_TLK in routes:
        maps_VLE[start : start + len(ids_TLK)].scatter_(2, ids_TLK, True)
        start += len(ids_TLK) + 1
    return maps_VLE


class NamedPasses:
    """A witness' counts, pass by pass.

    Attributes:
        seen: The counts by the pass's name.
    """

    def __init__(self, chunks: Iterable[torch.nn.Module], maps_VLE: torch.Tensor):
        self.seen: dict[str, dict[str, int]] = {}
        self._witness = Witness(list(chunks), maps_VLE)
        self._name = ""

    def begin(self, name: str) -> None:
        """Count to another name from here on."""
        counts = self.seen.setdefault(self._name, dict.fromkeys(self._witness.counts(), 0))
        for key, number in self._witness.counts().items():
            counts[key] += number
        self._witness.reset()
        self._name = name
