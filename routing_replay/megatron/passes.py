"""A forward pass: one model chunk over one microbatch, and its recomputation in backward.

A pass is identified, never counted: in the forward it is the one whose chunk is running; in a
backward it is the one whose output received the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from ..errors import ReplayError
from .captured import StaticRoutes
from .routers import RouterSeam
from .selection import LiveTopK, Selection
from .transfers import compact_dtype, to_host


@dataclass(kw_only=True)
class ForwardPass:
    """Base of all passes; this one routes live.

    Args:
        number: Of the microbatch within its scope and chunk.
        chunk: Index of the model chunk on this rank.
        layers: Global layers of the chunk's routers.
        rows_T: Rows of the tokens in router order, -1 for live; host memory.
        mask_T: bool, tokens that the metrics look at; None for all.
    """

    number: int
    chunk: int
    layers: tuple[int, ...]
    rows_T: np.ndarray
    mask_T: np.ndarray | None = None
    is_closed: bool = False
    forward_calls: dict[int, int] = field(default_factory=dict)
    recompute_calls: dict[int, int] = field(default_factory=dict)
    _static: StaticRoutes | None = None
    _captured_calls_L: torch.Tensor | None = None

    # Whether the receipt accounts for it.
    is_counted: ClassVar[bool] = True

    @property
    def replays_weights(self) -> bool:
        """Whether replayed tokens take the table's combine weights."""
        return False

    @property
    def where(self) -> str:
        return f"chunk {self.chunk}, microbatch {self.number}"

    def promised(self, layer: int) -> np.ndarray:
        """Return the tokens whose row promises a replay in a layer; bool [T]."""
        return np.zeros(len(self.rows_T), np.bool_)

    def num_replayed(self, layer: int) -> int:
        """Tokens that took replayed experts in the forward of a layer."""
        return 0

    def recorded(self) -> Mapping[int, torch.Tensor]:
        """Live ids [T, K] that the pass kept, by layer, on the host."""
        return {}

    def select(self, seam: RouterSeam, live: LiveTopK, is_recompute: bool) -> Selection:
        """Return the selection of one router call."""
        self._count(seam, len(live.scores_TE), is_recompute)
        return seam.stock(live)

    def begin_static(self, static: StaticRoutes) -> None:
        """Fill the buffers of routers that a CUDA graph captured; they run without a call."""
        self._static = static
        static.begin()

    def weigh(self, layer: int, probs_TE: torch.Tensor) -> torch.Tensor:
        """Return the combine weights of one router call, from the router's own."""
        return probs_TE

    def num_weighed(self, layer: int) -> int:
        """Tokens that took replayed weights in the forward of a layer."""
        return 0

    def end_forward(self) -> None:
        """The chunk's forward has returned."""
        if self._static is not None:
            self._captured_calls_L = self._static.end()

    def count_captured(self) -> None:
        """Count the routers that ran in a CUDA graph; the device must have been waited for."""
        if self._captured_calls_L is None:
            return
        for layer, calls in zip(self.layers, self._captured_calls_L.tolist(), strict=True):
            if calls:
                self.forward_calls[layer] = self.forward_calls.get(layer, 0) + calls
                self._see_captured(layer)

    def _see_captured(self, layer: int) -> None:
        """A router ran in a CUDA graph."""

    def release(self) -> None:
        """Free the device memory: no recomputation of this pass can follow."""

    def close(self) -> None:
        """The scope is over: a recomputation that still comes is an error."""
        self.is_closed = True
        self.release()

    def begin_backward(self) -> None:
        """The gradient of the output arrived."""

    def _count(self, seam: RouterSeam, num_tokens: int, is_recompute: bool) -> None:
        where = f"layer {seam.layer}, {self.where}"
        seam.require_idle_stock(where)
        if self.is_closed:
            raise late_backward(where)
        if num_tokens != len(self.rows_T):
            raise ReplayError(
                "the router sees another number of tokens than token_rows name",
                expected=len(self.rows_T),
                got=num_tokens,
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


class LivePass(ForwardPass):
    """A forward that routes live within a scope: it promises nothing, so nothing is counted."""

    is_counted = False

    def select(self, seam: RouterSeam, live: LiveTopK, is_recompute: bool) -> Selection:
        return seam.stock(live)


@dataclass(kw_only=True)
class RecordingPass(ForwardPass):
    """Selects live and keeps the ids for a table (R2)."""

    record: LiveRecord

    def recorded(self) -> Mapping[int, torch.Tensor]:
        return self.record.by_layer()

    def select(self, seam: RouterSeam, live: LiveTopK, is_recompute: bool) -> Selection:
        self._count(seam, len(live.scores_TE), is_recompute)
        selection = seam.stock(live)
        if not is_recompute:
            self.record.put(seam.layer, selection[1])
        return selection

    def end_forward(self) -> None:
        super().end_forward()
        if self._static is not None:
            for index, layer in enumerate(self.layers):
                if layer not in self.forward_calls:  # it ran in a CUDA graph, or not at all
                    self.record.put(layer, self._static.chosen_LTK[index])
        self.record.move_to_host()


class LiveRecord:
    """The live ids of one pass: one buffer for all layers, so that one copy brings them home.

    A copy for each layer would pin one host buffer per layer and microbatch: tens of thousands.

    Args:
        layers: Of the chunk.
        num_experts: Of the model.
    """

    def __init__(self, layers: tuple[int, ...], num_experts: int):
        self._layers = layers
        self._dtype = compact_dtype(num_experts)
        self._ids_LTK: torch.Tensor | None = None
        self._seen: list[int] = []

    def put(self, layer: int, ids_TK: torch.Tensor) -> None:
        """Keep the ids of one layer; nothing waits."""
        if self._ids_LTK is None:
            shape = (len(self._layers), *ids_TK.shape)
            self._ids_LTK = torch.empty(shape, dtype=self._dtype, device=ids_TK.device)
        self._ids_LTK[self._layers.index(layer)].copy_(ids_TK)
        self._seen.append(layer)

    def move_to_host(self) -> None:
        """Free the device's buffer; synchronise before reading."""
        if self._ids_LTK is not None:
            self._ids_LTK = to_host(self._ids_LTK)

    def by_layer(self) -> dict[int, torch.Tensor]:
        """[T, K] by layer."""
        if self._ids_LTK is None:
            return {}
        return {layer: self._ids_LTK[self._layers.index(layer)] for layer in self._seen}


def late_backward(where: str) -> ReplayError:
    """Return the error for a backward that comes after its scope."""
    return ReplayError(
        "a forward is recomputed after its scope was closed",
        expected="backward within `with replay.replaying(...)`",
        where=where,
        fix="Run the whole forward-backward schedule inside the scope",
    )
