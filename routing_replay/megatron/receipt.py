"""The receipt: proof that a scope did what it promised, counted on the host during the passes.

Counting takes the sizes of tensors and the rows that the host sliced anyway: no device sync.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import ReplayError
from ..metrics.typed import Mean, Metric, Sum
from .passes import ForwardPass


@dataclass(frozen=True, kw_only=True)
class ReceiptLine:
    """One layer of one microbatch.

    Args:
        layer: Global layer index.
        chunk: Model chunk on this rank.
        microbatch: Number within the scope and chunk.
        num_tokens: Tokens that the router saw: replayed + live.
        num_expected: Tokens whose row promised a replay.
        num_replayed: Tokens that took the replayed experts.
        num_unweighed: Replayed tokens that did not take the table's weights, where promised.
        num_masked: Tokens that the metrics look at (`mask` of the microbatch; all if None).
        num_masked_replayed: Those of them that took the replayed experts.
        num_forwards: Forward passes; right is 1.
        num_recomputes: Recomputations in backward; right is 0 or 1.
    """

    layer: int
    chunk: int
    microbatch: int
    num_tokens: int
    num_expected: int
    num_replayed: int
    num_unweighed: int
    num_masked: int
    num_masked_replayed: int
    num_forwards: int
    num_recomputes: int

    @property
    def num_live(self) -> int:
        return self.num_tokens - self.num_replayed

    @property
    def is_right(self) -> bool:
        return (
            self.num_forwards == 1
            and self.num_recomputes <= 1
            and self.num_replayed == self.num_expected
            and self.num_unweighed == 0
        )


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """All lines of a scope on this rank."""

    lines: tuple[ReceiptLine, ...]

    @classmethod
    def of(cls, passes: Iterable[ForwardPass]) -> Receipt:
        """Return the receipt of a scope's passes."""
        return cls(lines=tuple(line for one in passes for line in _lines(one)))

    def check(self, rank: int) -> None:
        """Raise ReplayError unless every layer of every microbatch was replayed exactly once."""
        wrong = [line for line in self.lines if not line.is_right]
        if not wrong:
            return
        first = wrong[0]
        raise ReplayError(
            f"the receipt does not add up in {len(wrong)} of {len(self.lines)} entries",
            expected=f"1 forward pass with {first.num_expected} replayed rows",
            got=f"{first.num_forwards} forward passes, {first.num_recomputes} recomputations, "
            f"{first.num_replayed} replayed rows"
            + (f", {first.num_unweighed} without weights" if first.num_unweighed else ""),
            where=f"layer {first.layer}, chunk {first.chunk}, microbatch {first.microbatch}, "
            f"rank {rank}",
            fix="Run every chunk once inside replay.microbatch(token_rows); see replay.receipt",
        )

    def metrics(self) -> dict[str, Metric]:
        """Return `routing_replay/{coverage,fallback_fraction,replayed_rows,passes}`, typed.

        coverage and fallback_fraction are over the tokens of each microbatch's `mask` (neither
        padding nor, usually, prompts), or over all that routers saw without one.
        """
        num_masked = sum(line.num_masked for line in self.lines)
        num_covered = sum(line.num_masked_replayed for line in self.lines)
        num_replayed = sum(line.num_replayed for line in self.lines)
        num_forwards = sum(line.num_forwards for line in self.lines)
        return {
            "routing_replay/coverage": _mean(num_covered, num_masked),
            "routing_replay/fallback_fraction": _mean(num_masked - num_covered, num_masked),
            "routing_replay/replayed_rows": Sum(total=torch.tensor(float(num_replayed))),
            "routing_replay/passes": Sum(total=torch.tensor(float(num_forwards))),
        }

    def table(self) -> str:
        """Return the lines as text, one row per layer, summed over the microbatches."""
        heading = ("layer", "passes", "tokens", "expected", "replayed", "live", "recomputed")
        sums: dict[int, list[int]] = {}
        for line in self.lines:
            values = (
                line.num_forwards,
                line.num_tokens,
                line.num_expected,
                line.num_replayed,
                line.num_live,
                line.num_recomputes,
            )
            old = sums.get(line.layer, [0] * len(values))
            sums[line.layer] = [a + b for a, b in zip(old, values, strict=True)]
        return _text(heading, sums)


def _lines(one: ForwardPass) -> Iterable[ReceiptLine]:
    mask_T = np.ones(len(one.rows_T), np.bool_) if one.mask_T is None else one.mask_T
    for layer in one.layers:
        promised_T = one.promised(layer)
        num_replayed = one.num_replayed(layer)
        yield ReceiptLine(
            layer=layer,
            chunk=one.chunk,
            microbatch=one.number,
            num_tokens=len(one.rows_T),
            num_expected=int(promised_T.sum()),
            num_replayed=num_replayed,
            num_unweighed=num_replayed - one.num_weighed(layer) if one.replays_weights else 0,
            num_masked=int(mask_T.sum()),
            # All that were promised, or none: a router replays a microbatch as a whole.
            num_masked_replayed=int((promised_T & mask_T).sum()) if num_replayed else 0,
            num_forwards=one.forward_calls.get(layer, 0),
            num_recomputes=one.recompute_calls.get(layer, 0),
        )


def _mean(total: int, count: int) -> Mean:
    return Mean(
        total=torch.tensor(total, dtype=torch.float64),
        count=torch.tensor(count, dtype=torch.float64),
    )


def _text(heading: tuple[str, ...], sums: Mapping[int, list[int]]) -> str:
    rows = [heading, *((str(k), *map(str, v)) for k, v in sorted(sums.items()))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heading))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
