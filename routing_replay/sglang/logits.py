"""Full router logits of a random sample of tokens, by KV slot like the rows.

A device buffer holds the logits of one step. After the step a new random sample of its rows goes to
the host with the other results, into a ring of fixed size. A slot that is written again loses its
logits, and a full ring overwrites its oldest.
"""

from __future__ import annotations

import numpy as np
import torch

from ..routes.routes import RouterLogits

# A ring as large as the expected sample would forget live rows half of the time.
RING_SLACK = 1.5
NONE = -1


class LogitSampler:
    """Device buffer and host ring of the logits; memory is bounded and allocated once.

    Args:
        shape: Tokens of the largest step, layers, experts.
        num_slots: KV slots of the server.
        fraction: Of the tokens, in (0, 1].
        device: Where the model runs.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_slots: int,
        fraction: float,
        device: torch.device | str,
    ):
        # float32: the exact divergence is the purpose, and routers compute in it anyway.
        self.step_TLE = torch.zeros(shape, dtype=torch.float32, device=device)
        num_kept = max(1, int(num_slots * fraction * RING_SLACK))
        self.ring_RLE = np.zeros((num_kept, *shape[1:]), np.float32)
        self.entry_of_slot = np.full(num_slots, NONE, np.int64)
        self.slot_of_entry = np.full(num_kept, NONE, np.int64)
        self.fraction = fraction
        self._next = 0
        self._random = np.random.default_rng(0)

    @property
    def device_bytes(self) -> int:
        return self.step_TLE.numel() * self.step_TLE.element_size()

    @property
    def host_bytes(self) -> int:
        return self.ring_RLE.nbytes + self.entry_of_slot.nbytes + self.slot_of_entry.nbytes

    def write(self, layer: int, num_tokens: int, logits_TE: torch.Tensor | None) -> None:
        """Write one layer's logits of the step, nan where there are none.

        Runs inside CUDA graphs: static shapes and no sync.
        """
        self.step_TLE[:num_tokens, layer] = torch.nan if logits_TE is None else logits_TE

    def sample(self, num_rows: int) -> tuple[np.ndarray, torch.Tensor]:
        """Draw rows of a step on the host; return them with their logits on the device."""
        rows_N = np.flatnonzero(self._random.random(num_rows) < self.fraction)
        rows_N = rows_N[: len(self.ring_RLE)]
        index_N = torch.from_numpy(rows_N)
        if self.step_TLE.is_cuda:
            # From pageable memory the copy would wait for the forward stream.
            index_N = index_N.pin_memory()
        return rows_N, self.step_TLE[index_N.to(self.step_TLE.device, non_blocking=True)]

    def keep(self, slots_T: np.ndarray, rows_N: np.ndarray, values_NLE: np.ndarray) -> None:
        """Drop the logits of the slots that a step wrote, and keep those of its sampled rows."""
        self.forget(slots_T)
        entries_N = (self._next + np.arange(len(rows_N))) % len(self.ring_RLE)
        self._next = int(self._next + len(rows_N)) % len(self.ring_RLE)
        old_N = self.slot_of_entry[entries_N]
        # A slot may have got another entry since; only its current one is forgotten.
        is_current_N = (old_N != NONE) & (self.entry_of_slot[old_N] == entries_N)
        self.entry_of_slot[old_N[is_current_N]] = NONE
        self.ring_RLE[entries_N] = values_NLE
        self.slot_of_entry[entries_N] = slots_T[rows_N]
        self.entry_of_slot[slots_T[rows_N]] = entries_N

    def forget(self, slots_T: np.ndarray) -> None:
        """Drop the logits of some slots."""
        self.entry_of_slot[slots_T] = NONE

    def of_slots(self, slots_T: np.ndarray) -> RouterLogits:
        """Return the logits that are kept of some slots; rows are positions in `slots_T`."""
        entries_T = self.entry_of_slot[slots_T]
        rows_N = np.flatnonzero(entries_T != NONE)
        return RouterLogits(rows_N=rows_N, values_NLE=self.ring_RLE[entries_T[rows_N]])
