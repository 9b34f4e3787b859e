"""The row of each KV slot, the forward pass that wrote it, and the prefix that it is of.

Rows lie in compact types: SGLang's own buffer takes four bytes for an id, this one or two, two more
for a gate, four more for a combine weight. The memory is not pinned: rows arrive here from a copy
on the host.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from ..routes.origin import Origin, is_covered
from ..routes.routes import RouterLogits, compact_dtype
from .logits import LogitSampler
from .prefixes import UNNAMED

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
    """Origin and weight version of a forward pass, in four bytes.

    A cause why a row is not covered has no version, and is its own stamp.
    """

    def __init__(self) -> None:
        self.versions: list[int] = []

    def stamp(self, origin: Origin, weight_version: int) -> int:
        if not self.versions or self.versions[-1] != weight_version:
            self.versions.append(weight_version)
        return (len(self.versions) - 1) * len(Origin) + origin

    @staticmethod
    def origin(stamp_T: np.ndarray) -> np.ndarray:
        return (stamp_T % len(Origin)).astype(np.uint8)

    def weight_version(self, stamp_T: np.ndarray) -> np.ndarray:
        if not self.versions:
            return np.full(len(stamp_T), -1, np.int64)
        version_T = np.array(self.versions, np.int64)[stamp_T // len(Origin)]
        return np.where(is_covered(self.origin(stamp_T)), version_T, -1)


class SlotRows:
    """Rows of all KV slots; memory is bounded and allocated once.

    Args:
        shape: KV slots, layers, top-k.
        num_experts: It decides between one byte and two.
        captured: Names of the values that are kept, of `VALUE_DTYPES`.
        sampler: Where the logits are kept, if they are.
        has_names: Whether rows carry the names of their prefixes: needed where slots are filled
            without a forward pass.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_experts: int,
        captured: Sequence[str] = (),
        sampler: LogitSampler | None = None,
        has_names: bool = False,
    ):
        self.ids_NLK = np.zeros(shape, compact_dtype(num_experts))
        self.values = {name: np.zeros(shape, VALUE_DTYPES[name]) for name in captured}
        self.stamp_N = np.full(shape[0], NOT_WRITTEN, np.int32)
        # `prefixes`: of which tokens the row is, once it may be shared.
        self.has_names = has_names
        self.prefix_N = np.full(shape[0] if has_names else 0, UNNAMED, np.uint64)
        self.stamps = Stamps()
        self.sampler = sampler
        # Prefixes of slots whose rows the step in flight will write.
        self._expected: dict[int, int] = {}

    @property
    def host_bytes(self) -> int:
        values_bytes = sum(values_NLK.nbytes for values_NLK in self.values.values())
        logits_bytes = 0 if self.sampler is None else self.sampler.host_bytes
        named_bytes = self.ids_NLK.nbytes + self.stamp_N.nbytes + self.prefix_N.nbytes
        return int(named_bytes + values_bytes + logits_bytes)

    def put(self, slots_T: np.ndarray, step: KeptRows) -> None:
        """Store the rows of a step at the slots that it wrote; they belong to no prefix yet."""
        self.ids_NLK[slots_T] = step.ids_TLK
        for name, values_NLK in self.values.items():
            values_NLK[slots_T] = step.values[name]
        self.stamp_N[slots_T] = step.stamp_T
        self.unname(slots_T)
        if self.sampler is not None and step.logits is not None:
            self.sampler.keep(slots_T, step.logits.rows_N, step.logits.values_NLE)

    def name(self, slots_T: np.ndarray, prefix_T: np.ndarray) -> None:
        """Say of which prefixes the rows of some slots are."""
        self.prefix_N[slots_T] = prefix_T

    def unname(self, slots_T: np.ndarray) -> None:
        """Say that the rows of some slots are of no prefix that is known."""
        if self.has_names:
            self.prefix_N[slots_T] = UNNAMED

    def expect(self, slot: int, prefix: int) -> None:
        """Say of which prefix the row is that the step in flight writes at a slot."""
        self._expected[slot] = prefix

    def settle(self, written_T: np.ndarray) -> None:
        """Name the rows that were expected of the step whose slots are given."""
        if self._expected:
            for slot in set(self._expected).intersection(written_T.tolist()):
                self.prefix_N[slot] = self._expected[slot]
            self._expected.clear()

    def is_of(self, slots_T: np.ndarray, prefix_T: np.ndarray) -> np.ndarray:
        """Return which slots hold the rows of these prefixes: bool [T]."""
        return np.asarray(self.prefix_N[slots_T] == prefix_T)

    def take(
        self, slots_T: np.ndarray, start: int, wanted: Collection[str] = tuple(VALUE_DTYPES)
    ) -> KeptRows:
        """Return copies of the rows of these slots; the first is row `start` of a request.

        Args:
            slots_T: Their slots.
            start: The first row's number.
            wanted: Names of the values that are copied, of those that are kept.
        """
        logits = None
        if self.sampler is not None:
            logits = self.sampler.of_slots(slots_T).within(0, len(slots_T), shift=start)
        return KeptRows(
            start=start,
            ids_TLK=self.ids_NLK.take(slots_T, axis=0),
            values={
                name: values.take(slots_T, axis=0)
                for name, values in self.values.items()
                if name in wanted
            },
            stamp_T=self.stamp_N[slots_T],
            logits=logits,
        )

    def like(self, num_slots: int) -> SlotRows:
        """Return empty rows of other slots, with the same columns; logits are none of them."""
        slots = copy.copy(self)
        slots.ids_NLK = np.zeros((num_slots, *self.ids_NLK.shape[1:]), self.ids_NLK.dtype)
        slots.values = {
            name: np.zeros(slots.ids_NLK.shape, values.dtype)
            for name, values in self.values.items()
        }
        slots.stamp_N = np.full(num_slots, NOT_WRITTEN, np.int32)
        slots.prefix_N = np.full(num_slots, UNNAMED, np.uint64)
        slots.sampler, slots._expected = None, {}
        return slots

    def copy(self, source: SlotRows, from_T: np.ndarray, to_T: np.ndarray) -> None:
        """Copy rows and their names from other slots; their logits stay behind."""
        self.ids_NLK[to_T] = source.ids_NLK[from_T]
        for name, values_NLK in self.values.items():
            values_NLK[to_T] = source.values[name][from_T]
        self.stamp_N[to_T] = source.stamp_N[from_T]
        self.prefix_N[to_T] = source.prefix_N[from_T]
        if self.sampler is not None:
            self.sampler.forget(to_T)

    def lost(self, num_rows: int, start: int, cause: Origin) -> KeptRows:
        """Return rows that are not covered."""
        shape = (num_rows, *self.ids_NLK.shape[1:])
        return KeptRows(
            start=start,
            ids_TLK=np.zeros(shape, self.ids_NLK.dtype),
            values={name: np.zeros(shape, values.dtype) for name, values in self.values.items()},
            stamp_T=np.full(num_rows, cause, np.int32),
            logits=None,
        )
