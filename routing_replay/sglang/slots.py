"""The row of each KV slot, and the forward pass that wrote it.

Rows lie in compact types: SGLang's own buffer takes four bytes for an id, this one or two, two more
for a gate, four more for a combine weight. The memory is not pinned: rows arrive here from a copy
on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..routes.origin import Origin
from ..routes.routes import RouterLogits, compact_dtype
from .logits import LogitSampler

NOT_WRITTEN = 0
# What may be captured beside an id, by name.
VALUE_DTYPES = {"gates": np.dtype(np.float16), "weights": np.dtype(np.float32)}


@dataclass(frozen=True, kw_only=True)
class KeptRows:
    """Rows `start` and following of a request or of a step.

    Args:
        start: The first row's number.
        ids_TLK: uint8 or uint16; all layers, also those that never report.
        values: Captured values [T, L, K] by their name in `VALUE_DTYPES`, nan where a router's
            are unknown.
        stamp_T: What `Stamps.stamp` made of origin and weight version.
        logits: Of a sample of the rows; their numbers count from `start` = 0.
    """

    start: int
    ids_TLK: np.ndarray
    values: dict[str, np.ndarray]
    stamp_T: np.ndarray
    logits: RouterLogits | None

    @property
    def stop(self) -> int:
        return self.start + len(self.stamp_T)

    def part(self, low: int, high: int, shift: int = 0) -> KeptRows:
        """Return copies of the rows low .. high - 1, renumbered by `shift`."""
        rows = slice(low - self.start, high - self.start)
        return KeptRows(
            start=low + shift,
            ids_TLK=self.ids_TLK[rows].copy(),
            values={name: values[rows].copy() for name, values in self.values.items()},
            stamp_T=self.stamp_T[rows].copy(),
            logits=None if self.logits is None else self.logits.within(low, high, shift),
        )


class Stamps:
    """Origin and weight version of a forward pass, in four bytes."""

    def __init__(self) -> None:
        self.versions: list[int] = []

    def stamp(self, origin: Origin, weight_version: int) -> int:
        if not self.versions or self.versions[-1] != weight_version:
            self.versions.append(weight_version)
        return (len(self.versions) - 1) * len(Origin) + origin

    def origin(self, stamp_T: np.ndarray) -> np.ndarray:
        return (stamp_T % len(Origin)).astype(np.uint8)

    def weight_version(self, stamp_T: np.ndarray) -> np.ndarray:
        if not self.versions:
            return np.full(len(stamp_T), -1, np.int64)
        version_T = np.array(self.versions, np.int64)[stamp_T // len(Origin)]
        return np.where(stamp_T == NOT_WRITTEN, -1, version_T)


class SlotRows:
    """Rows of all KV slots; memory is bounded and allocated once.

    Args:
        shape: KV slots, layers, top-k.
        num_experts: It decides between one byte and two.
        captured: Names of the values that are kept, of `VALUE_DTYPES`.
        sampler: Where the logits are kept, if they are.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_experts: int,
        captured: Sequence[str] = (),
        sampler: LogitSampler | None = None,
    ):
        self.ids_NLK = np.zeros(shape, compact_dtype(num_experts))
        self.values = {name: np.zeros(shape, VALUE_DTYPES[name]) for name in captured}
        self.stamp_N = np.full(shape[0], NOT_WRITTEN, np.int32)
        self.stamps = Stamps()
        self.sampler = sampler

    @property
    def host_bytes(self) -> int:
        values_bytes = sum(values_NLK.nbytes for values_NLK in self.values.values())
        logits_bytes = 0 if self.sampler is None else self.sampler.host_bytes
        return int(self.ids_NLK.nbytes + values_bytes + self.stamp_N.nbytes + logits_bytes)

    def put(self, slots_T: np.ndarray, step: KeptRows) -> None:
        """Store the rows of a step at the slots that it wrote."""
        self.ids_NLK[slots_T] = step.ids_TLK
        for name, values_NLK in self.values.items():
            values_NLK[slots_T] = step.values[name]
        self.stamp_N[slots_T] = step.stamp_T
        if self.sampler is not None and step.logits is not None:
            self.sampler.keep(slots_T, step.logits.rows_N, step.logits.values_NLE)

    def take(self, slots_T: np.ndarray, start: int) -> KeptRows:
        """Return copies of the rows of these slots; the first is row `start` of a request."""
        logits = None
        if self.sampler is not None:
            logits = self.sampler.of_slots(slots_T).within(0, len(slots_T), shift=start)
        return KeptRows(
            start=start,
            ids_TLK=self.ids_NLK.take(slots_T, axis=0),
            values={name: values.take(slots_T, axis=0) for name, values in self.values.items()},
            stamp_T=self.stamp_N[slots_T],
            logits=logits,
        )

    def unwritten(self, num_rows: int, start: int) -> KeptRows:
        """Return rows that no forward pass wrote."""
        shape = (num_rows, *self.ids_NLK.shape[1:])
        return KeptRows(
            start=start,
            ids_TLK=np.zeros(shape, self.ids_NLK.dtype),
            values={name: np.zeros(shape, values.dtype) for name, values in self.values.items()},
            stamp_T=np.full(num_rows, NOT_WRITTEN, np.int32),
            logits=None,
        )
