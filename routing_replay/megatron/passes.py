"""A pass: one model chunk's forward over one microbatch, and its recomputation in backward.

A pass is found by identity, never by order: in the forward it is the one whose chunk is running; in
a backward it is the one whose output received the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..errors import ReplayError, RoutesError
from ..routes.routes import has_duplicates
from ..routes.table import RouteTable
from .routers import RouterSeam
from .selection import LiveTopK, Selection, replay


@dataclass(kw_only=True)
class Pass:
    """What every pass is and counts.

    Args:
        number: Of the microbatch within its scope and chunk.
        chunk: Index of the model chunk on this rank.
        layers: Global layers of the chunk's routers.
        rows_T: Rows of the tokens in router order, -1 for live; host memory.
        counts_T: bool, tokens that the metrics look at; None for all.
    """

    number: int
    chunk: int
    layers: tuple[int, ...]
    rows_T: np.ndarray
    counts_T: np.ndarray | None = None
    is_closed: bool = False
    forward_calls: dict[int, int] = field(default_factory=dict)
    recompute_calls: dict[int, int] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"chunk {self.chunk}, microbatch {self.number}"

    def select(self, seam: RouterSeam, live: LiveTopK, is_recompute: bool) -> Selection:
        """The selection of one router call."""
        self._count(seam, live, is_recompute)
        return seam.stock(live)

    def end_forward(self) -> None:
        """The chunk's forward has returned."""

    def _count(self, seam: RouterSeam, live: LiveTopK, is_recompute: bool) -> None:
        where = f"layer {seam.layer}, {self.where}"
        seam.require_idle_stock(where)
        if self.is_closed:
            raise ReplayError(
                "a forward is recomputed after its scope was closed",
                expected="backward within `with replay.replaying(...)`",
                where=where,
                fix="Run the whole forward-backward schedule inside the scope",
            )
        if live.scores_TE.shape[0] != len(self.rows_T):
            raise ReplayError(
                "the router sees another number of tokens than token_rows name",
                expected=len(self.rows_T),
                got=live.scores_TE.shape[0],
                where=where,
                fix="Slice token_rows exactly as input_ids: packing, padding, context parallelism",
            )
        calls = self.recompute_calls if is_recompute else self.forward_calls
        calls[seam.layer] = calls.get(seam.layer, 0) + 1
        if calls[seam.layer] > 1:
            raise ReplayError(
                "a router ran twice in one microbatch",
                expected="each layer once" + (" in recomputation" if is_recompute else ""),
                got=f"{calls[seam.layer]} calls",
                where=where,
                fix="Open one replay.microbatch(token_rows) for each forward of the model",
            )


class LivePass(Pass):
    """A forward that routes live within a scope: nothing is promised, so nothing is counted."""

    def select(self, seam: RouterSeam, live: LiveTopK, is_recompute: bool) -> Selection:
        return seam.stock(live)


@dataclass(kw_only=True)
class RecordingPass(Pass):
    """Selects live and keeps the ids, in the compact dtype, for a table (R2)."""

    num_experts: int
    recorded: dict[int, torch.Tensor] = field(default_factory=dict)

    def select(self, seam: RouterSeam, live: LiveTopK, is_recompute: bool) -> Selection:
        self._count(seam, live, is_recompute)
        selection = seam.stock(live)
        if not is_recompute:
            self.recorded[seam.layer] = compact(selection[1], self.num_experts)
        return selection

    def end_forward(self) -> None:
        self.recorded = {layer: _to_host(ids_TK) for layer, ids_TK in self.recorded.items()}


@dataclass(kw_only=True)
class ReplayingPass(Pass):
    """Replays the table's rows; live selection for the tokens without one.

    Device memory: the microbatch's ids of the chunk's layers in the compact dtype, until the
    pass is released; one layer's slice is widened at use.
    """

    table: RouteTable
    seams: Sequence[RouterSeam]
    device: torch.device
    record_live: bool = False
    num_experts: int = 0
    observer: object | None = None
    live_ids: dict[int, torch.Tensor] = field(default_factory=dict)
    num_replayed: dict[int, int] = field(default_factory=dict)

    def __post_init__(self):
        ids_LTK = self.table.gather(self.layers, self.rows_T)
        self._require_selections(ids_LTK)
        ids_LTK = torch.from_numpy(ids_LTK)
        if ids_LTK.dtype == torch.uint16:
            ids_LTK = ids_LTK.view(torch.int16)  # ids stay below 2**15; few kernels take uint16
        self._ids_LTK = to_device(ids_LTK, self.device)
        live_F = np.flatnonzero(self.rows_T < 0)
        self._num_live = len(live_F)
        self._live_F = to_device(torch.from_numpy(live_F), self.device) if len(live_F) else None

    def select(self, seam: RouterSeam, live: LiveTopK, is_recompute: bool) -> Selection:
        self._count(seam, live, is_recompute)
        ids_TK = self._ids_LTK[self.layers.index(seam.layer)].long()
        if not is_recompute:
            self.num_replayed[seam.layer] = len(self.rows_T) - self._num_live
            self._look_at_live(seam, live, ids_TK)
        # The rollout's slots stay as the engine ordered them, alike in every pass. The trainer's
        # own take the order that a stock pass with gradients has, so that sums round alike; a
        # no-grad pass recorded them in the order that a stock pass without gradients has.
        keep_slots = self.table.source == "rollout" or not torch.is_grad_enabled()
        return replay(live, ids_TK, self._live_F, keep_slots)

    def end_forward(self) -> None:
        self.live_ids = {layer: _to_host(ids_TK) for layer, ids_TK in self.live_ids.items()}

    def release(self) -> None:
        """Free the device memory: no recomputation of this pass can follow."""
        self._ids_LTK = None
        self._live_F = None

    def _require_selections(self, ids_LTK: np.ndarray) -> None:
        """The rows are checked where they are used: a table may have changed since it was built."""
        wrong_LT = has_duplicates(ids_LTK)
        if ids_LTK.max(initial=0) >= self.num_experts:
            wrong_LT |= (ids_LTK >= self.num_experts).any(axis=2)
        wrong_LT &= self.rows_T >= 0
        if not wrong_LT.any():
            return
        place, token = np.argwhere(wrong_LT)[0]
        raise RoutesError(
            "a row of the table is no selection of experts",
            expected=f"{ids_LTK.shape[2]} distinct experts below {self.num_experts}",
            got=ids_LTK[place, token].tolist(),
            where=f"row {self.rows_T[token]}, layer {self.layers[place]}, {self.table.where}",
            fix="Build tables with RouteTable.from_routes, which checks; change none afterwards",
        )

    def _look_at_live(self, seam: RouterSeam, live: LiveTopK, ids_TK: torch.Tensor) -> None:
        if self.record_live:
            with torch.no_grad():
                self.live_ids[seam.layer] = compact(seam.stock(live)[1], self.num_experts)
        if self.observer is not None:
            self.observer.observe(seam, live, ids_TK)


def compact(ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Ids in one byte, or two (int16: few kernels take uint16, and ids stay below 2**15)."""
    return ids_TK.to(torch.uint8 if num_experts <= 256 else torch.int16)


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Host to device without making the host wait."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """Device to pinned host memory, enqueued: whoever reads it synchronises first."""
    if values.device.type == "cpu":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
