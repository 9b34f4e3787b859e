"""Rows of a cache on the host (HiCache): they move with its keys and values.

SGLang copies a prefix from the device's slots to slots on the host, drops the former, and later
copies it into other slots of the device. The rows follow both copies. A slot on the host that was
filled in another way, from a storage backend, keeps rows of another prefix, whose name tells them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .prefixes import UNNAMED
from .slots import SlotRows

# A prefix may be saved while the pass that computes it is in flight: its rows arrive with the next
# result, and get their names right after it.
NUM_SETTLES = 3


@dataclass(kw_only=True)
class Saved:
    """Slots of a copy to the host, and how often it is still looked at."""

    device_T: np.ndarray
    host_T: np.ndarray
    num_left: int = NUM_SETTLES


class HostRows:
    """Rows of the slots on the host; memory is allocated once and reused as SGLang reuses its own.

    Args:
        device: Rows of the slots on the device.
        num_slots: Slots on the host.
    """

    def __init__(self, device: SlotRows, num_slots: int):
        self.device, self.host = device, device.like(num_slots)
        self._saved: list[Saved] = []

    def save(self, device_T: np.ndarray, host_T: np.ndarray) -> None:
        """Copy rows to the slots on the host."""
        self.host.copy(self.device, device_T, host_T)
        self._saved.append(Saved(device_T=device_T, host_T=host_T))

    def settle(self) -> None:
        """Copy the rows that arrived since they were saved."""
        for saved in self._saved:
            prefix_T = self.device.prefix_N[saved.device_T]
            is_new_T = (prefix_T != UNNAMED) & (prefix_T != self.host.prefix_N[saved.host_T])
            self.host.copy(self.device, saved.device_T[is_new_T], saved.host_T[is_new_T])
            saved.num_left -= 1
        self._saved = [saved for saved in self._saved if saved.num_left]

    def load(self, host_T: np.ndarray, device_T: np.ndarray) -> None:
        """Copy rows from the slots on the host to other slots on the device."""
        self.device.copy(self.host, host_T, device_T)
